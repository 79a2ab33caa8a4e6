"""Every public argument, in turn, with every kind of wrong value: what is no use must
raise a `ValueError` that names the argument.

By itself this prints how many calls there were, and what came of them:
`python -m tests.test_arguments`.
"""

import collections
import fnmatch
import functools as ft
import inspect
import re
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import eqx_hpo as hpo
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax


class _Tensor:
    """As those of PyTorch: an array to the eye, but of neither NumPy nor JAX."""

    shape = (2,)
    dtype = "torch.float32"

    def __repr__(self):
        return "tensor([1., 2.])"


class _Thing:
    pass


def _function(*args, **kwargs):
    del args, kwargs
    return 0.5


WRONG = {
    "None": None,
    "True": True,
    "'a'": "a",
    "''": "",
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": -float("inf"),
    "1j": 1j,
    "int64": np.int64(0),
    "[]": [],
    "{}": {},
    "()": (),
    "object": object(),
    "empty": np.array([]),
    "strings": np.array(["a"]),
    "array": jnp.array([1, 2]),
    "function": _function,
    "class": _Thing,
    "adam": optax.adam,
    "tensor": _Tensor(),
}
FUNCTIONS = {"function", "class", "adam"}
TREES = {"[]", "{}", "()"}
NUMBERS = {"True", "-1", "0", "1.5", "nan", "inf", "-inf", "1j", "int64"}

# What is legal all the same. The pattern is that of `callable.argument`.
LEGAL = {
    "*.key": {"None"},
    "*.where": {"None", *FUNCTIONS},
    "*.model_state": {"None"},
    "*.callback": {"None", *FUNCTIONS},
    "Problem.*_loss": FUNCTIONS,
    "Problem.has_aux": {"True"},
    # Placeholders: numbers, and arrays of them.
    "Real.value": {"-1", "0", "1.5", "int64"},
    "Positive.value": {"1.5"},
    "Choice.logits": {"array"},
}


def _loss(model, hyperparams, batch, key):
    """Looks at no data, so that no data is wrong to it."""
    del batch, key
    return jnp.sum((model - hyperparams) ** 2)


def _calls() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """A valid call of each public callable."""
    ones, sgd = jnp.ones(2), optax.sgd(0.1)
    problem = hpo.Problem(_loss, _loss)
    settings = {"problem": problem, "inner": sgd, "outer": sgd}
    plain = hpo.FirstOrder(**settings)
    tasks = hpo.MetaLearner(plain, 2, horizon=1)
    state, state_of_tasks = plain.init(ones, ones), tasks.init(ones, ones)
    data = {"train": ones, "val": ones}
    start = {"model": ones, "hyperparams": ones}
    file = f"{tempfile.mkdtemp()}/state"
    hpo.save(file, state)
    schedule = {"value": jnp.ones(3), "every": 2}
    driver = {"algorithm": plain, "model": ones, **data, "steps": 1, "key": None}
    steps = {"inner_steps": 2}
    calls = {
        "Problem": {"train_loss": _loss, "val_loss": _loss},
        "Real": {"value": 1.0},
        "Positive": {"value": 1.0},
        "Interval": {"value": 0.5, "lower": 0.0, "upper": 1.0},
        "Simplex": {"value": jnp.array([0.5, 0.5])},
        "Choice": {"logits": 3},
        "Switch": {"logits": 0.5},
        "Integer": {"value": 2, "lower": 1, "upper": 3},
        "Schedule": schedule,
        "Minibatch": {"data": ones, "batch_size": 1},
        "Stacked": {"batches": ones},
        "Neumann": {"terms": 2, "learning_rate": 0.1},
        "Nystrom": {"rank": 1, "damping": 0.1},
        "L1": {"strength": 0.1},
        "ElasticNet": {"l1": 0.1, "l2": 0.1},
        "GroupLasso": {"strength": 0.1},
        "Box": {"lower": 0.0, "upper": 1.0},
        "FiniteDifference": {},
        "ForwardOverReverse": {},
        "ReverseOverReverse": {},
        "FirstOrder": settings,
        "T1T2": settings,
        "Greedy": settings | steps,
        "HyperDistill": settings,
        "Unrolled": settings | steps,
        "ForwardMode": settings,
        "DrMAD": settings | steps,
        "Implicit": settings | steps | {"linear_solver": lx.CG(1e-3, 1e-3)},
        "MetaLearner": {"algorithm": plain, "tasks": 2},
        "is_hyperparameter": {"x": ones},
        "partition": {"model": ones},
        "unwrap": {"hyperparams": ones},
        "discretise": {"hyperparams": ones},
        "project": {"projection": optax.projections.projection_simplex},
        "mirror": {},
        "proximal": {"penalty": hpo.L1(0.1), "learning_rate": 0.1},
        "select_top_k": {"k": 1},
        "save": {"path": file, "state": state},
        "load": {"path": file, "like": state},
        "tune": driver | {"hyperparams": ones, "progress": False},
        "search": driver
        | {"low": ones, "high": 2 * ones, "trials": 1, "progress": False},
        "compare_hypergradients": {"algorithms": [plain], **start, **data, "key": None},
    }
    methods = {
        f"{type(algorithm).__name__}.{name}": (getattr(algorithm, name), kwargs)
        for algorithm, state in ((plain, state), (tasks, state_of_tasks))
        for name, kwargs in {
            "init": start,
            "step": {"state": state, **data},
            "compute_hypergradient": {"state": state, **data},
            "restart": {"state": state, "model": ones},
        }.items()
    }
    methods["MetaLearner.initialisation"] = (
        tasks.initialisation,
        {"state": state_of_tasks},
    )
    return {name: (getattr(hpo, name), x) for name, x in calls.items()} | methods


