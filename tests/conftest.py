import os

import jax


# Most of the time of the tests is compilation, so XLA does not optimise its output. The
# flops and the memory that it reports do not depend on this. One job of the workflows
# sets `TEST_XLA_LEVEL=default`.
if os.environ.get("TEST_XLA_LEVEL") != "default":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
# Several devices, so that code for many of them is tested on one CPU.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import itertools

import jax.random as jr
import pytest
from eqx_hpo import _checkpoints


@pytest.fixture
def getkey():
    numbers = itertools.count()
    return lambda: jr.key(next(numbers))


class Killed(BaseException):
    """Ends a run without a chance to save."""


@pytest.fixture
def kill(monkeypatch):
    """Ends a run at a step as a power cut does: nothing is saved afterwards."""

    def at(step):
        finish = _checkpoints.Keeper.finish

        def die(state):
            if int(state.step) >= step:
                monkeypatch.setattr(_checkpoints.Keeper, "finish", lambda *args: None)
                raise Killed("killed")

        def revive():
            monkeypatch.setattr(_checkpoints.Keeper, "finish", finish)

        return die, revive

    return at
