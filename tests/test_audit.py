import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import pytest

from .helpers import equal, hand_unrolled, relative_error
from .problems import ridge


def _near(x, expected, tolerance=1e-10):
    return abs(float(x) - expected) < tolerance


def _choice_loss(model, h, batch, key):
    """Random in itself, and with a placeholder that is."""
    x, y = batch
    noise = 0.1 * jr.normal(key, y.shape)
    mixed = h["choice"] @ jnp.stack([model, 2 * model])
    return jnp.mean((x @ mixed + noise - y) ** 2) + h["decay"] * jnp.sum(model**2)


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [None, 3])
def test_the_exact_algorithm_beside_itself(tasks):
    """With random batches, random losses and noise in a placeholder, in the midst of a
    run."""
    case = ridge()
    problem = hpo.Problem(_choice_loss, _choice_loss)
    algorithm = hpo.Unrolled(
        problem, lambda h: optax.sgd(h["rate"]), optax.sgd(0.1), inner_steps=3
    )
    hyperparams = {
        "choice": hpo.Choice(2),
        "decay": hpo.Positive(0.1),
        "rate": hpo.Schedule(hpo.Positive(jnp.array([0.05, 0.03])), 2),
    }
    train, val = (hpo.Minibatch(data, 4) for data in (case.train, case.val))
    if tasks is not None:
        algorithm = hpo.MetaLearner(algorithm, tasks, horizon=6, reptile=0.5)
        train, val = hpo.folds(case.train, tasks)
        train = eqx.filter_vmap(lambda x: hpo.Minibatch(x, 4))(train)
    state = algorithm.init(case.model, hyperparams)
    state = algorithm.step(state, train, val, key=jr.key(1))
    got = hpo.audit(algorithm, state, train, val, horizon=3, key=jr.key(2))
    for cosine in jax.tree.leaves((got.cosine, got.cosines)):
        assert cosine.shape == () and _near(cosine, 1)
    for ratio in jax.tree.leaves((got.norm_ratio, got.norm_ratios)):
        assert ratio.shape == () and _near(ratio, 1)
    assert isinstance(got.cosines["decay"], hpo.Positive)


@pytest.mark.slow
def test_epochs_go_on_where_the_run_is():
    """The batches of the exact one are those that the run would have next."""
    case = ridge()
    inner, steps = optax.sgd(0.1, momentum=0.9), 6
    one = hpo.T1T2(case.problem, inner, optax.sgd(0.1), inner_steps=2)
    long = hpo.Unrolled(case.problem, inner, optax.sgd(0.1), inner_steps=steps)
    train = hpo.Minibatch(case.train, 5, replacement=False)
    state = one.init(case.model, case.hyperparams)
    for _ in range(3):
        state = one.step(state, train, case.val)
    got = hpo.audit(one, state, train, case.val, horizon=steps, key=None)
    estimate = one.compute_hypergradient(state, train, case.val)["penalty"]
    # Six steps before, six after: for `long`, the second call.
    one_call = eqx.tree_at(lambda s: s.step, state, jnp.array(1))
    exact = long.compute_hypergradient(one_call, train, case.val)["penalty"]
    norm = jnp.linalg.norm
    assert _near(got.cosine, estimate @ exact / norm(estimate) / norm(exact))
    assert _near(got.norm_ratio, norm(estimate) / norm(exact))


@pytest.mark.parametrize("horizon", [1, 7, pytest.param(100, marks=pytest.mark.slow)])
def test_one_step_on_a_quadratic(horizon):
    """One step moves the weight by a share of the way to its target; many by nearly all
    of it, and the validation loss is taken at their end."""
    curvature, rate, target, start, h = 0.5, 0.2, 3.0, -1.0, 0.5
    train_loss = lambda w, h, b, k: 0.5 * curvature * (w - h) ** 2
    val_loss = lambda w, h, b, k: 0.5 * (w - target) ** 2
    problem = hpo.Problem(train_loss, val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(rate), optax.sgd(0.1))
    state = algorithm.init(jnp.array(start), jnp.array(h))
    before = jax.tree.map(jnp.copy, eqx.filter(state, eqx.is_array))
    got = hpo.audit(algorithm, state, None, None, horizon=horizon, key=None)

    def hypergradient(steps):
        shrink = (1 - rate * curvature) ** steps
        reached = shrink * start + (1 - shrink) * h
        return (reached - target) * (1 - shrink)

    assert _near(got.norm_ratio, hypergradient(1) / hypergradient(horizon))
    assert _near(got.cosine, 1) and _near(got.cosines, 1)
    assert equal(eqx.filter(state, eqx.is_array), before)


