"""Black-box baselines: `search` trains afresh with what an Optuna sampler proposes, and
gives the `Solution` that `tune` gives.

All trials are episodes of one run: they share its compiled code, its data and its
history. Between two of them new hyperparameters are put in place.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._checks import (
    as_flag,
    as_int,
    check_function,
    check_same_structure,
    check_type,
    shown,
)
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches, Minibatch
from ._discrete import has_discrete
from ._drive import asks_to_stop, attach_solution, check_start, drive
from ._feed import Feed
from ._hyperparameter import canonical, is_placeholder, partition_raw, Simplex, unwrap
from ._misc import as_device_arrays
from ._optimizer import (
    AbstractAlgorithm,
    AbstractBilevelOptimizer,
    PlainTraining,
)
from ._progress import ProgressBar
from ._run import own_copy, Run, start
from ._solution import RESULTS, Solution
from ._state import BilevelState


_LARGEST = 2**31 - 1
_NEVER = _LARGEST  # a failed trial does not end the run, however long it goes on


def search(
    algorithm: AbstractBilevelOptimizer,
    model: Model,
    low: Hyperparams,
    high: Hyperparams,
    train: Batch | AbstractBatches | Any,
    val: Batch | AbstractBatches | Any,
    *,
    trials: int,
    steps: int,
    key: Key,
    sampler: Literal["random", "tpe"] | Any = "tpe",
    progress: bool = True,
    callback: Callable[[BilevelState], Any] | None = None,
    model_state: PyTree = None,
) -> Solution:
    """Chooses hyperparameters by complete trainings, as a baseline for
    [`eqx_hpo.tune`][]. Needs [Optuna](https://optuna.org):
    `pip install 'eqx_hpo[optuna]'`.

    ```python
    low, high = hpo.Positive(1e-4), hpo.Positive(10.0)
    solution = hpo.search(
        algorithm, model, low, high, train, val, trials=50, steps=1000, key=key
    )
    ```

    **Arguments:**

    - `algorithm`: any [`eqx_hpo.AbstractAlgorithm`][]. Its problem, `inner` and
        `inner_steps` are used: `steps` means as many inner steps here as in `tune`.
    - `model`: the model that each trial starts from.
    - `low`, `high`: the ends of the range of each hyperparameter, two pytrees of the
        structure of `hyperparams` in `tune`. Each coordinate of each `raw` array is one
        parameter of the search, uniform between the two: `Positive` is searched by
        its logarithm, a plain array or `Real` as it is. No coordinate of `low` may be
        above that of `high`; only in a `Simplex`, of which not all entries can be
        lower, each coordinate takes its two ends in whatever order they come.
    - `train`, `val`: the data, as for `tune`. The validation loss is taken once, at the
        end of a trial; on all data where `val` is an [`eqx_hpo.Minibatch`][].
    - `trials`: the number of trainings.
    - `steps`: of each, in calls of `algorithm.step`.
    - `key`: a PRNG key, or `None` if nothing is random. It seeds the sampler too.
    - `sampler`: `"random"`, `"tpe"` (tree-structured Parzen estimator), or a sampler of
        `optuna.samplers` for continuous parameters.
    - `progress`: whether to show the progress, as in `tune`.
    - `callback`: called as `callback(state)` after each trial; the search stops if it
        returns `True`.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.

    **Returns:** a [`eqx_hpo.Solution`][] with the model, the hyperparameters and the
    `state` of the best trial, which `tune` can go on from. `history` has one record for
    each trial, in their order, with `step` the number of steps so far. A trial that
    ends in steps that are not finite has failed, with NaN as its validation loss, and
    `RESULTS.nonfinite` says that all have. The validation loss of the best trial is
    `state.metrics.val_loss`. Ctrl-C ends the search with the best so far.

    **Raises:** an `ImportError` without Optuna; a `ValueError` if the ranges do not
    match, are empty, not finite or upside down, if hyperparameters are discrete, or if
    an option is out of range. An exception of the callback or of an iterator has the
    best trial so far as its attribute `solution`.
    """
    check_start(algorithm, key, None)
    what = "an algorithm for one model, such as `T1T2`"
    check_type("algorithm", algorithm, AbstractAlgorithm, what)
    assert isinstance(algorithm, AbstractAlgorithm)
    trials, steps = as_int("trials", trials, 1), as_int("steps", steps, 1)
    progress = as_flag("progress", progress)
    if callback is not None:
        check_function("callback", callback, "a function of the state, or `None`")
    space = _Space(canonical(low, "low"), canonical(high, "high"))
    study = _Study(sampler, key)
    trainer = _make_trainer(algorithm, steps, trials)
    whole = val.data if isinstance(val, Minibatch) else val
    feeds = Feed(train, "train", trainer.inner_steps), Feed(whole, "val", None)
    state = start(trainer, model, space.low, *feeds, key, None, model_state)
    like = algorithm.init(
        model, space.low, train=feeds[0].peek(), model_state=model_state, key=key
    )
    run = Run(trainer, *feeds, key, state, steps, _NEVER)
    best, result = None, RESULTS.successful
    join = lambda result: _join(
        algorithm, run.finish(result), result, best, like, study
    )
    try:
        with ProgressBar(trials * steps, progress, tunes=False) as bar:
            for number in range(1, trials + 1):
                trial = study.ask(space)
                run.restart(model, model_state, space.place(trial.params))
                result = drive(run, number * steps, [], [], bar, donate=True)
                if result != RESULTS.successful:
                    break
                if study.tell(trial, run.state):
                    best = own_copy(run.state, run.state)
                if callback is not None and asks_to_stop(
                    callback, own_copy(run.state, run.state)
                ):
                    result = RESULTS.stopped
                    break
    except KeyboardInterrupt:
        result = RESULTS.interrupted
    except Exception as e:
        if best is not None and run.is_alive():
            attach_solution(e, lambda: join(RESULTS.failed))
        raise
    return join(result)


def _make_trainer(
    algorithm: AbstractAlgorithm, steps: int, trials: int
) -> PlainTraining:
    inner_steps = trials * steps * algorithm.inner_steps
    if inner_steps > _LARGEST:
        raise ValueError(
            f"`trials` and `steps` make {inner_steps} inner steps in all, but only "
            f"{_LARGEST} can be counted. Lower one of them."
        )
    return PlainTraining(
        algorithm.problem,
        algorithm.inner,
        inner_steps=algorithm.inner_steps,
        unroll=algorithm.unroll,
        validate_every=steps,
    )


class _Space:
    """The box that is searched, coordinate by coordinate."""

    def __init__(self, low: Hyperparams, high: Hyperparams):
        check_same_structure("high", high, low, "`low`")
        if has_discrete(low):
            raise ValueError(
                "`low` holds relaxed discrete hyperparameters, which `search` cannot "
                "vary. Take them out, and call `search` for each choice."
            )
        self.low = low
        raw, self._constants = partition_raw(low)
        high_raw, constants = partition_raw(high)
        if not eqx.tree_equal(self._constants, constants):
            raise ValueError(
                "`low` and `high` must have the same constants, such as the bounds of "
                f"an `Interval`; got {self._constants} and {constants}."
            )
        leaves, self._treedef = jtu.tree_flatten_with_path(raw)
        others = jtu.tree_leaves(high_raw)
        in_any_order = _paths_of_simplices(low)
        self._shapes, self.ranges = [], {}
        for (path, x), y in zip(leaves, others, strict=True):
            self._shapes.append((x.shape, x.dtype))
            ends = np.stack([x, y]).reshape(2, -1).T.tolist()
            name = jtu.keystr(path)
            for i, pair in enumerate(ends):
                if pair[0] > pair[1] and name not in in_any_order:
                    raise ValueError(
                        f"`low{name}` is above `high{name}`: at coordinate {i} their "
                        f"unconstrained values are {pair[0]} and {pair[1]}."
                    )
                self.ranges[f"{name}[{i}]"] = (min(pair), max(pair))
        if len(self.ranges) == 0:
            raise ValueError("`low` holds no hyperparameters to search for.")

    def place(self, params: dict[str, float]) -> Hyperparams:
        """Makes the hyperparameters that have the coordinates of a trial."""
        numbers = iter([params[name] for name in self.ranges])
        leaves = []
        for shape, dtype in self._shapes:
            flat = [next(numbers) for _ in range(math.prod(shape))]
            leaves.append(jnp.asarray(flat, dtype).reshape(shape))
        return eqx.combine(jtu.tree_unflatten(self._treedef, leaves), self._constants)


def _paths_of_simplices(hyperparams: Hyperparams) -> set[str]:
    nodes = jtu.tree_leaves_with_path(hyperparams, is_leaf=is_placeholder)
    return {f"{jtu.keystr(path)}.raw" for path, x in nodes if isinstance(x, Simplex)}


class _Study:
    """Optuna's study, and the best validation loss so far."""

    def __init__(self, sampler: Any, key: Key):
        self._optuna = _import_optuna()
        samplers = self._optuna.samplers
        seed = 0 if key is None else int(jr.randint(key, (), 0, 2**31 - 1))
        if isinstance(sampler, str) and sampler == "random":
            sampler = samplers.RandomSampler(seed)
        elif isinstance(sampler, str) and sampler == "tpe":
            sampler = samplers.TPESampler(seed=seed)
        elif not isinstance(sampler, samplers.BaseSampler):
            raise ValueError(
                "`sampler` must be 'random', 'tpe' or a sampler of `optuna.samplers`; "
                f"got {shown(sampler)}."
            )
        verbosity = self._optuna.logging.get_verbosity()
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._study = self._optuna.create_study(sampler=sampler)
        self._optuna.logging.set_verbosity(verbosity)
        self.best_loss, self.best = math.inf, 0
        self.failed: list[bool] = []  # of each trial

    def ask(self, space: _Space) -> Any:
        new = self._optuna.distributions.FloatDistribution
        return self._study.ask({name: new(*x) for name, x in space.ranges.items()})

    def tell(self, trial: Any, state: BilevelState) -> bool:
        """Takes the state at the end of a trial; tells whether it is the best."""
        self.failed.append(bool(state.skipped > 0))
        if self.failed[-1]:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            return False
        loss = float(state.metrics.val_loss)
        self._study.tell(trial, loss)
        if loss >= self.best_loss:
            return False
        self.best_loss, self.best = loss, len(self.failed)
        return True


def _import_optuna() -> Any:
    try:
        import optuna
    except ImportError as e:
        raise ImportError(
            "`search` needs Optuna: `pip install 'eqx_hpo[optuna]'`."
        ) from e
    return optuna


def _join(
    algorithm: AbstractAlgorithm,
    last: Solution,
    result: Any,
    best: BilevelState | None,
    like: BilevelState,
    study: _Study,
) -> Solution:
    """Puts the best trial in the place of the last one, in a state that `tune`
    takes. `result` tells how the search ended."""
    tried, failed = len(study.failed), sum(study.failed)
    # Without the row of a trial that was cut short.
    history = jtu.tree_map(lambda x: x[:tried], last.history)
    val_loss = np.where(study.failed, np.nan, history.val_loss)
    message = f"Best of {tried} trials: number {study.best}, validation loss "
    message += f"{study.best_loss:.4g}."
    if failed > 0:
        message += f" Trials that were not finite: {failed}."
    if best is None:
        if result == RESULTS.successful:
            result = RESULTS.nonfinite
        best, message = last.state, f"No trial was completed: {failed} failed."
    if result != RESULTS.successful:
        message = f"{RESULTS[result]} {message}"
    outer_opt_state = algorithm.outer.init(partition_raw(best.hyperparams)[0])
    # No `aux`: that of `val` as a whole may have another shape.
    diagnostics = like.metrics.diagnostics
    metrics = dataclasses.replace(best.metrics, aux=None, diagnostics=diagnostics)
    state = dataclasses.replace(
        best,
        outer_opt_state=as_device_arrays(outer_opt_state),
        memory=like.memory,
        metrics=metrics,
    )
    return dataclasses.replace(
        last,
        model=best.model,
        hyperparams=best.hyperparams,
        values=unwrap(best.hyperparams),
        history=dataclasses.replace(history, val_loss=val_loss),
        result=result,
        state=state,
        message=message,
    )
