"""The tables of the page on half precision: `python -m tests.benchmarks.precision`,
with `rules`, `algorithms` or `tuned` for one of them.

- `rules`: the error of one step of T1-T2 on a classifier with a decay for each layer,
  one for each weight, and a weight for each example.
- `algorithms`: the largest of the three errors, for each algorithm and five steps.
- `tuned`: the errors on untouched data after tuning, over seeds.

The truth is the exact rule in double precision, from the same rounded numbers.
"""

import sys
from functools import partial
from typing import Any

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax
from sklearn.datasets import load_digits, make_friedman1


WIDTHS = [
    (20, 16, 5, 1),
    (100, 128, 10, 2),
    (784, 600, 10, 3),
]  # in, hidden, out, depth
HALF = [jnp.bfloat16, jnp.float16]
DTYPES = [jnp.float32, *HALF]
RULES = {
    "ForwardOverReverse": hpo.ForwardOverReverse(),
    "ReverseOverReverse": hpo.ReverseOverReverse(),
    "FiniteDifference": hpo.FiniteDifference(),
}
ALGORITHMS = {
    "T1T2": partial(hpo.T1T2, inner_steps=5),
    "Greedy": partial(hpo.Greedy, inner_steps=5),
    "HyperDistill": partial(hpo.HyperDistill, inner_steps=5, horizon=5),
    "Unrolled": partial(hpo.Unrolled, inner_steps=5),
    "DrMAD": partial(hpo.DrMAD, inner_steps=5),
    "Implicit": partial(hpo.Implicit, inner_steps=5, linear_solver=hpo.Neumann(5, 0.1)),
    "ForwardMode": lambda *args: hpo.ForwardMode(*args[:3], inner_steps=5),
}
EXAMPLES = 64
SEEDS = 5


def _cast(tree, dtype):
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jtu.tree_map(lambda x: x.astype(dtype), arrays), rest)


def _outputs(model, x):
    """Evaluates the model in its own precision, the outputs in single at least."""
    dtype = jtu.tree_leaves(eqx.filter(model, eqx.is_inexact_array))[0].dtype
    out = jax.vmap(model)(x.astype(dtype))
    return out.astype(jnp.promote_types(dtype, jnp.float32))


