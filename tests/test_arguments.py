"""Every public argument, in turn, with every kind of wrong value: what is no use must
raise a `ValueError` that names the argument.

By itself this prints how many calls there were, and what came of them:
`python -m tests.test_arguments`.
"""

import collections
import fnmatch
import functools as ft
import inspect
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jaxtyping
import lineax as lx
import numpy as np
import optax
import pytest


class _Tensor:
    """As those of PyTorch: an array to the eye, but of neither NumPy nor JAX."""

    shape = (2,)
    dtype = "torch.float32"

    def __repr__(self):
        return "tensor([1., 2.])"


class _Thing:
    def __init__(self, *args, **kwargs):
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

# What is legal all the same. A pattern is that of `callable.argument`.
LEGAL = {
    "*.key": {"None"},
    "*.where": {"None", *FUNCTIONS},
    "*.callback": {"None", "[]", "()", *FUNCTIONS},
    "*.progress": {"True"},
    "save.path": {"'a'"},
    "Problem.*_loss": FUNCTIONS,
    "Problem.has_aux": {"True"},
    # Numbers, and arrays of them.
    "Real.value": {"-1", "0", "1.5", "int64"},
    "Positive.value": {"1.5"},
    "Interval.lower": {"-1", "0", "int64"},
    "Interval.upper": {"1.5"},
    "Switch.logits": {"-1", "0", "1.5", "int64"},
    "Integer.value": {"1.5", "array"},
    "Integer.lower": {"-1", "0", "int64"},
    "*.temperature": {"1.5", "function"},
    "*.sample": {"True"},
    "*.straight_through": {"True"},
    "[!aP]*.strength": {"0", "1.5", "int64", "array"},
    "anchor.strength": {"0", "1.5", "int64"},
    "*.l[12]": {"0", "1.5", "int64", "array"},
    "*.axis": {"None", "-1", "0", "int64"},
    "Box.lower": {"-1", "0", "-inf", "int64"},
    "Box.upper": {"0", "1.5", "inf", "int64", "array"},
    "*.learning_rate": {"1.5"},
    "proximal.learning_rate": FUNCTIONS,
    "*.damping": {"0", "1.5", "int64"},
    "*.epsilon": {"1.5"},
    "*.seed": {"0", "int64"},
    "Minibatch.data": {"array"},
    "Minibatch.replacement": {"True"},
    "Stacked.batches": {"array"},
    "folds.data": {"array"},
    "gate.threshold": {"0", "1.5", "int64"},
    "select_top_k.groups": FUNCTIONS,
    "select_top_k.rotate": {"0", "int64"},
    "project.projection": FUNCTIONS,
    # The settings of algorithms.
    "[!ImPS]*.inner": {"function", "class"},
    "*.unroll": {"None"},
    "*.discount": {"0", "int64"},
    "*.momentum": {"None", "0", "int64"},
    "*.final_gradient": {"True"},
    "*.warm_start": {"True"},
    "HyperDistill.scale": {"None", "0", "1.5", "int64"},
    "Evolution.scale": {"1.5"},
    "FixedPoint.terms": {"0", "int64"},
    "Penalty.bias_every": {"None"},
    "Penalty.strength": {"1.5", "function", "class"},
    "SOBA.linear_rate": {"1.5", "function", "class"},
    "SOBA.averaging": {"0", "int64"},
    "*.truncation": {"None"},
    "*.recompute": {"0", "int64"},
    "*.curvature_steps": {"None", "0", "int64"},
    "MetaLearner.horizon": {"None"},
    "*.reptile": {"None", "0", "int64"},
    # Any pytree.
    "is_hyperparameter.x": set(WRONG),
    "partition.model": set(WRONG),
    "partition.filter_spec": {"True", "function", "class"},
    "unwrap.hyperparams": set(WRONG),
    "discretise.hyperparams": set(WRONG),
    # Hyperparameters may be none at all, and hold what is no number.
    "*.hyperparams": {"None", "1.5", "object", "empty", *TREES, *FUNCTIONS},
    # Options of the drivers.
    "[tf]*.state": {"None"},
    "[tf]*.re*_every": {"None"},
    "[tf]*.checkpoint": {"None", "'a'"},
    "tune_folds.batch_size": {"None"},
    "tune_folds.average": {"0", "int64"},
    "tune_folds.data": {"array"},
    "Checkpoints.folder": {"'a'"},
    "Checkpoints.minutes": {"None", "1.5"},
    "Checkpoints.resume": {"True"},
    "Checkpoints.signals": {"[]", "()"},
    "Monitor.metric": {*FUNCTIONS},
    "Monitor.patience": {"None"},
    "Monitor.best": {"None"},
    "*.monitor": {"None"},
    "search.pruner": {"None"},
    "search.report_every": {"None"},
    "search.storage": {"None"},
    "search.study_name": {"'a'"},
    "compare_hypergradients.inner_opt_state": {"None"},
}

