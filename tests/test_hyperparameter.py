import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import paramax
import pytest
from eqx_hpo._hyperparameter import canonical, partition_raw


PLACEHOLDERS = {
    "real": lambda: hpo.Real(jnp.array([-1.0, 0.0, 2.0])),
    "positive": lambda: hpo.Positive(jnp.array([1e-6, 1.0, 1e6])),
    "interval": lambda: hpo.Interval(jnp.array([-0.9, 0.0, 1.9]), -1, 2),
    "simplex": lambda: hpo.Simplex(jnp.array([[0.2, 0.8], [0.5, 0.5]])),
}
VALUES = {
    "real": [-1.0, 0.0, 2.0],
    "positive": [1e-6, 1.0, 1e6],
    "interval": [-0.9, 0.0, 1.9],
    "simplex": [[0.2, 0.8], [0.5, 0.5]],
}


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_unwraps_to_the_value_given(name):
    placeholder = PLACEHOLDERS[name]()
    value = jnp.array(VALUES[name])
    assert jnp.allclose(placeholder.unwrap(), value, rtol=1e-12)
    assert placeholder.raw.shape == value.shape
    assert jnp.allclose(hpo.unwrap({"a": [placeholder]})["a"][0], value, rtol=1e-12)


@pytest.mark.parametrize("name", PLACEHOLDERS)
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_any_raw_is_feasible_and_differentiable(name, size, getkey):
    placeholder = PLACEHOLDERS[name]()
    raw = size * jr.normal(getkey(), placeholder.raw.shape)
    moved = eqx.tree_at(lambda p: p.raw, placeholder, raw)
    value = moved.unwrap()
    if name == "positive":
        assert jnp.all(value >= 0)
    if name == "interval":
        assert jnp.all((value >= -1) & (value <= 2))
    if name == "simplex":
        assert jnp.all(value >= 0) and jnp.allclose(jnp.sum(value, -1), 1)
    if size == 1.0:
        unwrap = lambda raw: eqx.tree_at(lambda p: p.raw, placeholder, raw).unwrap()
        assert jnp.all(jnp.isfinite(jax.jacobian(unwrap)(raw)))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: hpo.Positive(-1.0), r"`value` > 0; got `value`=-1.0"),
        (lambda: hpo.Positive(0.0), "`value` > 0"),
        (lambda: hpo.Positive(jnp.array([1.0, -2.0])), "`value` > 0"),
        (lambda: hpo.Positive(jnp.nan), r"`Positive\(value\)` must be finite; got nan"),
        (lambda: hpo.Interval(0.0, 0.0, 1.0), "`lower` < `value` < `upper`.*`upper`=1"),
        (lambda: hpo.Interval(2.0, 0.0, 1.0), "`lower` < `value` < `upper`"),
        (lambda: hpo.Interval(0.5, 1.0, 0.0), "`lower` < `value` < `upper`"),
        (lambda: hpo.Simplex(jnp.array([0.5, 0.6])), "sum to one"),
        (lambda: hpo.Simplex(jnp.array([0.0, 1.0])), "entries > 0"),
        (lambda: hpo.Simplex(1.0), "at least one axis"),
        (lambda: hpo.Real(jnp.arange(2)), "floating point; got dtype int"),
        (
            lambda: hpo.Positive(True),
            "must be a real number .*; got True",
        ),
    ],
)
def test_values_outside_the_constraint_raise(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_python_int_is_a_number():
    assert hpo.Positive(2).raw.dtype == jnp.float64
    assert jnp.allclose(hpo.Interval(1, 0, 4).unwrap(), 1.0)


def test_dtype_follows_the_value():
    value = jnp.array([0.2, 0.8], jnp.float32)
    for placeholder in (
        hpo.Positive(value),
        hpo.Interval(value, 0, 1),
        hpo.Simplex(value),
    ):
        assert placeholder.raw.dtype == jnp.float32
        assert placeholder.unwrap().dtype == jnp.float32


def test_made_inside_jit_and_vmap():
    make = lambda x: hpo.Interval(x, 0.0, 1.0).unwrap()
    values = jnp.array([0.2, 0.7])
    assert jnp.allclose(eqx.filter_jit(make)(values), values)
    assert jnp.allclose(jax.vmap(make)(values), values)
    with pytest.raises(Exception, match="needs `value` > 0"):
        jax.block_until_ready(eqx.filter_jit(lambda x: hpo.Positive(x).raw)(-values))


def test_is_hyperparameter():
    assert hpo.is_hyperparameter(hpo.Real(1.0))
    assert not hpo.is_hyperparameter(jnp.array(1.0))
    assert not hpo.is_hyperparameter(paramax.NonTrainable(jnp.array(1.0)))


class _Layer(eqx.Module):
    linear: eqx.nn.Linear
    dropout: hpo.Interval | jax.Array
    activation: object = jax.nn.relu


def _layer(key):
    return _Layer(eqx.nn.Linear(2, 3, key=key), hpo.Interval(0.5, 0, 1))


def test_partition_takes_placeholders(getkey):
    layer = _layer(getkey())
    hyperparams, rest = hpo.partition([layer, layer])
    assert rest[0].dropout is None
    assert hyperparams[0].linear.weight is None
    assert hyperparams[0].activation is None
    assert rest[1].activation is jax.nn.relu
    whole = eqx.combine(rest, hpo.unwrap(hyperparams))
    assert jnp.allclose(whole[0].dropout, 0.5)
    assert whole[1].linear.weight is layer.linear.weight


def test_partition_with_a_function_takes_plain_arrays_too(getkey):
    layer = _layer(getkey())
    is_bias = lambda x: eqx.is_array(x) and x.ndim == 1
    hyperparams, rest = hpo.partition(layer, is_bias)
    assert rest.linear.bias is None and rest.dropout is None
    assert hyperparams.linear.bias is layer.linear.bias
    assert hpo.is_hyperparameter(hyperparams.dropout)


def test_partition_with_a_tree_of_booleans(getkey):
    mlp = eqx.nn.MLP(2, 1, 4, 2, key=getkey())
    spec = jax.tree_util.tree_map(lambda _: False, mlp)
    spec = eqx.tree_at(lambda m: m.layers[0].weight, spec, True)
    hyperparams, rest = hpo.partition(mlp, spec)
    assert rest.layers[0].weight is None and rest.layers[1].weight is not None
    assert jnp.array_equal(hyperparams.layers[0].weight, mlp.layers[0].weight)


def test_what_the_outer_optimiser_moves():
    hyperparams = {
        "a": hpo.Interval(0.5, 0, 1),
        "b": jnp.array(1.0),
        "c": paramax.NonTrainable(jnp.array(2.0)),
        "f": jnp.sin,
        "n": None,
    }
    raw, constants = partition_raw(hyperparams)
    assert raw["a"].raw is not None and raw["a"].lower is None
    assert raw["b"] is not None and raw["c"].tree is None and raw["f"] is None
    assert constants["f"] is jnp.sin and constants["c"].tree == 2.0


def test_canonical_makes_strong_arrays():
    out = canonical({"a": 0.5, "b": np.array([1.0]), "c": np.float32(2), "f": jnp.sin})
    assert out["a"].dtype == jnp.float64 and not out["a"].weak_type
    assert isinstance(out["b"], jax.Array) and out["c"].dtype == jnp.float32
    assert out["f"] is jnp.sin
