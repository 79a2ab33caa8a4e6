"""Black-box baselines: `search` trains models at hyperparameters that an Optuna sampler
proposes, and returns a `Solution` as `tune` does.

Trials run in rounds, and all trials of a round run side by side. All rounds share
compiled code and data. Optuna's study records the trials. Of their states only the best
one is kept.
"""

import dataclasses
import math
import signal
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ._callbacks import CallbackArgument, Callbacks
from ._checks import as_flag, as_int, check_type, MOST_STEPS
from ._custom_types import Batch, Hyperparams, Key, Model
from ._data import AbstractBatches, Minibatch
from ._drive import attach_solution, check_start
from ._feed import Feed, make_feeds
from ._hyperparameter import partition_raw, unwrap
from ._misc import as_device_arrays
from ._optimizer import (
    AbstractAlgorithm,
    AbstractBilevelOptimizer,
    PlainTraining,
    warn_if_same,
)
from ._progress import ProgressBar
from ._pruning import AbstractPruning, make_pruning
from ._rounds import recorded, Rounds
from ._signals import catch_signals
from ._solution import History, RESULTS, Solution
from ._space import Space
from ._state import BilevelState
from ._study import Study


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
    sampler: Literal["random", "tpe", "gp"] | Any = "tpe",
    parallel: int = 1,
    pruner: Literal["halving"] | Any = None,
    report_every: int | None = None,
    storage: Any = None,
    study_name: str = "search",
    progress: bool = True,
    callback: CallbackArgument = None,
    model_state: PyTree = None,
) -> Solution:
    """Searches for hyperparameters by complete trainings, as a baseline for
    [`eqx_hpo.tune`][]. It needs [Optuna](https://optuna.org):
    `pip install 'eqx_hpo[optuna]'`.

    ```python
    low, high = hpo.Positive(1e-4), hpo.Positive(10.0)
    solution = hpo.search(
        algorithm, model, low, high, train, val, trials=50, steps=1000, key=key
    )
    ```

    **Arguments:**

    - `algorithm`: any [`eqx_hpo.AbstractAlgorithm`][]. The search uses its problem,
        `inner` and `inner_steps`, so `steps` stands for as many inner steps as in
        `tune`.
    - `model`: the model from which each trial starts.
    - `low`, `high`: the two ends of the range of each hyperparameter, as pytrees of the
        structure of `hyperparams` in `tune`. Each coordinate of each `raw` array is one
        parameter of the search and is uniform between its two ends. So a `Positive` is
        searched on a logarithmic scale, and a `Real` or a plain array on a linear one.
        No coordinate of `low` may be above that of `high`. A `Simplex` is the
        exception, since not all of its entries can be lower: there the two ends may
        come in any order. Discrete hyperparameters are searched over their discrete
        values, and the losses see these. An [`eqx_hpo.Integer`][] ranges from `low` to
        `high`, both included. All options of an [`eqx_hpo.Choice`][] and both positions
        of an [`eqx_hpo.Switch`][] are candidates, whatever their logits.
    - `train`, `val`: the data, as for `tune`. The validation loss is taken at the end
        of a trial and where `pruner` asks for it. If `val` is an
        [`eqx_hpo.Minibatch`][], it is taken on all of its data. All trials that train
        side by side get the same batches of an iterator.
    - `trials`: the number of trainings. There are fewer if `sampler` runs out of
        proposals, as a grid does.
    - `steps`: the length of each training, in calls of `algorithm.step`.
    - `key`: a PRNG key, or `None` if nothing is random. It seeds the sampler too.
    - `sampler`: `"random"`, `"tpe"` (tree-structured Parzen estimator), `"gp"`
        (Gaussian process; needs SciPy and PyTorch), or a sampler of `optuna.samplers`.
    - `parallel`: the number of trials to train side by side, as one compiled program
        that holds all of their states in memory. Each trial has the keys and the
        batches that it would have alone. So `"random"` finds the same for any number,
        up to rounding errors, which a long training may amplify. The other samplers
        learn from the results of a round when the round has ended.
    - `pruner`: a rule that ends bad trials early; by default no trial ends early.
        `"halving"` (successive halving) repeatedly lets the best third of the trials of
        a round continue for three times the steps, until the remaining ones have taken
        `steps`. The more trials a round has, the earlier is the first cut: with 9
        trials it comes after a ninth of `steps`, with 81 after an 81st. A pruner of
        `optuna.pruners` sees the validation loss of each trial after every
        `report_every` steps, and decides. A pruner that only looks at completed trials
        ends none in the first round. Once enough trials of a round have ended, a
        smaller program takes over.
    - `report_every`: the number of steps between two questions to a pruner of Optuna. A
        tenth of `steps` by default.
    - `storage`: where Optuna keeps the trials: the URL of a database, such as
        `"sqlite:///search.db"`, or a storage of `optuna.storages`. The same call then
        continues where an earlier one ended or was killed, and `trials` is the total
        number. It first trains the best trial so far again. The data must be arrays or
        [`eqx_hpo.Minibatch`][]. Only one process at a time may use a study.
    - `study_name`: the name of the study in `storage`.
    - `progress`: whether to show the progress, as for `tune`.
    - `callback`: a function that is called as `callback(state)` after each trial. If it
        returns something true or raises an exception, the search stops at the end of
        the round. A list of functions calls them all.
    - `model_state`: an `eqx.nn.State`, for losses that take and return one.

    **Returns:** an [`eqx_hpo.Solution`][] with the model, the hyperparameters and the
    `state` of the best trial. `tune` can continue from this state. The validation loss
    of the best trial is `state.metrics.val_loss`. Discrete hyperparameters in it are
    straight-through, and `discretised` is `None`.

    `history` has one record for each trial, in their order. Its `step` is the number of
    steps that the trial took. A trial fails if it ends in non-finite steps: its
    validation loss is then NaN. A pruned trial has the validation loss that was taken
    last, and is never the best. `message` counts the failed and the pruned trials, and
    the steps.

    `RESULTS.nonfinite` says that no trial was completed. The solution then holds
    `model` and `low`. Ctrl-C and SIGTERM end the search with the best trial so far. So
    does an exception of the callback: it is reported as a warning, as
    `RESULTS.callback_failed` and as `exception` of the solution.

    **Raises:** an `ImportError` if Optuna is missing, or a package that `sampler`
    needs. A `ValueError` if the ranges do not match, are empty, not finite or upside
    down, if the study in `storage` has other ranges, `steps` or `key`, or if an option
    is out of range. An exception of an iterator has the best trial so far as its
    attribute `solution`.
    """
    check_start(algorithm, key, None)
    what = "an algorithm for one model, such as `T1T2`"
    check_type("algorithm", algorithm, AbstractAlgorithm, what)
    assert isinstance(algorithm, AbstractAlgorithm)
    trials, steps = as_int("trials", trials, 1), as_int("steps", steps, 1)
    parallel, progress = as_int("parallel", parallel, 1), as_flag("progress", progress)
    callbacks = Callbacks(callback)
    space = Space(low, high)
    pruning = make_pruning(pruner, steps, parallel, report_every)
    trainer = _make_trainer(algorithm, steps, trials)
    whole = val.data if isinstance(val, Minibatch) else val
    feeds = make_feeds(trainer, train, whole)
    warn_if_same(*[feed.peek() for feed in feeds])
    if storage is not None:
        _check_repeatable(*feeds)
    study = Study(space, sampler, pruner, key, steps, storage, study_name)
    like = algorithm.init(
        model, space.low, train=feeds[0].peek(), model_state=model_state, key=key
    )
    rounds_left = math.ceil(max(0, trials - study.finished) / parallel)
    total = (rounds_left + (study.best is not None)) * steps
    with (
        ProgressBar(total, 0, progress, tunes=False) as bar,
        catch_signals((signal.SIGTERM,)) as asked,
    ):
        start = (model, space.low, *feeds, key, model_state)
        rounds = Rounds(trainer, *start, parallel, bar, asked)
        loop = _Loop(rounds, study, pruning, callbacks)
        try:
            result = loop.run(trials, parallel)
        except Exception as e:
            if loop.best is not None:
                failed = RESULTS.failed
                attach_solution(e, lambda: _join(algorithm, loop, failed, like))
            raise
    return _join(algorithm, loop, result, like)