# What is not tried, as the error is not of this library.
SKIPPED = {
    # A model state is what the losses make of it.
    "*.model_state": set(WRONG),
    # The function itself raises.
    "*.callback": {"adam"},
    "partition.filter_spec": {"adam"},
    # JAX refuses an array of strings before a compiled method begins.
    "*.step.*": {"strings"},
    "*.compute_hypergradient.*": {"strings"},
    # A batch may be any pytree of numbers and what else the losses take.
    "*.train": set(WRONG) - {"strings", "empty", "tensor"},
    "*.val": set(WRONG) - {"strings", "empty", "tensor"},
    # Each structure compiles anew.
    "[tf]*.hyperparams": {"object", "empty", "[]", "()", *FUNCTIONS},
    "compare_hypergradients.hyperparams": set(WRONG) - {"1j", "nan", "tensor"},
}


def _loss(model, hyperparams, batch, key):
    """Looks at nothing else, so that nothing else is wrong to it."""
    del hyperparams, batch, key
    return jnp.sum(model**2)


def _metric(state):
    return 0.0


@ft.cache
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
        "folds": {"data": ones, "count": 2},
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
        "SOBA": settings | {"linear_rate": 0.1},
        "Penalty": settings | {"strength": 1.0},
        "FixedPoint": settings | steps,
        "Evolution": settings | steps,
        "MetaLearner": {"algorithm": plain, "tasks": 2, "horizon": 1},
        "is_hyperparameter": {"x": ones},
        "partition": {"model": ones},
        "unwrap": {"hyperparams": ones},
        "discretise": {"hyperparams": ones},
        "project": {"projection": optax.projections.projection_simplex},
        "anchor": {"strength": 0.1},
        "mixed_precision": {"inner": sgd},
        "gate": {"threshold": 0.1},
        "mirror": {},
        "proximal": {"penalty": hpo.L1(0.1), "learning_rate": 0.1},
        "select_top_k": {"k": 1},
        "save": {"path": file, "state": state},
        "summary": {"state": state},
        "load": {"path": file, "like": state},
        "Monitor": {"metric": _metric, "every": 1},
        "Checkpoints": {"folder": "run"},
        "tune": driver | {"hyperparams": ones, "progress": False},
        "fit": {x: y for x, y in driver.items() if x != "val"}
        | {"hyperparams": ones, "progress": False},
        "tune_folds": {
            **{x: y for x, y in driver.items() if x not in ("train", "val")},
            "hyperparams": ones,
            "data": jnp.ones((4, 2)),
            "count": 2,
            "fit_steps": 1,
            "progress": False,
        },
        "search": driver
        | {"low": ones, "high": 2 * ones, "trials": 1, "progress": False},
        "audit": {
            "algorithm": plain,
            "state": state,
            **data,
            "horizon": 1,
            "key": None,
        },
        "compare_hypergradients": {"algorithms": [plain], **start, **data, "key": None},
    }
    methods = {
        f"{type(algorithm).__name__}.{name}": (getattr(algorithm, name), kwargs)
        for algorithm, state in ((plain, state), (tasks, state_of_tasks))
        for name, kwargs in {
            "init": start | data,
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


def _matching(patterns: dict[str, set[str]], place: str) -> set[str]:
    matching = [x for p, x in patterns.items() if fnmatch.fnmatchcase(place, p)]
    return set().union(*matching)


def _walk(name: str) -> list[tuple[str, str, str]]:
    """All calls of one callable, as `(place, value, outcome)`."""
    fn, kwargs = _calls()[name]
    assert _outcome("", ft.partial(fn, **kwargs)) == "silent"
    rows = []
    for argument, parameter in inspect.signature(fn).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        place = f"{name}.{argument}"
        for value in [x for x in WRONG if x not in _matching(SKIPPED, place)]:
            changed = kwargs | {argument: WRONG[value]}
            rows.append((place, value, _outcome(argument, ft.partial(fn, **changed))))
    return rows


def _failures(rows: list[tuple[str, str, str]]) -> dict[str, dict[str, str]]:
    """What came out in another way than it should, by place and value."""
    failures = collections.defaultdict(dict)
    for place, value, outcome in rows:
        expected = "silent" if value in _matching(LEGAL, place) else "named"
        if outcome != expected:
            failures[place][value] = outcome
    return failures


# The results that the library makes, which are made of whatever it puts in.
RECORDS = {
    "Best",
    "Audit",
    "BilevelState",
    "Comparison",
    "ComparisonRow",
    "Discretised",
    "Estimate",
    "EvolutionReport",
    "FoldsSolution",
    "History",
    "ImplicitReport",
    "InnerState",
    "Levels",
    "Memory",
    "Metrics",
    "PenaltyReport",
    "Readings",
    "RESULTS",
    "Solution",
    "TaskReport",
}


PUBLIC = {name for name, x in vars(hpo).items() if callable(x) and name[0] != "_"}
METHODS = ["init", "step", "compute_hypergradient", "restart"]
NAMES = [
    *sorted(x for x in PUBLIC - RECORDS if not inspect.isabstract(getattr(hpo, x))),
    *[f"{owner}.{x}" for owner in ("FirstOrder", "MetaLearner") for x in METHODS],
    "MetaLearner.initialisation",
]


@pytest.fixture(autouse=True)
def _as_users_have_it(monkeypatch, tmp_path):
    """Without the checks of types that the tests turn on, and where files may lie."""
    monkeypatch.chdir(tmp_path)
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


DRIVERS = {"compare_hypergradients", "fit", "search", "tune", "tune_folds"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=pytest.mark.slow if x in DRIVERS else []) for x in NAMES],
)
def test_what_is_wrong_is_refused_by_name(name):
    if name == "search":
        pytest.importorskip("optuna")
    assert _failures(_walk(name)) == {}


