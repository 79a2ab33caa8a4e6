"""Evolution strategies, which compare the validation values of trainings at noisy
hyperparameters."""

import functools as ft
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from .._checks import as_int, as_number, check_one_of
from .._custom_types import Batch, Hyperparams, InnerOptimiser, Through
from .._levels import Levels
from .._misc import as_single, match_types, tree_add
from .._problem import Problem
from .._second_order import AbstractSecondOrder, ReverseOverReverse
from .._state import Estimate, InnerState, Memory
from .base import AbstractAlgorithm


Estimator = Literal["noise_reuse", "persistent", "antithetic"]


class EvolutionReport(eqx.Module):
    """Reports the failed pairs of [`eqx_hpo.Evolution`][] in a step. It is found in
    `state.metrics.diagnostics`.

    **Attributes:**

    - `failed`: the number of pairs that were left out because a validation value or the
        weights of a copy were not finite.
    """

    failed: Int[Array, ""]


class Evolution(AbstractAlgorithm):
    r"""Estimates the hypergradient from validation values alone. It trains $N$ `pairs`
    of copies of the model at the `raw` hyperparameters $\lambda \pm \epsilon_i$ with
    $\epsilon_i \sim \mathcal{N}(0, s^2 I)$. It compares their validation values after
    the `inner_steps` of a call:

    $$\frac{dC_2}{d\lambda} \approx \frac{1}{2 N s^2} \sum_{i=1}^{N} \xi_i \,
    \big( C_2^{(+i)} - C_2^{(-i)} \big).$$

    This estimates the slope of a smoothed objective, the mean of $C_2$ over noise of
    scale $s$. It needs no derivative of the validation loss or of training. `val_loss`
    may be an accuracy, an F1 score or the outcome of a simulator. Training may stop
    early or be chaotic. The error grows with the number of hyperparameters, so use it
    for few of them.

    The `estimator` says what happens to the copies between calls:

    - `"noise_reuse"` (NRES): the copies keep training, with one $\epsilon_i$ for a
        whole episode, and $\xi_i = \epsilon_i$. The estimate is unbiased over the whole
        episode, and the least noisy of the three.
    - `"persistent"` (PES): the copies keep training, with a new $\epsilon_i$ in each
        call. $\xi_i$ is the sum of all of these since the episode began. The estimate
        is unbiased too.
    - `"antithetic"`: the copies start from the model in each call, and none are held
        between calls. The estimate sees no further than `inner_steps`, and is biased as
        that of [`eqx_hpo.T1T2`][] is.

    Episodes begin with `init` and with each `restart`. `state.model` is trained without
    noise, beside the pairs. All trainings see the same batches and keys. The pairs are
    the leading axis of the arrays in `state.memory.episode`, which may be split over
    devices. Memory is $O(N (P + H))$.

    A pair that fails is left out, and starts anew from the model. An
    [`eqx_hpo.EvolutionReport`][] counts these pairs. If all pairs fail at once, the
    step is skipped and no pair starts anew: use a smaller `scale` or a `restart` then.
    The outer update gets the standard error over the pairs, for [`eqx_hpo.gate`][].

    ??? cite "References"

        Vicol, Metz and Sohl-Dickstein, *Unbiased Gradient Estimation in Unrolled
        Computation Graphs with Persistent Evolution Strategies*, ICML 2021 (PES). Li et
        al., *Noise-Reuse in Online Evolution Strategies*, NeurIPS 2023 (NRES).
    """

    problem: Problem
    inner: InnerOptimiser
    outer: optax.GradientTransformation
    inner_steps: int = eqx.field(static=True, kw_only=True)
    pairs: int = eqx.field(static=True, kw_only=True, default=8)
    scale: Float[Array, ""] = eqx.field(
        kw_only=True,
        default=0.1,
        converter=ft.partial(as_number, "scale", zero=False),
    )
    estimator: Estimator = eqx.field(static=True, kw_only=True, default="noise_reuse")
    unroll: int | None = eqx.field(static=True, kw_only=True, default=None)
    second_order: ClassVar[AbstractSecondOrder] = ReverseOverReverse()  # never used
    through: ClassVar[Through] = "differences"
    sees_raw: ClassVar[bool] = True
    val_at_each_step: ClassVar[bool] = False

    def __check_init__(self):
        as_int("pairs", self.pairs, 1)
        options = ("noise_reuse", "persistent", "antithetic")
        check_one_of("estimator", self.estimator, options)

    def init_memory(
        self, inner: InnerState, hyperparams: Hyperparams, batch: Batch
    ) -> Memory:
        del batch
        if self.estimator == "antithetic":
            return Memory()
        noise = jtu.tree_map(jnp.zeros_like, self._repeated(hyperparams, ()))
        return Memory(episode=(self._repeated(inner, (2,)), noise))

    def init_diagnostics(self) -> EvolutionReport:
        return EvolutionReport(jnp.zeros((), int))

    def estimate(
        self,
        levels: Levels,
        inner: InnerState,
        hyperparams: Hyperparams,
        memory: Memory,
    ) -> Estimate:
        last = jnp.asarray(self.inner_steps - 1)
        drawn = self._draw(levels.algorithm_key(last), hyperparams)
        if self.estimator == "antithetic":
            copies, noise, weight = self._repeated(inner, (2,)), drawn, drawn
        else:
            copies, old = memory.episode
            noise, weight = self._noise(drawn, old)

        def train(state, sign, noise):
            move = lambda x, e: x + sign.astype(x.dtype) * e
            moved = levels.unwrap(jtu.tree_map(move, hyperparams, noise))
            end, _ = levels.run(state, moved, 0, self.inner_steps)
            return match_types(end, state), levels.validate(end, moved, last)[0]

        signs = jnp.array([1.0, -1.0])
        of_pair = lambda pair, noise: eqx.filter_vmap(
            train, in_axes=(eqx.if_array(0), 0, None)
        )(pair, signs, noise)
        copies, values = eqx.filter_vmap(of_pair)(copies, noise)
        plain = levels.unwrap(hyperparams)
        inner, train_report = levels.run(inner, plain, 0, self.inner_steps)
        is_good = jnp.isfinite(values).all(axis=1) & _are_finite(copies, inner)
        mean, error = self._slope(values, weight, is_good)
        if self.estimator != "antithetic":
            fresh = self._repeated(inner, (2,)), jtu.tree_map(jnp.zeros_like, weight)
            memory = Memory(episode=_choose(is_good, (copies, weight), fresh))
        return Estimate(
            inner=inner,
            memory=memory,
            hypergradient=match_types(mean, hyperparams),
            train=train_report,
            val=levels.validate(inner, plain, last),
            diagnostics=EvolutionReport(jnp.sum(~is_good)),
            error=error,
        )

    def _repeated(self, tree: PyTree, axes: tuple[int, ...]) -> PyTree:
        """Adds an axis for the pairs, and further axes, to all arrays."""
        repeat = lambda x: jnp.broadcast_to(x, (self.pairs, *axes, *x.shape))
        return jtu.tree_map(lambda x: repeat(x) if eqx.is_array(x) else x, tree)

    def _draw(self, key: PRNGKeyArray, hyperparams: Hyperparams) -> PyTree:
        """Draws new noise for each pair."""
        leaves, treedef = jtu.tree_flatten(hyperparams)
        draw = lambda i, x: (
            self.scale.astype(x.dtype)
            * jr.normal(jr.fold_in(key, i), (self.pairs, *x.shape), x.dtype)
        )
        return treedef.unflatten([draw(i, x) for i, x in enumerate(leaves)])

    def _noise(self, drawn: PyTree, old: PyTree) -> tuple[PyTree, PyTree]:
        """Makes the noise of this call, and $\\xi$, from the noise so far. A pair whose
        noise is zero has just started."""
        if self.estimator == "persistent":
            return drawn, tree_add(old, drawn)
        is_set = [jnp.any(x != 0, axis=_rest(x)) for x in jtu.tree_leaves(old)]
        none = jnp.zeros(self.pairs, bool)
        noise = _choose(~_all([~x for x in [none, *is_set]]), old, drawn)
        return noise, noise

    def _slope(
        self,
        values: Float[Array, "pairs 2"],
        weight: PyTree,
        is_good: Bool[Array, " pairs"],
    ) -> tuple[PyTree, PyTree]:
        """Computes the mean over the good pairs, and its standard error."""
        count = jnp.sum(is_good)
        difference = jnp.where(is_good, values[:, 0] - values[:, 1], 0)
        factor = difference / (2 * self.scale**2)
        weight = jtu.tree_map(as_single, weight)
        along = lambda f, x: jnp.tensordot(f.astype(x.dtype), x, axes=1)
        mean = jtu.tree_map(lambda x: along(factor, x) / count.astype(x.dtype), weight)
        if self.pairs == 1:
            return mean, None

        def error(x, mean):
            square = along(factor**2, x**2) / count.astype(x.dtype) - mean**2
            return jnp.sqrt(jnp.maximum(square, 0) / (count - 1).astype(x.dtype))

        return mean, jtu.tree_map(error, weight, mean)