def _make_trainer(
    algorithm: AbstractAlgorithm, steps: int, trials: int
) -> PlainTraining:
    inner_steps = trials * steps * algorithm.inner_steps
    if inner_steps > MOST_STEPS:
        raise ValueError(
            f"`trials` and `steps` make {inner_steps} inner steps in all, but only "
            f"{MOST_STEPS} can be counted. Lower one of them."
        )
    return PlainTraining(
        algorithm.problem,
        algorithm.inner,
        due=jnp.asarray(steps),
        validate_every=steps,
        inner_steps=algorithm.inner_steps,
        unroll=algorithm.unroll,
    )


def _check_repeatable(train: Feed, val: Feed) -> None:
    for name, feed in (("train", train), ("val", val)):
        if not feed.is_static:
            raise ValueError(
                f"`{name}` is an iterator. With `storage` it must be arrays or a "
                "`Minibatch`, so that the best trial can be trained again."
            )


class _Loop:
    """Runs the search round after round. `best` is the state of the best trial so
    far."""

    def __init__(
        self,
        rounds: Rounds,
        study: Study,
        pruning: AbstractPruning,
        callbacks: Callbacks,
    ):
        self.rounds, self.study, self.pruning = rounds, study, pruning
        self.callbacks, self._reason = callbacks, RESULTS.successful
        self.best: BilevelState | None = None

    def run(self, trials: int, parallel: int) -> Any:
        """Runs rounds until `trials` trials are finished. Returns an item of
        `RESULTS`."""
        study, result = self.study, RESULTS.successful
        try:
            if study.best is not None:
                result = self._train_again(study.best)
            goes_on = lambda: study.finished < trials and not study.is_exhausted
            while result == RESULTS.successful and goes_on():
                result = self._round(min(parallel, trials - study.finished))
        except KeyboardInterrupt:
            result = RESULTS.interrupted
        return result

    def _train_again(self, number: int) -> Any:
        """Trains the best trial of an earlier call again, since its state was not
        kept."""
        (params,) = [x.params for x in self.study.trials() if x.number == number]
        self.rounds.begin(self.study.space.raw([params]), [number])
        result = self.rounds.advance(self.pruning.rungs[-1])
        if result == RESULTS.successful:
            self.best = self.rounds.state(0)
        return result

    def _round(self, count: int) -> Any:
        trials = self.study.ask(count)
        params = [trial.params for trial in trials]
        numbers = [trial.number for trial in trials]
        self.rounds.begin(self.study.space.raw(params), numbers)
        alive = dict(enumerate(trials))  # by their row
        for step in self.pruning.rungs:
            result = self.rounds.advance(step)
            if result != RESULTS.successful:
                return result
            alive = self._judge(alive, step)
            if len(alive) == 0:
                break
        return self._reason

    def _judge(self, alive: dict[int, Any], step: int) -> dict[int, Any]:
        """Ends the trials that are pruned, and returns the others."""
        report = self.rounds.report()
        losses = np.where(report.has_failed, np.nan, report.val_loss)
        done = step == self.pruning.rungs[-1]
        trials, rows = list(alive.values()), list(alive)
        if done:
            going_on = [False] * len(trials)
        else:
            going_on = self.pruning.go_on(trials, losses[rows], step)
        for row, trial, goes_on in zip(rows, trials, going_on, strict=True):
            if goes_on:
                continue
            facts = {
                "steps": step,
                "train_loss": float(report.train_loss[row]),
                "skipped": int(report.skipped[row]),
            }
            self._end(row, trial, float(losses[row]), facts, done)
        left = {row: x for row, x, goes_on in zip(rows, trials, going_on) if goes_on}
        return self._shrink(left, len(losses))

    def _end(
        self, row: int, trial: Any, loss: float, facts: dict[str, Any], done: bool
    ) -> None:
        if self.study.tell(trial, loss, facts, done):
            self.best = self.rounds.state(row)
        if self.callbacks:
            # The other trials of the round are not in vain: it comes to its end.
            reason = self.callbacks.call(self.rounds.state(row))
            self._reason = self._reason if reason is None else reason

    def _shrink(self, alive: dict[int, Any], size: int) -> dict[int, Any]:
        """Switches to a smaller program if one can hold the remaining trials."""
        fitting = [x for x in self.pruning.sizes if len(alive) <= x < size]
        if len(alive) == 0 or len(fitting) == 0:
            return alive
        self.rounds.keep(list(alive), min(fitting))
        return dict(enumerate(alive.values()))