def test_the_bias_of_a_learning_rate():
    """The steep direction overshoots, which a smaller rate mends at once; the flat one
    needs a larger rate, which tells only at the end. The decay hides it in the cosine
    over all, not in its own."""
    curvatures = jnp.array([1.0, 0.01])

    def val_loss(w, h, batch, key):
        return 0.5 * jnp.sum(curvatures * w**2) + jnp.sum(h["other"] ** 2)

    problem = hpo.Problem(lambda w, h, b, k: 0.5 * jnp.sum(curvatures * w**2), val_loss)
    inner = lambda h: optax.sgd(h["rate"])
    algorithm = hpo.T1T2(problem, inner, optax.sgd(0.1))
    hyperparams = {"other": jnp.full(10, 5.0), "rate": hpo.Positive(1.3)}
    state = algorithm.init(jnp.ones(2), hyperparams)
    got = hpo.audit(algorithm, state, None, None, horizon=60, key=None)
    assert got.cosine > 0.99
    assert _near(got.cosines["other"], 1) and _near(got.norm_ratios["other"], 1)
    assert _near(got.cosines["rate"].raw, -1)
    exact = hand_unrolled(
        problem, inner, jnp.ones(2), hyperparams, None, None, steps=60
    )
    estimate = algorithm.compute_hypergradient(state, None, None)
    ratio = jnp.abs(estimate["rate"].raw / exact["rate"].raw)
    assert _near(got.norm_ratios["rate"].raw, ratio)
    head, whole, other, rate = str(got).splitlines()
    assert head.split() == ["cosine", "norm", "ratio"]
    assert whole.split() == [f"{got.cosine:.4f}", f"{got.norm_ratio:.4f}"]
    assert other.split() == ["['other']", "1.0000", "1.0000"]
    assert rate.split()[:2] == ["['rate'].raw", "-1.0000"]


@pytest.mark.slow
def test_from_a_callback_it_compiles_once():
    case, traces, log = ridge(), 0, []

    def train_loss(*args):
        nonlocal traces
        traces += 1
        return case.problem.train_loss(*args)

    problem = hpo.Problem(train_loss, case.problem.val_loss)
    inner = optax.sgd(0.1, momentum=0.9)
    algorithm = hpo.T1T2(problem, inner, optax.adam(0.1))
    counts = []

    def callback(state):
        found = hpo.audit(algorithm, state, case.train, case.val, horizon=40, key=None)
        log.append(found)
        counts.append(traces)

    run = lambda **options: hpo.tune(
        algorithm,
        case.model,
        case.hyperparams,
        case.train,
        case.val,
        steps=40,
        key=None,
        progress=False,
        record_every=2,
        **options,
    )
    solution = run(callback=callback)
    assert len(log) == 20 and len(set(counts)) == 1
    assert len({float(x.cosine) for x in log}) == 20
    assert equal(solution.hyperparams, run().hyperparams)
    within = jax.jit(
        lambda arrays: hpo.audit(
            algorithm,
            eqx.combine(arrays, static),
            case.train,
            case.val,
            horizon=40,
            key=None,
        )
    )
    arrays, static = eqx.partition(solution.state, eqx.is_array)
    assert relative_error(within(arrays), log[-1]) < 1e-10


TEXTS = {
    "`horizon` must be a multiple of the inner steps in a call of `step`, 2; got 3.": {
        "horizon": 3
    },
    "`horizon` must be an integer of at least 1; got 0.": {"horizon": 0},
}


@pytest.mark.parametrize("text", TEXTS)
def test_bad_input_raises(text):
    case = ridge()
    algorithm = hpo.T1T2(case.problem, optax.sgd(0.1), optax.sgd(0.1), inner_steps=2)
    state = algorithm.init(case.model, case.hyperparams)
    with pytest.raises(ValueError) as info:
        hpo.audit(algorithm, state, case.train, case.val, key=None, **TEXTS[text])
    assert str(info.value) == text