def _losses(model, batch):
    x, labels = batch
    logits = _outputs(model, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _train_loss(model, h, batch, key):
    del key
    weights = [layer.weight for layer in model.layers]
    pairs = [*zip(h["layers"], weights), *zip(h["weights"], weights)]
    decay = sum(jnp.sum(jnp.exp(d) * w**2) for d, w in pairs)
    return jnp.mean(jax.nn.sigmoid(h["examples"]) * _losses(model, batch)) + decay


def _val_loss(model, h, batch, key):
    del h, key
    return jnp.mean(_losses(model, batch))


def _problem(width, activation=jax.nn.relu):
    inputs, hidden, outputs, depth = width
    keys = jr.split(jr.key(0), 5)
    model = eqx.nn.MLP(inputs, outputs, hidden, depth, activation, key=keys[0])
    labels = jr.randint(keys[1], (2, EXAMPLES), 0, outputs)
    x = jr.normal(keys[2], (2, EXAMPLES, inputs))
    weights = [layer.weight for layer in model.layers]
    hyperparams = {
        "examples": jnp.zeros(EXAMPLES),
        "layers": [jnp.array(-7.0) for _ in weights],
        "weights": [jnp.full(w.shape, -7.0) for w in weights],
    }
    return model, hyperparams, (x[0], labels[0]), (x[1], labels[1])


def _errors(problem, dtype, held, make, inner, wrapped, rules=tuple(RULES)):
    """The relative error of each group of hyperparameters, for each rule.

    The model is rounded to `dtype` and held in `held`; `make(inner, rule, dtype)` makes
    the algorithm, whose losses cast it to that dtype once more."""
    model, *rest = problem
    model = _cast(_cast(model, dtype), jnp.float64)

    def compute(algorithm, model, rest):
        state = algorithm.init(model, rest[0])
        return algorithm.compute_hypergradient(state, *rest[1:])

    exact = make(inner, hpo.ForwardOverReverse(), None)
    expected = compute(exact, model, _cast(rest, jnp.float64))
    found = {}
    for name in rules:
        algorithm = make(wrapped, RULES[name], None if held == dtype else dtype)
        got = compute(algorithm, _cast(model, held), _cast(rest, jnp.float32))
        found[name] = [_relative_error(got[x], expected[x]) for x in got]
    return found


def _relative_error(got, expected):
    flat = lambda tree: jnp.concatenate(
        [x.astype(float).ravel() for x in jtu.tree_leaves(tree)]
    )
    got, expected = flat(got), flat(expected)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def _losses_in(dtype):
    """The two losses, of the model as it is, or cast."""
    if dtype is None:
        return hpo.Problem(_train_loss, _val_loss)
    return hpo.Problem(
        lambda model, *args: _train_loss(_cast(model, dtype), *args),
        lambda model, *args: _val_loss(_cast(model, dtype), *args),
    )


def print_rules():
    groups = ("examples", "layers", "weights")
    header = "".join(f"{x:>10}" for x in groups)
    print(f"{'weights':>9}  {'dtype':9} {'float32':12} {'rule':19}{header}")
    outer, sgd = optax.sgd(0.1), optax.sgd(0.1)
    make = lambda inner, rule, dtype: hpo.T1T2(_losses_in(dtype), inner, outer, rule)
    rules = ("ForwardOverReverse", "FiniteDifference")
    cases: list[Any] = [(jnp.float32, jnp.float32, "all", sgd)]
    for dtype in HALF:
        cases.append((dtype, dtype, "none", sgd))
        cases.append((dtype, jnp.float32, "model", sgd))
        cases.append((dtype, dtype, "masters", hpo.mixed_precision(sgd)))
    for width in WIDTHS:
        problem = _problem(width)
        arrays = jtu.tree_leaves(eqx.filter(problem[0], eqx.is_inexact_array))
        size = sum(x.size for x in arrays)
        for dtype, held, what, inner in cases:
            found = _errors(problem, dtype, held, make, sgd, inner, rules)
            for rule, errors in found.items():
                row = "".join(f"{x:10.1e}" for x in errors)
                name = jnp.dtype(dtype).name
                print(f"{size:9,}  {name:9} {what:12} {rule:19}{row}", flush=True)


def print_algorithms():
    print(f"{'algorithm':13}{'dtype':10}" + "".join(f"{x:>20}" for x in RULES))
    outer, momentum = optax.sgd(0.1), optax.sgd(0.1, momentum=0.9)
    problem, wrapped = _problem(WIDTHS[0], jnp.tanh), hpo.mixed_precision(momentum)
    for name, algorithm in ALGORITHMS.items():
        make = lambda inner, rule, dtype: algorithm(
            _losses_in(dtype), inner, outer, rule
        )
        for dtype in HALF:
            found = _errors(problem, dtype, dtype, make, momentum, wrapped)
            row = "".join(f"{max(x):20.1e}" for x in found.values())
            print(f"{name:13}{jnp.dtype(dtype).name:10}{row}", flush=True)


def _regression(seed):
    """The quickstart, with a fifth of its steps: one decay for each input."""
    x, y = make_friedman1(2200, 15, noise=1.0, random_state=seed)
    x, y = (z - z[:200].mean(axis=0) for z in (x, y))
    x, y = jnp.asarray(x / x[:200].std(axis=0)), jnp.asarray(y / y[:200].std())
    model = eqx.nn.MLP(15, 1, 32, 2, activation=jnp.tanh, key=jr.key(seed))

    def val_loss(model, h, batch, key):
        return jnp.mean((_outputs(model, batch[0])[:, 0] - batch[1]) ** 2)

    def train_loss(model, h, batch, key):
        first, *others = [jnp.sum(z.weight**2, axis=0) for z in model.layers]
        decay = jnp.sum(h["inputs"] * first) + h["layers"] * sum(map(jnp.sum, others))
        return val_loss(model, h, batch, key) + decay

    h = {
        "inputs": hpo.Positive(jnp.full(15, 1e-2)),
        "layers": hpo.Positive(jnp.array(1e-2)),
    }
    return model, h, (train_loss, val_loss), (x, y), (100, 200), val_loss


class _ConvNet(eqx.Module):
    layers: list

    def __init__(self, key):
        keys = jr.split(key, 3)
        self.layers = [
            eqx.nn.Conv2d(1, 8, 3, stride=2, padding=1, key=keys[0]),
            eqx.nn.Conv2d(8, 16, 3, stride=2, padding=1, key=keys[1]),
            eqx.nn.Linear(64, 10, key=keys[2]),
        ]

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = jax.nn.relu(layer(x))
        return self.layers[-1](x.ravel())


def _digits(seed):
    """Digits by two convolutions, a third of the train labels wrong: a weight for each
    example."""
    x, labels = load_digits(return_X_y=True)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(x))
    x, labels = x[order].reshape(-1, 1, 8, 8) / 16, labels[order]
    labels[:67] = generator.integers(0, 10, 67)
    data = jnp.asarray(x), jnp.asarray(labels)

    def train_loss(model, h, batch, key):
        return jnp.mean(h * _losses(model, batch))

    def test_error(model, h, batch, key):
        return jnp.mean(jnp.argmax(_outputs(model, batch[0]), axis=1) != batch[1])

    h = hpo.Interval(jnp.full(200, 0.5), 0.0, 1.0)
    losses = train_loss, _val_loss
    return _ConvNet(jr.key(seed)), h, losses, data, (200, 400), test_error


def _tune(make, dtype, seed):
    """The error on untouched data of a model trained while its hyperparameters are
    tuned."""
    model, h, losses, data, (first, second), test = make(seed)
    h, data = _cast((h, data), jnp.float32)
    inner = hpo.mixed_precision(optax.adam(0.01))
    algorithm = hpo.T1T2(hpo.Problem(*losses), inner, optax.adam(0.1), inner_steps=5)
    parts = slice(first), slice(first, second), slice(second, None)
    train, val, untouched = [tuple(x[part] for x in data) for part in parts]
    model = _cast(model, dtype)
    settings: Any = dict(steps=40, key=None, progress=False)
    solution = hpo.tune(algorithm, model, h, train, val, **settings)
    return float(test(solution.model, None, untouched, None))


def print_tuned(seeds=SEEDS):
    print(f"{'problem':12}{'dtype':10}{'mean':>8}{'spread':>8}{'less float32':>22}")
    for name, make in {"regression": _regression, "digits": _digits}.items():
        errors = {x: [_tune(make, x, seed) for seed in range(seeds)] for x in DTYPES}
        for dtype, found in errors.items():
            more = np.subtract(found, errors[jnp.float32])
            spread = np.std(found, ddof=1)
            print(
                f"{name:12}{jnp.dtype(dtype).name:10}{np.mean(found):8.4f}{spread:8.4f}"
                f"{np.mean(more):12.4f} ± {np.std(more, ddof=1) / seeds**0.5:.4f}",
                flush=True,
            )


TABLES = {
    "rules": print_rules,
    "algorithms": print_algorithms,
    "tuned": print_tuned,
}


def main(*names):
    jax.config.update("jax_enable_x64", True)
    for name in names or TABLES:
        TABLES[name]()
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