Evolution.__init__.__doc__ = r"""**Arguments:** besides those of
[`eqx_hpo.AbstractAlgorithm`][], and without `second_order`,

- `pairs`: the number $N$ of pairs, at least 1. Each pair costs two trainings.
- `scale`: the standard deviation $s$ of the noise, above zero, in the units of the
    `raw` arrays. It should change the validation value by more than the noise of this
    value.
- `estimator`: `"noise_reuse"`, `"persistent"` or `"antithetic"`.
"""


def _rest(x: Array) -> tuple[int, ...]:
    """Returns all axes except that of the pairs."""
    return tuple(range(1, x.ndim))


def _are_finite(copies: InnerState, inner: InnerState) -> Bool[Array, " pairs"]:
    """Tells for each pair whether all numbers of both copies are finite, or are an
    infinity that the model has in the same place."""
    pairs = zip(
        jtu.tree_leaves(eqx.filter(copies, eqx.is_inexact_array)),
        jtu.tree_leaves(eqx.filter(inner, eqx.is_inexact_array)),
        strict=True,
    )
    kept = [jnp.all(jnp.isfinite(x) | (x == y), axis=_rest(x)) for x, y in pairs]
    return _all(kept)


def _all(flags: list[Bool[Array, " pairs"]]) -> Bool[Array, " pairs"]:
    """Joins flags behind barriers. Otherwise XLA would copy a chain of `and`s into each
    selection that reads its end, and compile times would grow with the square of the
    number of arrays."""
    stacked = lax.optimization_barrier(jnp.stack(flags))
    return lax.optimization_barrier(jnp.all(stacked, axis=0))


def _choose(is_good: Bool[Array, " pairs"], true: PyTree, false: PyTree) -> PyTree:
    def choose(x: Any, y: Any):
        if not eqx.is_array(x):
            return x
        return jnp.where(is_good.reshape(-1, *[1] * (x.ndim - 1)), x, y)

    return jtu.tree_map(choose, true, false)
