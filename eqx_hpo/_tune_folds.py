"""The recipe in one call: tune on folds of all data, then train once on all of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.random as jr
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._checks import as_flag, as_int, as_share, check_type
from ._custom_types import Hyperparams, Key, Model
from ._data import Minibatch
from ._drive import check_start
from ._fit import fit
from ._folds import folds
from ._hyperparameter import partition_raw
from ._meta import MetaLearner
from ._optimizer import AbstractAlgorithm, AbstractBilevelOptimizer
from ._solution import Solution
from ._state import BilevelState
from ._tune import tune


class FoldsSolution(NamedTuple):
    """The result of [`eqx_hpo.tune_folds`][].

    **Attributes:**

    - `final`: the [`eqx_hpo.Solution`][] of the training on all data. Use its `model`.
        Its `hyperparams` and `values` are the tuned ones.
    - `tuning`: the [`eqx_hpo.Solution`][] of the run on the folds. Its model has a
        leading axis for the folds.
    """

    final: Solution
    tuning: Solution


def tune_folds(
    algorithm: AbstractBilevelOptimizer,
    model: Model,
    hyperparams: Hyperparams,
    data: PyTree[Any],
    *,
    steps: int,
    fit_steps: int,
    key: Key,
    count: int = 5,
    repeats: int = 1,
    batch_size: int | None = None,
    average: float = 0.5,
    progress: bool = True,
    model_state: PyTree = None,
) -> FoldsSolution:
    """Tunes hyperparameters on folds of the data, then trains once more on all of them
    with the tuned values. [Tuning that generalises](../generalisation.md) explains this
    recipe. Each row serves for training and for validation, and the last training
    leaves none out.

    ```python
    outer = optax.chain(hpo.anchor(1 / len(y)), optax.adam(0.1))
    algorithm = hpo.Unrolled(problem, inner, outer, inner_steps=50)
    solution = hpo.tune_folds(
        algorithm, model, hyperparams, (x, y), steps=40, fit_steps=500, key=key
    )
    model = solution.final.model
    ```

    It calls [`eqx_hpo.folds`][], then [`eqx_hpo.tune`][] with an
    [`eqx_hpo.MetaLearner`][] over the folds, then [`eqx_hpo.fit`][] on `data`. Call
    these three yourself if you need more, such as a monitor or a checkpoint.

    **Arguments:**

    - `algorithm`: an algorithm for one model. If there are many hyperparameters, its
        `outer` should begin with an [`eqx_hpo.anchor`][].
    - `model`: the model from which each fold and the last training start.
    - `hyperparams`: the starting hyperparameters, as for `tune`.
    - `data`: all data except the test data, as a pytree of arrays with a common leading
        axis.
    - `steps`: the number of updates of the hyperparameters.
    - `fit_steps`: the number of training steps in the last training.
    - `key`: a PRNG key, or `None` if nothing is random.
    - `count`, `repeats`: the number of folds, and how often to split anew, as for
        [`eqx_hpo.folds`][].
    - `batch_size`: the size of random batches of the train data. By default each
        training step takes all train data. The validation part is always taken as a
        whole.
    - `average`: the share of the recorded steps, counted from the end, over which the
        `raw` arrays are averaged. The last training uses this mean, which has less
        noise than the last values. With 0 it uses the last values.
    - `progress`, `model_state`: as for `tune`.

    **Returns:** an [`eqx_hpo.FoldsSolution`][]. If Ctrl-C or non-finite steps end the
    tuning early, the last training still follows, with the values found so far.
    `tuning.result` says how the tuning ended.

    **Raises:** what `folds`, `tune` and `fit` raise.
    """
    check_start(algorithm, key, None)
    what = "an algorithm for one model, such as `T1T2`"
    check_type("algorithm", algorithm, AbstractAlgorithm, what)
    assert isinstance(algorithm, AbstractAlgorithm)
    steps, fit_steps = as_int("steps", steps, 1), as_int("fit_steps", fit_steps, 1)
    share, progress = as_share("average", average), as_flag("progress", progress)
    train, val = folds(data, count, repeats=repeats, key=key)
    whole = data
    if batch_size is not None:
        whole = Minibatch(data, batch_size)
        train = eqx.filter_vmap(lambda part: Minibatch(part, batch_size))(train)
    learner = MetaLearner(algorithm, count * repeats)
    mean = _Mean((1 - float(share)) * steps)
    keys = (None, None) if key is None else jr.split(key)
    options: Any = dict(progress=progress, model_state=model_state)
    tuning = tune(
        learner,
        model,
        hyperparams,
        train,
        val,
        steps=steps,
        key=keys[0],
        callback=mean,
        **options,
    )
    found = mean.of(tuning.hyperparams)
    # As many training steps as asked for, in the calls that the algorithm makes.
    calls = -(-fit_steps // algorithm.inner_steps)
    final = fit(algorithm, model, found, whole, steps=calls, key=keys[1], **options)
    return FoldsSolution(final, tuning)


class _Mean:
    """A callback that takes the mean of the `raw` arrays over the states after step
    `first`."""

    def __init__(self, first: float):
        self._first, self._count = first, 0
        self._mean: Any = None

    def __call__(self, state: BilevelState) -> None:
        if int(state.step) <= self._first or int(state.skipped) > 0:
            return
        raw, _ = partition_raw(state.hyperparams)
        self._count += 1
        move: Callable[[Any, Any], Any] = lambda old, new: (
            old + (new - old) / self._count
        )
        self._mean = raw if self._count == 1 else jtu.tree_map(move, self._mean, raw)

    def of(self, last: Hyperparams) -> Hyperparams:
        """Replaces the last values by the mean."""
        if self._count == 0:
            return last
        return eqx.combine(self._mean, partition_raw(last)[1])
