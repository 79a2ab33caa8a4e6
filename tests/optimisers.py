"""Every optimiser and wrapper of Optax, in a form that can be tested.

The numbers that keep a denominator from zero are large here, so that central
differences can see the derivatives.
"""

import functools as ft
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import optax


contrib = optax.contrib

# Functions without the annotation of a transformation are looked for in these modules.
_MODULES = ("optax.contrib", "optax._src.factorized", "optax.transforms._monitoring")
_OTHERS = {"MultiSteps", "inject_hyperparams"}
_LEFT_OUT = {
    "contrib.schedule_free_eval_params",  # no transformation
    "inject_stateful_hyperparams",  # deprecated
}


def found() -> list[str]:
    """The names of all transformations in the installed Optax, and of all functions
    that return one or wrap one."""
    names = []
    for prefix, module in (("", optax), ("contrib.", contrib)):
        for name, value in sorted(vars(module).items()):
            is_function = inspect.isfunction(value) or isinstance(value, ft.partial)
            is_public = is_function and not name.startswith("_")
            if name in _OTHERS or (is_public and _returns_one(value)):
                names.append(prefix + name)
    return [name for name in names if name not in _LEFT_OUT]


def _returns_one(fn: Callable) -> bool:
    annotation = inspect.signature(fn).return_annotation
    returned = getattr(annotation, "__name__", str(annotation))
    in_module = fn.__module__.startswith(_MODULES)
    return "GradientTransformation" in returned or in_module


def _sgd(rate):
    return optax.sgd(rate, momentum=0.5)


def _is_even(step: Any, **extra_args: Any) -> Any:
    del extra_args
    return step % 2 == 0


def _labels(params):
    return jax.tree.map(lambda x: "matrix" if x.ndim == 2 else "vector", params)


def _muon_dimensions(params):
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)


def _then_sgd(transformation):
    return lambda rate: optax.chain(transformation, optax.sgd(rate))


def _rate(make: Callable, **settings: Any) -> Callable:
    return lambda rate: make(rate, **settings)


_EPS = 0.1

