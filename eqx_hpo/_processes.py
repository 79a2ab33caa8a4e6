"""Coordinates several processes that make the same run.

Each process makes the same calls at the same time, and each call waits for all. Some
things only one process knows, such as a signal, the time or a failure. These are told
to the others before any process acts on them. The first process writes files and shows
progress.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


def is_first() -> bool:
    return jax.process_index() == 0


def is_alone() -> bool:
    """Tells whether this is the only process. Others could wait for it."""
    return jax.process_count() == 1


def agree(value: int) -> int:
    """Returns the largest of the values that the processes have."""
    if is_alone():
        return int(value)
    # Here, as it would be a good part of the time of `import eqx_hpo`.
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.array(value, np.int32)).max())


def at_first(action: Callable[[], Any]) -> bool:
    """Lets the first process do something. Returns in all processes whether the result
    was true.

    **Raises:** an `OSError`, in all.
    """
    answer, failure = False, None
    if is_first():
        try:
            answer = bool(action())
        except OSError as e:
            failure = e
    # 0: false, 1: true, 2: it failed.
    told = agree(2 if failure is not None else answer)
    if told == 2:
        raise failure or OSError("the first process could not write")
    return told == 1
