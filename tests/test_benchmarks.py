"""What the benchmarks count, as far as it is exact: flops and compilations."""

import equinox as eqx
import eqx_hpo as hpo
import jax
import jax.random as jr
import pytest

from .benchmarks import flops, overhead


LIMITS = {
    "forward_over_reverse": (1.03, 1.30, 1.75),
    "finite_difference": (1.03, 1.50, 1.90),
}
RULES = {
    "forward_over_reverse": hpo.ForwardOverReverse(),
    "finite_difference": hpo.FiniteDifference(),
}


@pytest.mark.parametrize("rule_name", LIMITS)
def test_flops_of_a_step(rule_name):
    """Over those of one training and one validation gradient."""
    with jax.enable_x64(False):
        model = eqx.nn.MLP(784, 10, 256, 2, key=jr.key(0))
        problems = flops.problems(model)
        limits = dict(zip(problems, LIMITS[rule_name]))
        for name, (train_loss, hyperparams) in problems.items():
            got, _ = flops.ratio(model, train_loss, hyperparams, RULES[rule_name])
            assert 1 < got <= limits[name], name


def test_many_short_episodes_compile_once():
    _, compilations = overhead.episodes()
    assert compilations == 1
