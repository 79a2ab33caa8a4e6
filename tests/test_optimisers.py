"""Which optimisers of Optax work: the table in `docs/optimisers.md`.

Each hypergradient is held against differences of training by hand, in double precision.
`python -m tests.test_optimisers` writes the table anew.
"""

import functools as ft
import re
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from .helpers import ROOT
from .optimisers import found, GROUPS, REMARKS, SINGLE


ENTRIES = {name: make for group in GROUPS.values() for name, make in group.items()}
ALGORITHMS = (hpo.Unrolled, hpo.ForwardMode, hpo.DrMAD)
QUICK = ["clip_by_global_norm"]
STEPS = 6
PAGE = ROOT / "docs" / "optimisers.md"

# The third feature is never on, one weight starts at zero, and one array is never used.
X = jnp.array([[1, 0.5, 0], [2, -1, 0], [-1, 0.3, 0], [0.4, 1.2, 0]])
TARGETS = jnp.array(
    [[1, 0.2, -0.3, 2], [1.5, 0, 1, -1], [-0.5, 1, 0.4, 0.1], [0, 1, 2, 3]]
)
FACTORS = jnp.array([0.8, 1.1, 0.9, 1.2])
START = {
    "w": jnp.array([[0, 0.2, -0.3, 0.4], [0.5, -0.1, 0.3, 0.2], [0.1, 0.7, 0.3, -0.2]]),
    "b": jnp.array([0.1, -0.2, 0.3, 0.15]),
    "unused": jnp.zeros(2),
}
# A scale for each example, and the learning rate.
HYPERPARAMS = jnp.array([1.0, 0.6, 1.4, 0.8, 0.05])


def _train_loss(model, h, batch=None, key=None):
    errors = jnp.sum((X @ model["w"] + model["b"] - TARGETS) ** 2, axis=1)
    return jnp.mean(h[:4] * errors) + 0 * jnp.sum(model["unused"])


def _val_loss(model, h, batch=None, key=None):
    errors = (X + 0.1) @ model["w"] + model["b"] - TARGETS * FACTORS
    return jnp.mean(errors**2) + jnp.mean(jnp.sin(model["unused"]))


PROBLEM = hpo.Problem(_train_loss, _val_loss)


def _make(name: str) -> Any:
    return lambda h: ENTRIES[name](h[4])


def _trained_loss(h, name):
    optimiser = _make(name)(h)

    def step(carry, _):
        model, state = carry
        grads = jax.grad(_train_loss)(model, h)
        updates, state = optimiser.update(grads, state, model)
        return (optax.apply_updates(model, updates), state), None

    (model, _), _ = jax.lax.scan(step, (START, optimiser.init(START)), length=STEPS)
    return _val_loss(model, h)


def _differences(name):
    """Central differences of fourth order."""
    loss = jax.jit(jax.vmap(ft.partial(_trained_loss, name=name)))
    width = 1e-3 if name in SINGLE else 1e-5
    units = width * jnp.eye(HYPERPARAMS.size)
    at = lambda shift: np.asarray(loss(HYPERPARAMS + shift * units))
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * width)


def _hypergradient(name, algorithm):
    algorithm = algorithm(PROBLEM, _make(name), optax.sgd(0.1), inner_steps=STEPS)
    state = algorithm.init(START, HYPERPARAMS)
    return np.asarray(algorithm.compute_hypergradient(state, None, None))


def _is_exact(got, expected, name):
    tolerance = 3e-2 if name in SINGLE else 1e-6
    parts = [(got[:4], expected[:4]), (got[4:], expected[4:])]
    norm = np.linalg.norm
    return all(norm(x - y) < tolerance * max(norm(y), 1e-3) for x, y in parts)


def _is_close(got, exact):
    """Whether both parts point in the direction of the exact ones."""
    parts = [(got[:4], exact[:4]), (got[4:], exact[4:])]
    norm = np.linalg.norm
    return all(x @ y >= 0.9 * norm(x) * norm(y) for x, y in parts)


def _row(name: str) -> str:
    remarks = [REMARKS[name]] if name in REMARKS else []
    try:
        got = [_hypergradient(name, algorithm) for algorithm in ALGORITHMS]
    except (ValueError, TypeError) as e:
        asked = re.search(r"in its update \((.+?)\)", str(e))
        remarks += [f"needs {asked[1]}"] if asked else []
        assert len(remarks) > 0, (name, e)
        marks = ["–"] * 3
    else:
        expected = _differences(name)
        assert np.all(np.isfinite(expected))
        exact = [_is_exact(x, expected, name) for x in got[:2]]
        marks = ["exact" if x else "no" for x in exact]
        marks += ["close" if _is_close(got[2], expected) else "no"]
        if name != "set_to_zero" and np.all(expected[:4] == 0):
            remarks.append("takes signs, so only its own settings have a derivative")
    return f"| `{name}` | {' | '.join(marks)} | {', '.join(remarks)} |"


def _rows_of_the_page() -> dict[str, str]:
    rows = re.findall(r"^\| `([\w.]+)` \|.*$", PAGE.read_text(), re.M)
    lines = [x for x in PAGE.read_text().splitlines() if x.startswith("| `")]
    return dict(zip(rows, lines, strict=True))


# Some of Optax's names are on their way out, and say so.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in ENTRIES
    ],
)
def test_the_row_of_the_page_is_what_is_measured(name):
    if name not in found():
        pytest.skip("not in this version of Optax")
    assert _rows_of_the_page()[name] == _row(name)


def test_every_transformation_of_optax_is_on_the_page():
    """A new one in Optax needs an entry in `tests/optimisers.py`."""
    assert set(found()) <= set(ENTRIES)
    assert list(_rows_of_the_page()) == list(ENTRIES)


def _tables() -> str:
    text = ""
    for title, group in GROUPS.items():
        text += f"\n## {title}\n\n| | reverse | forward | DrMAD | |\n|{'---|' * 5}\n"
        text += "".join(f"{_row(name)}\n" for name in group)
    return text


if __name__ == "__main__":
    before = PAGE.read_text().partition("\n## Optimisers\n")[0]
    PAGE.write_text(before + _tables())
