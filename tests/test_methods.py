"""The page of published names: each of its checks notices a wrong rate, and the longer
forms by hand."""

import re
from typing import Any

import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .helpers import relative_error, ROOT
from .test_docs import blocks_of


PAGE = ROOT / "docs" / "methods.md"
SECTIONS = [blocks_of(text) for text in PAGE.read_text().split("\n## ")]
SECTIONS = [blocks for blocks in SECTIONS if len(blocks) > 0]
START = SECTIONS.pop(0)[0]


def _is_check(block):
    return "same(" in block


def _title(block):
    return re.sub(r"\W+", "_", re.findall(r"^# ([^:\n]*)", block, re.M)[0])


CHECKS = {
    _title(block): (section, block)
    for section in SECTIONS
    for block in section
    if _is_check(block)
}
FAST = "Hypergradient_descent"


def _run(section, *checks, change=lambda block: block):
    """Runs the definitions of a section, and some of its checks.

    **Returns:** the names, and the errors of the checks.
    """
    names: dict[str, Any] = {"__name__": "docs"}
    errors: list[float] = []
    definitions = [x for x in section if not _is_check(x)]
    for block in (START, *definitions, *checks):
        exec(compile(change(block), str(PAGE), "exec"), names)
        names["same"] = lambda *pair: errors.append(relative_error(*pair))
    return names, errors


def _defined(name):
    """The names of the page, with those of the section that defines `name`."""
    (section,) = [x for x in SECTIONS if any(f"\n{name} = " in block for block in x)]
    return _run(section)[0]


@pytest.mark.parametrize(
    "title",
    [pytest.param(x, marks=[pytest.mark.slow] * (x != FAST)) for x in CHECKS],
)
def test_each_check_notices_a_wrong_rate(title):
    """One percent on each rate of the library, which the forms by hand do not get."""
    section, block = CHECKS[title]
    one_percent = lambda x: re.sub(r"(optax\.(?:sgd|adam)\()", r"\g<1>1.01 * ", x)
    _, errors = _run(section, block, change=one_percent)
    assert len(errors) > 0
    assert min(errors) > 1e-5


def test_the_table_names_what_there_is():
    page = PAGE.read_text()
    rows = re.findall(r"^\| (?!\*\*|method)(.+?) \| (.*?) \| (.+?) \|$", page, re.M)
    assert len(rows) > 35
    for name, setting, verdict in rows:
        assert re.match("same|hypergradient|no$", verdict), name
        first = re.match(r"`(\w+)", setting)
        if first is not None:
            assert issubclass(getattr(hpo, first[1]), hpo.AbstractAlgorithm)
            assert f"hpo.{first[1]}(" in page


def _adam(theta, moments, gradient, t, h):
    m, v = moments
    m = h["b1"] * m + (1 - h["b1"]) * gradient
    v = h["b2"] * v + (1 - h["b2"]) * gradient**2
    scale = jnp.sqrt(v / (1 - h["b2"] ** t)) + 1e-8
    return theta - h["rate"] * m / (1 - h["b1"] ** t) / scale, (m, v)


H = {"rate": jnp.array(0.1), "b1": jnp.array(0.9), "b2": jnp.array(0.99)}


def test_the_ultimate_optimiser():
    names = _defined("ultimate")
    loss, theta, lam = names["loss"], names["w"], H
    state = names["run"](names["ultimate"], theta, lam, 4)
    moments = (jnp.zeros(4), jnp.zeros(4))
    for t in range(1, 5):
        take = lambda h: _adam(theta, moments, jax.grad(loss)(theta), t, h)
        slope = jax.grad(lambda h: loss(take(h)[0]))(lam)
        theta, moments = take(lam)
        lam = jax.tree.map(lambda x, g: x - 1e-3 * g, lam, slope)
    assert relative_error(state.model, theta) < 1e-10
    assert relative_error(state.hyperparams, lam) < 1e-10


