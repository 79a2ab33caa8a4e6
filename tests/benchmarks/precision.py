"""The error of each second-order rule in each precision:
`python -m tests.benchmarks.precision`.

One step of T1-T2 on a classifier with a decay for each layer, one for each weight, and
a weight for each example. The truth is the exact rule in double precision, for the same
rounded numbers.
"""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optax


WIDTHS = [
    (20, 16, 5, 1),
    (100, 128, 10, 2),
    (784, 600, 10, 3),
]  # in, hidden, out, depth
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
RULES = {
    "ForwardOverReverse()": hpo.ForwardOverReverse(),
    "FiniteDifference()": hpo.FiniteDifference(),
    "FiniteDifference(0.01)": hpo.FiniteDifference(0.01),
}
EXAMPLES = 64


def _cast(tree, dtype):
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jtu.tree_map(lambda x: x.astype(dtype), arrays), rest)


def _losses(model, batch):
    x, labels = batch
    logits = jax.vmap(model)(x)
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


def _problem(width):
    inputs, hidden, outputs, depth = width
    keys = jr.split(jr.key(0), 5)
    model = eqx.nn.MLP(inputs, outputs, hidden, depth, key=keys[0])
    labels = jr.randint(keys[1], (2, EXAMPLES), 0, outputs)
    x = jr.normal(keys[2], (2, EXAMPLES, inputs))
    weights = [layer.weight for layer in model.layers]
    hyperparams = {
        "examples": jnp.zeros(EXAMPLES),
        "layers": [jnp.array(-7.0) for _ in weights],
        "weights": [jnp.full(w.shape, -7.0) for w in weights],
    }
    return model, hyperparams, (x[0], labels[0]), (x[1], labels[1])


def _hypergradient(rule, model, hyperparams, train, val):
    problem = hpo.Problem(_train_loss, _val_loss)
    algorithm = hpo.T1T2(problem, optax.sgd(0.1), optax.sgd(0.1), rule)
    state = algorithm.init(model, hyperparams)
    return algorithm.compute_hypergradient(state, train, val)


def _relative_error(got, expected):
    flat = lambda tree: jnp.concatenate(
        [x.astype(float).ravel() for x in jtu.tree_leaves(tree)]
    )
    got, expected = flat(got), flat(expected)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


def main():
    jax.config.update("jax_enable_x64", True)
    groups = ("examples", "layers", "weights")
    print(
        f"{'weights':>9}  {'dtype':9} {'rule':23}" + "".join(f"{x:>10}" for x in groups)
    )
    for width in WIDTHS:
        problem = _problem(width)
        arrays = jtu.tree_leaves(eqx.filter(problem[0], eqx.is_inexact_array))
        size = sum(x.size for x in arrays)
        for dtype in DTYPES:
            rounded = _cast(problem, dtype)
            exact = _cast(rounded, jnp.float64)
            expected = _hypergradient(hpo.ForwardOverReverse(), *exact)
            for name, rule in RULES.items():
                got = _hypergradient(rule, *rounded)
                errors = [_relative_error(got[x], expected[x]) for x in groups]
                row = "".join(f"{x:10.1e}" for x in errors)
                print(f"{size:9,}  {jnp.dtype(dtype).name:9} {name:23}{row}")


if __name__ == "__main__":
    main()
