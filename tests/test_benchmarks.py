"""What the benchmarks count, as far as it is exact: flops and compilations."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.random as jr
import pytest

from .benchmarks import flops, overhead


# Exact rules, finite differences.
LIMITS = {
    "weight decay": (1.03, 1.03),
    "sample weights": (1.30, 1.50),
    "input noise": (1.75, 1.90),
}


@pytest.mark.slow
@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="older XLA counts one percent more"
)
def test_flops_of_a_step():
    """Over those of one training and one validation gradient."""
    rules = [hpo.ForwardOverReverse(), hpo.FiniteDifference()]
    with jax.enable_x64(False):
        model = eqx.nn.MLP(784, 10, 256, 2, key=jr.key(0))
        got = list(flops.ratios(model, rules))
    assert len(got) == 6
    for name, rule, ratio, _ in got:
        assert 1 < ratio <= LIMITS[name][rules.index(rule)], (name, rule)


def test_many_short_episodes_compile_once():
    _, compilations = overhead.episodes()
    assert compilations == 1