def _join(
    algorithm: AbstractAlgorithm, loop: _Loop, result: Any, like: BilevelState
) -> Solution:
    """Makes the solution of the best trial, with a state that `tune` accepts. `result`
    says how the search ended."""
    last, study = loop.rounds.finish(result), loop.study
    history = _make_history(loop, last.history)
    message = _describe(loop, history)
    if loop.best is None and study.count("FAIL") > 0 and result == RESULTS.successful:
        result = RESULTS.nonfinite
    if result != RESULTS.successful:
        message = f"{RESULTS[result]} {message}"
    message += loop.callbacks.describe()
    best = loop.rounds.fresh if loop.best is None else loop.best
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
        history=history,
        result=result,
        state=state,
        message=message,
        exception=loop.callbacks.exception,
    )


def _make_history(loop: _Loop, last: History) -> History:
    trials, study = loop.study.trials(), loop.study
    facts = [study.facts(trial) for trial in trials]
    column = lambda name, like: np.array([x[name] for x in facts], like.dtype)
    raw = study.space.raw([trial.params for trial in trials])
    hyperparams = jax.device_get(recorded(loop.rounds.fresh, raw))
    return dataclasses.replace(
        last,
        step=column("steps", last.step),
        train_loss=column("train_loss", last.train_loss),
        val_loss=column("val_loss", last.val_loss),
        hypergradient_norm=np.zeros(len(trials), last.hypergradient_norm.dtype),
        skipped=column("skipped", last.skipped),
        hyperparams=hyperparams,
    )


def _describe(loop: _Loop, history: History) -> str:
    study, full = loop.study, loop.pruning.rungs[-1]
    failed, pruned = study.count("FAIL"), study.count("PRUNED")
    if loop.best is None or study.best is None:
        text = f"No trial was completed: {failed} failed."
    else:
        text = f"Best of {study.finished} trials: number {study.best + 1}, "
        text += f"validation loss {study.best_loss:.4g}."
    if pruned > 0:
        text += f" Trials that were pruned: {pruned}, so that {history.step.sum()} of "
        text += f"{full * study.finished} steps were taken."
    if failed > 0 and loop.best is not None:
        text += f" Trials that were not finite: {failed}."
    return text