# The name, and a function of the learning rate.
OPTIMISERS: dict[str, Callable[[Any], Any]] = {
    "adabelief": _rate(optax.adabelief, eps=_EPS),
    "adadelta": _rate(optax.adadelta, eps=_EPS),
    "adafactor": _rate(optax.adafactor, min_dim_size_to_factor=2, eps=0.01),
    "adagrad": _rate(optax.adagrad, eps=_EPS),
    "adam": _rate(optax.adam, eps=_EPS),
    "adamax": _rate(optax.adamax, eps=_EPS),
    "adamaxw": _rate(optax.adamaxw, eps=_EPS),
    "adamw": _rate(optax.adamw, eps=_EPS),
    "adan": _rate(optax.adan, eps=_EPS),
    "amsgrad": _rate(optax.amsgrad, eps=_EPS),
    "fromage": optax.fromage,
    "lamb": _rate(optax.lamb, eps=_EPS),
    "lars": _rate(optax.lars, trust_coefficient=0.5),
    "lbfgs": _rate(optax.lbfgs, linesearch=None, scale_init_precond=False),
    "lion": optax.lion,
    "nadam": _rate(optax.nadam, eps=_EPS),
    "nadamw": _rate(optax.nadamw, eps=_EPS),
    "noisy_sgd": _rate(optax.noisy_sgd, key=jr.key(0)),
    "novograd": _rate(optax.novograd, eps=_EPS),
    "optimistic_adam": _rate(optax.optimistic_adam, eps=_EPS),
    "optimistic_adam_v2": _rate(optax.optimistic_adam_v2, eps=_EPS),
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "polyak_sgd": lambda rate: optax.polyak_sgd(),
    "radam": _rate(optax.radam, eps=_EPS),
    "rmsprop": _rate(optax.rmsprop, eps=_EPS),
    "rprop": optax.rprop,
    "sgd": _sgd,
    "sign_sgd": optax.sign_sgd,
    "signum": optax.signum,
    "sm3": _rate(optax.sm3, momentum=0.5),
    "yogi": _rate(optax.yogi, eps=_EPS),
    "contrib.acprop": _rate(contrib.acprop, eps=_EPS),
    "contrib.ademamix": _rate(contrib.ademamix, eps=_EPS),
    "contrib.adopt": _rate(contrib.adopt, eps=_EPS),
    "contrib.cocob": lambda rate: contrib.cocob(),
    "contrib.dadapt_adamw": lambda rate: contrib.dadapt_adamw(
        20 * rate, estim_lr0=0.05, eps=_EPS
    ),
    "contrib.dog": lambda rate: contrib.dog(rate, init_step=("learning_rate", 0.05)),
    "contrib.dowg": _rate(contrib.dowg, init_estim_sq_dist=0.05),
    "contrib.dpsgd": _rate(
        contrib.dpsgd, l2_norm_clip=1.0, noise_multiplier=0.1, seed=0
    ),
    "contrib.galore": _rate(contrib.galore, rank=2),
    "contrib.madgrad": _rate(contrib.madgrad, eps=_EPS),
    "contrib.mechanize": lambda rate: contrib.mechanize(optax.sgd(rate), s_init=0.5),
    "contrib.momo": lambda rate: contrib.momo(),
    "contrib.momo_adam": lambda rate: contrib.momo_adam(),
    "contrib.muon": _rate(contrib.muon, eps=_EPS),
    "contrib.prodigy": lambda rate: contrib.prodigy(
        20 * rate, estim_lr0=0.05, eps=_EPS
    ),
    "contrib.sam": lambda rate: contrib.sam(optax.sgd(rate), optax.sgd(0.01)),
    "contrib.schedule_free": lambda rate: contrib.schedule_free(optax.sgd(rate), rate),
    "contrib.schedule_free_adamw": _rate(contrib.schedule_free_adamw, eps=_EPS),
    "contrib.schedule_free_sgd": contrib.schedule_free_sgd,
    "contrib.simplified_ademamix": _rate(contrib.simplified_ademamix, eps=_EPS),
    "contrib.sophia": contrib.sophia,
}

