"""Greedy subset selection: an update moves only the most promising hyperparameters."""

import math
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree, UInt32

from .._checks import as_share, check_one_of, shown
from .._discrete import Choice
from .._misc import tree_norm
from .top_k import top_k_masks
from .update import beside_updates


class SelectState(NamedTuple):
    """Holds where the next turn starts, if some hyperparameters are taken in turn."""

    turn: UInt32[Array, ""]


class _Unit(NamedTuple):
    """Says what is ranked: of the leaves with these numbers, each entry by itself, each
    row of the last axis, or all together."""

    leaves: list[int]
    kind: Literal["entries", "rows", "whole"]


def select_top_k(
    k: int | float,
    *,
    by: str = "gradient",
    groups: Any = "coordinates",
    rotate: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Passes on the updates of the `k` most promising hyperparameters and sets all
    others to zero: $\lambda \leftarrow \lambda + 1_S \odot u$, with $S$ the top k.

    ```python
    outer = optax.chain(optax.adam(1e-2), hpo.select_top_k(20))
    ```

    Place it after an optimiser, as here: the moments of the optimiser then still follow
    all hyperparameters. Place it before [`eqx_hpo.project`][] and
    [`eqx_hpo.proximal`][]. `proximal` also shrinks the hyperparameters that are not
    selected. So do not choose `k` much smaller than the number of hyperparameters that
    should stay away from zero. The search for the threshold costs about thirty counts
    over the scores. This is linear in their number, and under sharding it communicates
    only the counts.

    **Arguments:**

    - `k`: the number to select. It is an integer of at least 1, or a float in (0, 1]
        for a share of all. If there are fewer than `k`, all are selected. Among equals,
        those that come first in the tree are selected.
    - `by`: the measure of the ranking. `"gradient"` is the magnitude of the
        hypergradient $g$. `"step"` is the magnitude of the update $u$ that arrives
        here. `"decrease"` is the decrease $\lvert g \cdot u \rvert$ of the validation
        loss that a step along $u$ promises to first order.
    - `groups`: the units that are selected as a whole. `"coordinates"` means each
        number, and each choice of an [`eqx_hpo.Choice`][]. `"leaves"` means each array.
        Groups can also have names. Pass a dictionary from each name to a function of
        the hyperparameters that returns its part of them (as `where` of `eqx.tree_at`).
        Or pass a tree with a label in place of each array or subtree, or a function
        that makes such a tree from the hyperparameters, as in Optax. A group is ranked
        by the Euclidean norm over its members, or by the magnitude of its summed
        decrease.
    - `rotate`: the share of `k`, from 0 to 1, that is taken in turn instead of by rank
        (rounded up). With it, each hyperparameter moves now and then.

    **Returns:** an `optax.GradientTransformationExtraArgs`. It gets the hypergradient
    as the argument `grad` of `update`, which every algorithm of this library passes.
    Without `grad` it uses the updates instead.

    **Raises:** a `ValueError` if an argument is out of range, or if groups with names
    overlap, are empty or do not cover all hyperparameters.

    ??? cite "Reference"

        *Generalized Greedy Gradient-Based Hyperparameter Optimization*, submitted to
        ICLR 2025.
    """
    check_one_of("by", by, ("gradient", "step", "decrease"))
    _check_k(k)
    as_share("rotate", rotate)
    _check_groups(groups)

    def init(params):
        _units(groups, params)  # for its errors
        return SelectState(jnp.zeros((), jnp.uint32))

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        grad = updates if grad is None else beside_updates("grad", grad, updates)
        units = _units(groups, updates if params is None else params)
        leaves, treedef = jtu.tree_flatten(updates)
        scores = _scores(units, by, leaves, jtu.tree_leaves(grad))
        size = sum(x.size for x in scores)
        number = _as_count(k, size)
        if number >= size:
            return updates, state
        window = math.ceil(rotate * number)
        masks = top_k_masks(scores, number, state.turn, window)
        masks = masks if len(masks) == len(units) else list(masks[0])
        for unit, mask in zip(units, masks):
            mask = mask[..., None] if unit.kind == "rows" else mask
            for i in unit.leaves:
                leaves[i] = jnp.where(mask, leaves[i], 0)
        turn = jnp.asarray((state.turn + window) % size, jnp.uint32)
        return jtu.tree_unflatten(treedef, leaves), SelectState(turn)

    return optax.GradientTransformationExtraArgs(init, update)


def _check_k(k: Any) -> None:
    message = "`k` must be an integer of at least 1, or a share in (0, 1] as a float"
    if isinstance(k, (float, np.floating)):
        valid = 0 < k <= 1
    else:
        try:
            valid = not isinstance(k, bool) and operator.index(k) >= 1
        except TypeError:
            valid = False
    if not valid:
        raise ValueError(f"{message}; got {shown(k)}.")


def _check_groups(groups: Any) -> None:
    """Checks `groups` as far as possible without the hyperparameters."""
    if isinstance(groups, str) and groups in ("coordinates", "leaves"):
        return
    leaves = jtu.tree_leaves(groups)
    bare = jtu.all_leaves([groups]) and not callable(groups)
    labels = [x for x in leaves if not callable(x)]
    if bare or len(leaves) == 0 or not all(isinstance(x, Hashable) for x in labels):
        raise ValueError(
            "`groups` must be 'coordinates', 'leaves', a dictionary from names to "
            f"functions, or a tree of labels; got {shown(groups)}."
        )


def _as_count(k: int | float, size: int) -> int:
    if isinstance(k, (float, np.floating)):
        return max(1, round(k * size))
    return operator.index(k)


def _scores(
    units: list[_Unit], by: str, updates: list[Array], grads: list[Array]
) -> list[Float[Array, "..."]]:
    def score(unit):
        wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
        u = [wide(updates[i]) for i in unit.leaves]
        g = [wide(grads[i]) for i in unit.leaves]
        if by == "decrease":
            products = [x * y for x, y in zip(g, u)]
            if unit.kind == "whole":
                return jnp.abs(jnp.asarray(sum(jnp.sum(x) for x in products)))
            (x,) = products
            return jnp.abs(jnp.sum(x, axis=-1) if unit.kind == "rows" else x)
        measured = g if by == "gradient" else u
        if unit.kind == "whole":
            return tree_norm(measured)
        (x,) = measured
        return _row_norm(x) if unit.kind == "rows" else jnp.abs(x)

    scores = [score(unit) for unit in units]
    # One array, not one for each group: it is gone through many times.
    whole = all(unit.kind == "whole" for unit in units)
    return [jnp.stack(scores)] if whole else scores


def _row_norm(x: Float[Array, "... n"]) -> Float[Array, "..."]:
    # Scaled: the squares neither overflow nor vanish.
    largest = jnp.max(jnp.abs(x), axis=-1)
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.sqrt(jnp.sum(jnp.square(x / scale[..., None]), axis=-1))


def _units(groups: Any, tree: PyTree) -> list[_Unit]:
    leaves, treedef = jtu.tree_flatten(tree)
    if isinstance(groups, str):
        if groups == "leaves":
            return [_Unit([i], "whole") for i in range(len(leaves))]
        return _coordinates(jtu.tree_unflatten(treedef, range(len(leaves))))
    if isinstance(groups, Mapping) and all(callable(x) for x in groups.values()):
        members = _members_of_functions(groups, tree)
    else:
        members = _members_of_labels(groups, tree)
    return [_Unit(numbers, "whole") for numbers in members.values()]


def _coordinates(numbers: PyTree[int]) -> list[_Unit]:
    is_choice = lambda x: isinstance(x, Choice)
    units = []
    for node in jtu.tree_leaves(numbers, is_leaf=is_choice):
        for i in jtu.tree_leaves(node):
            units.append(_Unit([i], "rows" if is_choice(node) else "entries"))
    return units


def _members_of_functions(
    groups: Mapping[Any, Callable[[PyTree], Any]], tree: PyTree
) -> dict[Any, list[int]]:
    paths, treedef = jtu.tree_flatten_with_path(tree)
    numbers = jtu.tree_unflatten(treedef, range(len(paths)))
    members = {n: jtu.tree_leaves(select(numbers)) for n, select in groups.items()}
    for i, (path, _) in enumerate(paths):
        owners = [name for name, group in members.items() if i in group]
        if len(owners) != 1:
            where = f"in more than one: {owners}" if owners else "in none of them"
            raise ValueError(
                "`groups` must hold each hyperparameter once, but "
                f"`hyperparams{jtu.keystr(path)}` is {where}."
            )
    empty = [name for name, group in members.items() if len(group) == 0]
    if empty:
        raise ValueError(f"`groups` has groups without hyperparameters: {empty}.")
    return members


def _members_of_labels(groups: Any, tree: PyTree) -> dict[Any, list[int]]:
    # An Equinox module of labels may be callable too.
    is_function = callable(groups) and jtu.all_leaves([groups])
    labels = groups(tree) if is_function else groups
    spread = lambda label, part: jtu.tree_map(lambda _: label, part)
    try:
        spread_labels = jtu.tree_leaves(jtu.tree_map(spread, labels, tree))
    except ValueError as e:
        raise ValueError(
            "`groups` must have a label for each hyperparameter; its structure "
            f"{jtu.tree_structure(labels)} does not cover {jtu.tree_structure(tree)}."
        ) from e
    members: dict[Any, list[int]] = {}
    for i, label in enumerate(spread_labels):
        members.setdefault(label, []).append(i)
    return members