untyped: Any = hpo  # for calls that a checker of types would refuse
ONES = jnp.ones(2)
TEXTS = {
    "`Real(value)` must be finite; got nan.": lambda: untyped.Real(np.nan),
    "`Positive(value)` must be finite; got inf.": lambda: untyped.Positive(np.inf),
    "`Positive(value)` must not be empty; its shape is (0,).": lambda: untyped.Positive(
        []
    ),
    "`Simplex(value)` must be finite; got [nan  1.].": lambda: untyped.Simplex(
        np.array([np.nan, 1.0])
    ),
    "`Switch(logits)` must be finite; got nan.": lambda: untyped.Switch(np.nan),
    "`Choice(logits)` must be finite; got [ 1. inf].": lambda: untyped.Choice(
        np.array([1.0, np.inf])
    ),
    "`upper` must be finite; got inf.": lambda: untyped.Interval(0.5, 0.0, np.inf),
    "`lower` must broadcast to `value`, which has the shape (); its own is (2,).": (
        lambda: untyped.Interval(0.5, np.zeros(2), 1.0)
    ),
    "`upper` must be an integer; got 3.5.": lambda: untyped.Integer(2, 1, 3.5),
    "`temperature` must be a number above zero, and finite; got inf.": (
        lambda: untyped.Choice(3, temperature=np.inf)
    ),
    "`temperature(0)` must be a number above zero, and finite; got nan.": (
        lambda: untyped.Choice(3, temperature=lambda step: np.nan)
    ),
    "`sample` must be True or False; got 'no'.": lambda: untyped.Choice(3, sample="no"),
    "`straight_through` must be True or False; got 1.": lambda: untyped.Switch(
        0.1, straight_through=1
    ),
    "`strength` must be finite; got nan.": lambda: untyped.L1(np.nan),
    "`l2` must be finite; got inf.": lambda: untyped.ElasticNet(0.1, np.inf),
    "`strength` must be a number of at least zero; got [ 1. -1.].": (
        lambda: untyped.GroupLasso(np.array([1.0, -1.0]))
    ),
    "`loss_scale` must be a power of two from 2 to 2**24; got 'a'.": (
        lambda: untyped.mixed_precision(optax.sgd(0.1), loss_scale="a")
    ),
    "`inner` must be an `optax.GradientTransformation`, made inside `lambda h: "
    "mixed_precision(...)` if it depends on hyperparameters; got a function.": (
        lambda: untyped.mixed_precision(_function)
    ),
    "`axis` must be an integer; got 'a'.": lambda: untyped.GroupLasso(0.1, axis="a"),
    "`lower` must be a number; got nan.": lambda: untyped.Box(np.nan, 1.0),
    "`seed` must be an integer of at least 0; got 1.5.": lambda: untyped.Minibatch(
        ONES, 1, seed=1.5
    ),
    "`replacement` must be True or False; got 'no'.": lambda: untyped.Minibatch(
        ONES, 1, replacement="no"
    ),
    "`batch_size` must be an integer of at least 1; got 8.0.": lambda: (
        untyped.Minibatch(ONES, 8.0)
    ),
    "`batch_size` must be an integer; got an array of dtype float64 and shape (2,). "
    "`data` is one pytree: `Minibatch((x, y), batch_size)`.": lambda: untyped.Minibatch(
        ONES, np.ones(2)
    ),
    "`data['x']` is a _Tensor, an array of neither JAX nor NumPy. Convert it first, by "
    "its method `numpy()` or by `numpy.asarray`.": lambda: untyped.Minibatch(
        {"x": _Tensor()}, 1
    ),
    "`train[1]` is a _Tensor, an array of neither JAX nor NumPy. Convert it first, by "
    "its method `numpy()` or by `numpy.asarray`.": lambda: _call(
        "FirstOrder.step", train=(ONES, _Tensor())
    ),
    "`train_loss` must be a function `loss(model, hyperparams, batch, key)`; got "
    "None.": lambda: untyped.Problem(None, _loss),
    "`has_aux` must be True or False; got 'no'.": lambda: untyped.Problem(
        _loss, _loss, "no"
    ),
    "`groups` must be 'coordinates', 'leaves', a dictionary from names to functions, "
    "or a tree of labels; got -1.": lambda: untyped.select_top_k(1, groups=-1),
    "`projection` must be a function of a tree of arrays, such as those of "
    "`optax.projections`; got 0.5.": lambda: untyped.project(0.5),
    "`where` must be a function of the hyperparameters, or `None`; got 'a'.": (
        lambda: untyped.mirror("a")
    ),
    "`learning_rate` must be a number above zero, and finite; got nan.": (
        lambda: untyped.proximal(untyped.L1(0.1), np.nan)
    ),
    "`learning_rate` must be a number above zero, and finite; got 'a'.": (
        lambda: untyped.proximal(untyped.L1(0.1), "a")
    ),
    "`tasks` must be an integer of at least 1; got 2.0.": lambda: _call(
        "MetaLearner", tasks=2.0
    ),
    "`state` is not that of a `MetaLearner`. Make it by `init` of the same one.": (
        lambda: _call("MetaLearner.step", state=_calls()["FirstOrder.step"][1]["state"])
    ),
    "`trials` must be an integer of at least 1; got 'a'.": lambda: _call(
        "search", trials="a"
    ),
    "`low` is above `high`: at coordinate 1 their unconstrained values are 3.0 and "
    "2.0.": lambda: _call("search", low=jnp.array([1.0, 3.0])),
    "`hyperparams['a']` must be finite; got nan.": lambda: _call(
        "FirstOrder.init", hyperparams={"a": np.nan}
    ),
    "`path` must be the path of a file, as a string or a `pathlib.Path`; got 1.": (
        lambda: _call("load", path=1)
    ),
    "`filter_spec` must be a function of a leaf, or a pytree of booleans that is a "
    "prefix of `model`; got a dict.": lambda: untyped.partition([ONES], {}),
}