# Of what compiles before it can tell, these alone.
FEW = {
    "*.train": {"strings", "empty", "tensor"},
    "*.val": {"strings", "empty", "tensor"},
}


def _outcome(argument: str, call: Callable[[], Any]) -> str:
    """'named', 'silent', or the foreign error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as e:
        own = (ValueError, OSError) if argument == "path" else ValueError
        named = re.search(rf"`[^`]*\b{argument}\b[^`]*`", str(e)) is not None
        if isinstance(e, own) and (named or isinstance(e, OSError)):
            return "named"
        return f"{type(e).__name__}: {str(e).strip().splitlines()[:1]}"
    return "silent"


def _matching(patterns: dict[str, Any], place: str) -> list[Any]:
    return [x for p, x in patterns.items() if fnmatch.fnmatchcase(place, p)]


@ft.cache
def walk() -> list[tuple[str, str, str]]:
    """All calls, as `(place, value, outcome)`."""
    rows = []
    for name, (fn, kwargs) in _calls().items():
        fn(**kwargs)
        for argument, parameter in inspect.signature(fn).parameters.items():
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            place = f"{name}.{argument}"
            few = _matching(FEW, place)
            for value in few[0] if few else WRONG:
                changed = kwargs | {argument: WRONG[value]}
                outcome = _outcome(argument, ft.partial(fn, **changed))
                rows.append((place, value, outcome))
    return rows


if __name__ == "__main__":
    import sys
    import time

    t = time.time()
    out = sys.stderr
    rows = walk()
    legal = lambda place, value: any(value in x for x in _matching(LEGAL, place))
    count = collections.Counter()
    table = collections.defaultdict(list)
    for place, value, outcome in rows:
        is_legal = legal(place, value)
        kind = outcome if outcome in ("named", "silent") else "foreign"
        count[kind, "legal" if is_legal else "wrong"] += 1
        if kind != ("silent" if is_legal else "named"):
            table[place, outcome.partition("[")[2] and kind or kind].append(value)
    for (place, outcome), values in table.items():
        print(f"{place:35s} {outcome[:110]:110s} {', '.join(values)}", file=out)
    print(count, len(rows), time.time() - t, file=out)