def test_sama_takes_the_product_of_t1t2_at_other_weights():
    names, _ = _run([])
    C1, C2, h = names["C1"], names["C2"], names["h"]
    rule = hpo.FiniteDifference(epsilon=0.01)
    inner = optax.adam(0.1, 0.9, 0.99)
    algorithm = hpo.T1T2(names["problem"], inner, optax.sgd(0.0), second_order=rule)
    state = names["run"](algorithm, names["w"], h, 2)
    got = algorithm.compute_hypergradient(state, None, None)
    moments = (state.inner_opt_state[0].mu, state.inner_opt_state[0].nu)
    take = lambda g: _adam(state.model, moments, g, 3, H)[0]
    after, pull_back = jax.vjp(take, jax.grad(C1)(state.model, h))
    (v,) = pull_back(jax.grad(C2)(after, h))
    e = 0.01 / jnp.linalg.norm(v)

    def at(w):
        difference = jax.grad(C1, 1)(w + e * v, h) - jax.grad(C1, 1)(w - e * v, h)
        return jax.grad(C2, 1)(after, h) + difference / (2 * e)

    assert relative_error(got, at(state.model)) < 1e-10
    assert relative_error(got, at(after)) > 1e-3


@pytest.mark.slow
def test_clarke():
    """The map is that of the weights and the velocity together."""
    names = _defined("fixed_point")
    loss, w = names["loss"], names["w"]

    def update(state, rate):
        velocity = 0.9 * state[1] + jax.grad(loss)(state[0])
        return jnp.stack([state[0] - rate * velocity, velocity])

    state = jnp.stack([w, jnp.zeros(4)])
    for _ in range(3):
        state = update(state, 0.1)
    A, B = jax.jacobian(update, (0, 1))(state, 0.1)
    a = jax.grad(lambda state: loss(state[0]))(update(state, 0.1))
    expected = 0.0
    for _ in range(4):
        expected = expected + jnp.sum(a * B)
        a = jnp.tensordot(a, A, axes=2)
    got = names["hypergradient"](names["fixed_point"], w, jnp.array(0.1))
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("name", ["pes", "nres"])
def test_evolution(name):
    names = _defined(name)
    C2, lam, algorithm = names["C2"], names["h"], names[name]
    state = algorithm.init(names["w"], lam)
    copies = {sign: jnp.tile(names["w"], (3, 1)) for sign in (1, -1)}
    xi, values = jnp.zeros((3, 4)), {}
    for t in range(3):
        state = algorithm.step(state, None, None, key=jr.key(t))
        old, xi = xi, state.memory.episode[1]
        is_new = name == "pes" or t == 0
        noise = xi - old if name == "pes" else xi
        assert bool(jnp.all(xi != old)) == is_new
        for sign in (1, -1):
            at = lam + sign * noise
            train = jax.vmap(lambda w, h: names["train"](w, h, 2))
            copies[sign] = train(copies[sign], at)
            values[sign] = jax.vmap(C2)(copies[sign], at)
        slope = (values[1] - values[-1]) @ xi / (2 * 3 * 0.1**2)
        lam = lam - 0.05 * slope
    assert relative_error(state.hyperparams, lam) < 1e-10


@pytest.mark.slow
def test_warp_grad():
    names = _defined("warp_grad")
    loss, w, warp = names["warped"], names["w"], jnp.array([1.0, 0.5])
    tasks = (names["support"], names["query"])
    move = lambda warp, w, s: w - 0.1 * jax.grad(loss)(w, warp, s)
    one_step = lambda warp, w, s, q: loss(move(warp, w, s), warp, q)
    slopes = jax.jit(jax.vmap(jax.grad(one_step), (None, 0, 0, 0)))
    weights = start = jnp.tile(w, (3, 1))
    for t in range(12):
        weights = start if t % 4 == 0 else weights
        slope = jnp.mean(slopes(warp, weights, *tasks), axis=0)
        weights = jax.vmap(move, (None, 0, 0))(warp, weights, tasks[0])
        warp = warp - 0.05 * slope
    _, state = names["learn"](names["warp_grad"], w, jnp.array([1.0, 0.5]))
    assert relative_error(state.hyperparams, warp) < 1e-10