def _call(name: str, **changed: Any) -> Any:
    fn, kwargs = _calls()[name]
    return fn(**kwargs | changed)


@pytest.mark.parametrize("text", TEXTS)
def test_texts(text):
    with pytest.raises(ValueError) as info:
        TEXTS[text]()
    assert str(info.value) == text


def test_integers_and_flags_of_numpy_are_those_of_python():
    three, yes = np.int64(3), np.bool_(True)
    solver = untyped.Nystrom(three, 0.1, seed=jnp.array(3))
    data = untyped.Minibatch(jnp.ones(5), three, replacement=yes, seed=three)
    choice = untyped.Choice(three, sample=yes, straight_through=yes)
    algorithm = _call("MetaLearner", tasks=three, horizon=three)
    schedule = untyped.Schedule(jnp.ones(2), three)
    for number in (
        solver.rank,
        solver.seed,
        data.batch_size,
        algorithm.tasks,
        algorithm.horizon,
        schedule.every,
        untyped.GroupLasso(0.1, axis=three).axis,
    ):
        assert type(number) is int and number == 3
    for flag in (
        data.replacement,
        choice.straight_through,
        untyped.Problem(_loss, _loss, yes).has_aux,
    ):
        assert flag is True
    assert choice.raw.shape == (3,) and choice.noise is not None
    assert jnp.array_equal(untyped.Positive(three).raw, untyped.Positive(3.0).raw)