TRANSFORMATIONS: dict[str, Callable[[Any], Any]] = {
    "adaptive_grad_clip": _then_sgd(optax.adaptive_grad_clip(0.1)),
    "add_decayed_weights": _then_sgd(optax.add_decayed_weights(0.1)),
    "add_noise": _then_sgd(optax.add_noise(0.1, 0.5, jr.key(0))),
    "apply_every": _then_sgd(optax.apply_every(2)),
    "centralize": _then_sgd(optax.centralize()),
    "clip": _then_sgd(optax.clip(0.5)),
    "clip_by_block_rms": _then_sgd(optax.clip_by_block_rms(0.2)),
    "clip_by_global_norm": _then_sgd(optax.clip_by_global_norm(0.5)),
    "ema": _then_sgd(optax.ema(0.5)),
    "identity": _then_sgd(optax.identity()),
    "keep_params_nonnegative": lambda rate: optax.chain(
        optax.sgd(rate), optax.keep_params_nonnegative()
    ),
    "measure_with_ema": lambda rate: optax.measure_with_ema(optax.tree.norm, 0.5),
    "monitor": _then_sgd(optax.monitor({"norm": optax.tree.norm})),
    "normalize_by_update_norm": _then_sgd(optax.normalize_by_update_norm()),
    "scale": _then_sgd(optax.scale(0.5)),
    "scale_by_adadelta": _then_sgd(optax.scale_by_adadelta(eps=_EPS)),
    "scale_by_adam": _then_sgd(optax.scale_by_adam(eps=_EPS)),
    "scale_by_adamax": _then_sgd(optax.scale_by_adamax(eps=_EPS)),
    "scale_by_adan": _then_sgd(optax.scale_by_adan(eps=_EPS)),
    "scale_by_amsgrad": _then_sgd(optax.scale_by_amsgrad(eps=_EPS)),
    "scale_by_backtracking_linesearch": _then_sgd(
        optax.scale_by_backtracking_linesearch(3)
    ),
    "scale_by_belief": _then_sgd(optax.scale_by_belief(eps=_EPS)),
    "scale_by_distance_over_gradients": _then_sgd(
        optax.scale_by_distance_over_gradients(0.1, eps=_EPS)
    ),
    "scale_by_factored_rms": _then_sgd(
        optax.scale_by_factored_rms(min_dim_size_to_factor=2, epsilon=0.01)
    ),
    "scale_by_lbfgs": _then_sgd(optax.scale_by_lbfgs(scale_init_precond=False)),
    "scale_by_learning_rate": optax.scale_by_learning_rate,
    "scale_by_lion": _then_sgd(optax.scale_by_lion()),
    "scale_by_novograd": _then_sgd(optax.scale_by_novograd(eps=_EPS)),
    "scale_by_optimistic_gradient": _then_sgd(optax.scale_by_optimistic_gradient()),
    "scale_by_param_block_norm": _then_sgd(optax.scale_by_param_block_norm()),
    "scale_by_param_block_rms": _then_sgd(optax.scale_by_param_block_rms()),
    "scale_by_polyak": _then_sgd(optax.scale_by_polyak()),
    "scale_by_radam": _then_sgd(optax.scale_by_radam(eps=_EPS)),
    "scale_by_rms": _then_sgd(optax.scale_by_rms(eps=_EPS)),
    "scale_by_rprop": lambda rate: optax.chain(
        optax.scale_by_rprop(rate), optax.scale(-1)
    ),
    "scale_by_rss": _then_sgd(optax.scale_by_rss(eps=_EPS)),
    "scale_by_schedule": lambda rate: optax.scale_by_schedule(
        lambda step: -rate / (1 + step)
    ),
    "scale_by_sign": _then_sgd(optax.scale_by_sign()),
    "scale_by_sm3": _then_sgd(optax.scale_by_sm3(eps=_EPS)),
    "scale_by_stddev": _then_sgd(optax.scale_by_stddev(eps=_EPS)),
    "scale_by_trust_ratio": _then_sgd(optax.scale_by_trust_ratio()),
    "scale_by_yogi": _then_sgd(optax.scale_by_yogi(eps=_EPS)),
    "scale_by_zoom_linesearch": _then_sgd(optax.scale_by_zoom_linesearch(3)),
    "set_to_zero": lambda rate: optax.set_to_zero(),
    "snapshot": _then_sgd(optax.snapshot("norm", optax.tree.norm)),
    "stateless": _then_sgd(optax.stateless(lambda u, p: jax.tree.map(jnp.arctan, u))),
    "stateless_with_tree_map": _then_sgd(
        optax.stateless_with_tree_map(lambda u, p: jnp.arctan(u))
    ),
    "trace": _then_sgd(optax.trace(0.5)),
    "zero_nans": _then_sgd(optax.zero_nans()),
    "contrib.differentially_private_aggregate": _then_sgd(
        contrib.differentially_private_aggregate(1.0, 0.1, 0)
    ),
    "contrib.hutchinson_estimator_diag_hessian": _then_sgd(
        contrib.hutchinson_estimator_diag_hessian(jr.key(0))
    ),
    "contrib.normalize": _then_sgd(contrib.normalize()),
    "contrib.reduce_on_plateau": _then_sgd(contrib.reduce_on_plateau()),
    "contrib.scale_by_acprop": _then_sgd(contrib.scale_by_acprop(eps=_EPS)),
    "contrib.scale_by_ademamix": _then_sgd(contrib.scale_by_ademamix(eps=_EPS)),
    "contrib.scale_by_adopt": _then_sgd(contrib.scale_by_adopt(eps=_EPS)),
    "contrib.scale_by_cocob": lambda rate: contrib.scale_by_cocob(),
    "contrib.scale_by_galore": _then_sgd(contrib.scale_by_galore(rank=2)),
    "contrib.scale_by_madgrad": _rate(contrib.scale_by_madgrad, eps=_EPS),
    "contrib.scale_by_muon": _then_sgd(
        optax.multi_transform(
            {
                "matrix": contrib.scale_by_muon(
                    eps=_EPS, weight_dimension_numbers=_muon_dimensions
                ),
                "vector": optax.identity(),
            },
            _labels,
        )
    ),
    "contrib.scale_by_simplified_ademamix": _then_sgd(
        contrib.scale_by_simplified_ademamix(eps=_EPS)
    ),
}

WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "MultiSteps": lambda rate: optax.MultiSteps(
        _sgd(rate), 2, accumulator_dtype=jnp.float64
    ),
    "apply_if_finite": lambda rate: optax.apply_if_finite(_sgd(rate), 3),
    "chain": lambda rate: optax.chain(optax.clip(0.5), _sgd(rate)),
    "conditionally_mask": lambda rate: optax.conditionally_mask(_sgd(rate), _is_even),
    "conditionally_transform": lambda rate: optax.chain(
        optax.conditionally_transform(optax.scale(0.5), _is_even), _sgd(rate)
    ),
    "flatten": lambda rate: optax.flatten(optax.adam(rate, eps=_EPS)),
    "freeze": lambda rate: optax.chain(
        _sgd(rate), optax.freeze({"w": False, "b": True, "unused": True})
    ),
    "inject_hyperparams": lambda rate: optax.inject_hyperparams(optax.sgd)(
        rate, momentum=0.5
    ),
    "lookahead": lambda rate: optax.lookahead(_sgd(rate), 5, 0.5),
    "masked": lambda rate: optax.chain(
        optax.masked(optax.scale(0.5), {"w": False, "b": True, "unused": True}),
        _sgd(rate),
    ),
    "multi_transform": lambda rate: optax.multi_transform(
        {"matrix": _sgd(rate), "vector": optax.adam(rate, eps=_EPS)}, _labels
    ),
    "named_chain": lambda rate: optax.named_chain(
        ("clip", optax.clip(0.5)), ("descend", _sgd(rate))
    ),
    "partition": lambda rate: optax.partition(
        {"matrix": _sgd(rate), "vector": optax.adam(rate, eps=_EPS)}, _labels
    ),
    "selective_transform": lambda rate: optax.selective_transform(
        _sgd(rate), freeze_mask={"w": False, "b": True, "unused": True}
    ),
    "with_extra_args_support": lambda rate: optax.with_extra_args_support(_sgd(rate)),
    "contrib.split_real_and_imaginary": lambda rate: contrib.split_real_and_imaginary(
        _sgd(rate)
    ),
}

# What is said of an entry besides what is measured.
REMARKS = {
    "contrib.differentially_private_aggregate": "needs a gradient for each example",
    "contrib.dpsgd": "needs a gradient for each example",
    "contrib.galore": "reverse mode only for gradients of full rank (by an SVD, in "
    "single precision)",
    "contrib.scale_by_galore": "as `galore`",
    "lbfgs": "only with `linesearch=None`; exact with `scale_init_precond=False`, as "
    "Optax stops the gradient of that scale",
    "lookahead": "needs two copies of the weights",
    "measure_with_ema": "a measure for `monitor`, no optimiser",
    "monitor": "its state changes its structure",
    "scale_by_lbfgs": "as `lbfgs`",
    "set_to_zero": "nothing is trained",
}

# Those that compute in single precision can be no better than that.
SINGLE = {"contrib.galore", "contrib.scale_by_galore"}

GROUPS = {
    "Optimisers": OPTIMISERS,
    "Wrappers": WRAPPERS,
    "Parts of optimisers": TRANSFORMATIONS,
}
