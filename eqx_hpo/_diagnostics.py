"""Compares the hypergradients of several algorithms with the exact one, and their
costs."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jaxtyping import PRNGKeyArray, PyTree

from ._checks import (
    as_int,
    check_key,
    check_one_of,
    check_same_structure,
    check_type,
    shown,
)
from ._custom_types import Batch, Hyperparams, Model
from ._data import AbstractBatches
from ._exact import call_keys, cosine, exact_hypergradient, Reference
from ._misc import as_device_arrays, is_array_or_numpy, tree_norm
from ._optimizer import (
    AbstractAlgorithm,
    AbstractBilevelOptimizer,
    raw_estimate,
)
from ._state import BilevelState


_LARGEST_UNROLL = 32  # inner steps; more take long to compile


class ComparisonRow(eqx.Module):
    """Compares a hypergradient with the exact one, and holds its cost.

    **Attributes:**

    - `name`: the name of the algorithm.
    - `cosine`: the cosine of the angle to the exact hypergradient, over all `raw`
        arrays.
    - `relative_error`: the norm of the difference, divided by the norm of the exact
        hypergradient.
    - `seconds`: the time for each inner step in seconds, as the median over calls of
        `step`.
    - `flops`: the operations of the estimate for each inner step, as XLA counts them
        with the loops over inner steps unrolled. It is NaN for more than 32 inner
        steps. The loop of a linear solver counts as one pass.
    - `temporaries`: the temporary memory of a step in bytes, as planned by XLA.

    `cosine` and `relative_error` are NaN if the step was skipped.
    """

    name: str
    cosine: float
    relative_error: float
    seconds: float
    flops: float
    temporaries: int


class Comparison(eqx.Module):
    """Holds the result of [`eqx_hpo.compare_hypergradients`][]. It prints as a table.

    **Attributes:**

    - `rows`: an [`eqx_hpo.ComparisonRow`][] for each algorithm.
    - `inner_steps`: the number of inner steps of the training.
    - `exact`: the exact hypergradient, in the structure of the hyperparameters. If keys
        or batches differ with the calls, it is the one for the last algorithm.
    """

    rows: tuple[ComparisonRow, ...]
    inner_steps: int
    exact: Hyperparams

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        head = ("cosine", "rel. error", "ms/step", "Mflop/step", "MB")
        lines = [" " * width + "".join(f"{x:>12}" for x in head)]
        for row in self.rows:
            flops = "" if row.flops != row.flops else f"{row.flops / 1e6:.2f}"
            lines.append(
                f"{row.name:{width}}{row.cosine:12.4f}{row.relative_error:12.2e}"
                f"{1e3 * row.seconds:12.3f}{flops:>12}{row.temporaries / 1e6:12.2f}"
            )
        return "\n".join(lines)

    def draw(self) -> Any:
        """Draws cosine, relative error, time and memory. Returns a
        `matplotlib.figure.Figure`."""
        from matplotlib.figure import Figure

        panels = {
            "cosine with the exact one": [row.cosine for row in self.rows],
            "relative error": [row.relative_error for row in self.rows],
            "ms for each inner step": [1e3 * row.seconds for row in self.rows],
            "temporary MB": [row.temporaries / 1e6 for row in self.rows],
        }
        names = [row.name for row in self.rows]
        size = (11, 1.2 + 0.3 * len(names))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for number, (axis, (label, values)) in enumerate(zip(axes, panels.items())):
            axis.barh(names, values, color=f"C{number}", alpha=0.8)
            axis.set_xlabel(label)
            axis.grid(alpha=0.3, axis="x")
        axes[0].invert_yaxis()
        return figure


def compare_hypergradients(
    algorithms: Mapping[str, AbstractBilevelOptimizer]
    | Sequence[AbstractBilevelOptimizer],
    model: Model,
    hyperparams: Hyperparams,
    train: Batch | AbstractBatches,
    val: Batch | AbstractBatches,
    *,
    key: PRNGKeyArray | None,
    inner_opt_state: PyTree = None,
    model_state: PyTree = None,
    reference: Reference = "unrolled",
    repeats: int = 5,
) -> Comparison:
    """Compares the hypergradients of algorithms with the exact one of the same
    training.

    All algorithms train from the same start with the same hyperparameters, which do not
    move. The training has as many inner steps as the largest number that an algorithm
    takes in a call of `step`. An algorithm with fewer takes several calls, and its last
    hypergradient counts. The exact hypergradient is the derivative of the last
    validation loss through all these inner steps, with the batches and the keys that
    the algorithm had.

    Each step is compiled twice, and runs a few more times to measure it.

    **Arguments:**

    - `algorithms`: the algorithms, in a dictionary by name or in a sequence.
    - `model`, `hyperparams`: as for `init`. The comparison starts from them.
    - `train`, `val`: as for `step`.
    - `key`: a PRNG key, or `None` if nothing is random.
    - `inner_opt_state`: the state of the inner optimiser, to start in the middle of a
        training. By default it is fresh.
    - `model_state`: an `eqx.nn.State`, for losses that take one.
    - `reference`: how the exact hypergradient is computed. `"unrolled"` means reverse
        mode through the whole training. `"differences"` means central differences of
        the whole training, with two trainings for each number among the
        hyperparameters. Use them if reverse mode does not fit in memory or the loss has
        no second derivatives. In single precision they have an error of about 1e-3
        themselves.
    - `repeats`: the number of further calls over which the time is taken.

    **Returns:** an [`eqx_hpo.Comparison`][]. `print` it, or `draw` it.

    **Raises:** a `ValueError` if the numbers of inner steps do not fit together, or if
    an algorithm is an [`eqx_hpo.MetaLearner`][] (compare the algorithm that it wraps).
    """
    named = _with_names(algorithms)
    check_key(key)
    repeats = as_int("repeats", repeats, 1)
    check_one_of("reference", reference, get_args(Reference))
    steps = max(algorithm.inner_steps for algorithm in named.values())
    for name, algorithm in named.items():
        _check(name, algorithm, steps)
    exact, references, rows = None, {}, []
    for name, algorithm in named.items():
        state = algorithm.init(
            model, hyperparams, train=train, val=val, model_state=model_state, key=key
        )
        if inner_opt_state is not None:
            like, what = state.inner_opt_state, "the inner optimiser of the algorithms"
            inner_opt_state = as_device_arrays(inner_opt_state)
            check_same_structure("inner_opt_state", inner_opt_state, like, what)
            state = eqx.tree_at(lambda s: s.inner_opt_state, state, inner_opt_state)
        calls = steps // algorithm.inner_steps
        training = (id(algorithm.problem), id(algorithm.inner))
        training = (*training, calls)
        if training not in references:
            keys = call_keys(key, calls)
            references[training] = exact_hypergradient(
                algorithm, state, train, val, (keys, keys), calls, reference
            )
        exact = references[training]
        data = (train, val)
        row = _row(name, algorithm, state, data, key, calls, exact, repeats)
        rows.append(row)
    return Comparison(tuple(rows), steps, exact)


def _with_names(algorithms) -> dict[str, Any]:
    if not isinstance(algorithms, (Mapping, list, tuple)):
        raise ValueError(
            "`algorithms` must be a list of algorithms, or a dictionary from names to "
            f"them; got {shown(algorithms)}. Compare a single one as `[algorithm]`."
        )
    if not isinstance(algorithms, Mapping):
        kinds = [type(x).__name__ for x in algorithms]
        number = lambda i: f" ({kinds[: i + 1].count(kinds[i])})"
        names = [
            kind + (number(i) if kinds.count(kind) > 1 else "")
            for i, kind in enumerate(kinds)
        ]
        algorithms = dict(zip(names, algorithms))
    if len(algorithms) == 0:
        raise ValueError("`algorithms` is empty.")
    return dict(algorithms)


def _check(name: str, algorithm: Any, steps: int) -> None:
    what = "an algorithm for one model; of a `MetaLearner`, compare what it wraps"
    check_type(f"algorithms[{name!r}]", algorithm, AbstractAlgorithm, what)
    if steps % algorithm.inner_steps != 0:
        raise ValueError(
            f"`{name}` takes {algorithm.inner_steps} inner steps in a call, of which "
            f"{steps}, the largest number among the algorithms, is no multiple."
        )


def _row(name, algorithm, state, data, key, calls, exact, repeats) -> ComparisonRow:
    probe = eqx.tree_at(lambda a: a.outer, algorithm, _RECORD)
    raw_state = _RECORD.init(exact)
    state = eqx.tree_at(lambda s: s.outer_opt_state, state, raw_state)
    step = _Step(probe, state, data, key)
    seconds = []
    for call in range(calls + repeats):
        start = time.perf_counter()
        new = jax.block_until_ready(step(state, call))
        seconds.append(time.perf_counter() - start)
        state = new if call < calls else state
    memory = step.compiled.memory_analysis()
    got = state.outer_opt_state
    if int(state.skipped) > 0:
        got = jtu.tree_map(lambda x: jnp.full_like(x, jnp.nan), got)
    error = tree_norm(jtu.tree_map(jnp.subtract, got, exact)) / tree_norm(exact)
    return ComparisonRow(
        name=name,
        cosine=float(cosine(got, exact)),
        relative_error=float(error),
        seconds=statistics.median(seconds[-repeats:]) / algorithm.inner_steps,
        flops=_flops(probe, state, data, key),
        temporaries=0 if memory is None else memory.temp_size_in_bytes,
    )


def _init_record(params: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, params)


def _update_record(
    updates: PyTree, state: PyTree, params: PyTree = None
) -> tuple[PyTree, PyTree]:
    del state, params
    return jtu.tree_map(jnp.zeros_like, updates), updates


# An outer optimiser that moves nothing and keeps the last hypergradient as its state.
_RECORD = optax.GradientTransformation(_init_record, _update_record)


class _Step:
    """Holds the compiled step of an algorithm, as a function of the state and its
    number."""

    def __init__(self, algorithm, state, data, key):
        arrays, self.static = eqx.partition(state, eqx.is_array)
        self.data, static_data = eqx.partition(data, is_array_or_numpy)

        def step(arrays, data, call):
            state = eqx.combine(arrays, self.static)
            train, val = eqx.combine(data, static_data)
            step_key = None if key is None else jr.fold_in(key, call)
            new = algorithm.step(state, train, val, key=step_key)
            return eqx.filter(new, eqx.is_array)

        lowered = jax.jit(step).lower(arrays, self.data, jnp.array(0))
        self.compiled = lowered.compile()

    def __call__(self, state: BilevelState, call: int) -> BilevelState:
        arrays = eqx.filter(state, eqx.is_array)
        new = self.compiled(arrays, self.data, jnp.array(call))
        return eqx.combine(new, self.static)


def _flops(algorithm, state, data, key) -> float:
    """Counts the operations of an estimate with all loops over inner steps unrolled,
    since XLA counts the body of a loop only once."""
    steps = algorithm.inner_steps
    if steps > _LARGEST_UNROLL:
        return float("nan")
    arrays, static = eqx.partition((state, data, key), is_array_or_numpy)

    def estimate(arrays):
        state, (train, val), key = eqx.combine(arrays, static)
        hyperparams = state.hyperparams
        out = raw_estimate(algorithm, state, hyperparams, train, val, key, unroll=steps)
        return eqx.filter(out, eqx.is_array)

    analysis = jax.jit(estimate).lower(arrays).compile().cost_analysis()
    return float((analysis or {}).get("flops", float("nan"))) / steps