def test_what_is_traced_is_not_looked_at():
    """Under `jit` and `vmap`, also where the values would be refused."""

    def make(x):
        box, penalty = untyped.Box(x, jnp.inf), untyped.L1(x)
        placeholders = (
            untyped.Real(x),
            untyped.Switch(x, temperature=x),
            untyped.Real([x, x]),
        )
        seed = x.astype(int)
        data = untyped.Minibatch(jnp.stack([x, x]), 1, replacement=False, seed=seed)
        numbers = untyped.Neumann(1, x), untyped.FiniteDifference(x)
        project = untyped.proximal(untyped.L1(x), x)
        project.update(x, project.init(x), x)
        return jax.tree.leaves((box, penalty, placeholders, data, numbers))

    values = jnp.array([0.1, -1.0, jnp.nan])
    mapped = jax.vmap(make)(values)
    for number, value in enumerate(values):
        leaves = jax.jit(make)(value)
        assert jnp.array_equal(leaves[0], value, equal_nan=True)
        for x, rows in zip(leaves, mapped, strict=True):
            assert jnp.array_equal(x, rows[number], equal_nan=True)
    with pytest.raises(ValueError):
        make(values[2])


@pytest.mark.parametrize(
    "make",
    [
        lambda: untyped.Box(1.0, 0.0),
        lambda: untyped.L1(-1.0),
        lambda: untyped.Real(np.nan),
        lambda: untyped.Choice(3, temperature=-1.0),
        lambda: untyped.Neumann(1, -1.0),
    ],
)
def test_constants_are_looked_at_within_jit_too(make):
    with pytest.raises(ValueError, match="`"):
        jax.jit(lambda x: (x, make())[0])(1.0)


def test_a_box_may_be_open():
    box = untyped.Box(-jnp.inf, 1.0)
    assert jnp.array_equal(
        box.prox(jnp.array([-9.0, 9.0]), 0.1), jnp.array([-9.0, 1.0])
    )


def main():
    start, counts, calls = time.monotonic(), collections.Counter(), 0
    os.chdir(tempfile.mkdtemp())
    for name in NAMES:
        rows = _walk(name)
        calls += len(rows)
        for place, failures in _failures(rows).items():
            print(place, failures, file=sys.stderr)
            kinds = [
                x if x in ("silent", "named") else "foreign" for x in failures.values()
            ]
            counts.update(kinds)
    seconds = time.monotonic() - start
    print(calls, "calls;", dict(counts), f"{seconds:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
