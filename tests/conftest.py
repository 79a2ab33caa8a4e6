import os

import jax


# Most of the time of the tests is compilation, so XLA does not optimise its output. The
# flops and the memory that it reports do not depend on this. One job of the workflows
# sets `TEST_XLA_LEVEL=default`.
if os.environ.get("TEST_XLA_LEVEL") != "default":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
# Several devices, so that code for many of them is tested on one CPU.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import itertools

import jax.random as jr
import pytest
from eqx_hpo import _checkpoints


@pytest.fixture
def getkey():
    numbers = itertools.count()
    return lambda: jr.key(next(numbers))


# Variants of tests that take long while others like them do not. (A whole test is
# marked where it stands.)
LONG_VARIANTS = (
    "test_tune_folds.py::test_equals_its_parts[8-0.5]",
    "test_precision.py::test_hypergradient_of_training_by_central_differences[float16]",
    "test_precision.py::test_hypergradients[t1t2-finite_difference-bfloat16]",
    "test_precision.py::test_hypergradients[forward_mode-",
    "test_fit.py::test_has_the_batches_of_tune[3-True]",
    "test_tune.py::test_stopped_saved_and_continued_equals_uninterrupted[settings0-",
    "test_unrolled.py::test_reaches_the_closed_form_at_convergence[finite_difference-",
    "test_unrolled.py::test_reaches_the_closed_form_at_convergence[forward_over_",
    "test_unrolled.py::test_equals_hand_written_unroll[forward_over_reverse-",
    "test_unrolled.py::test_equals_hand_written_unroll[finite_difference-logistic-",
    "test_folds.py::test_each_row_is_held_out_once_a_repeat[23-5-3]",
    "test_optimisers.py::test_the_row_of_the_page_is_what_is_measured[clip_by_global",
    "test_meta.py::test_tasks_over_devices_equal_those_on_one[float64-1e-12]",
    "test_meta.py::test_the_report_keeps_its_structure_and_survives_a_file[hyperd",
    "test_meta.py::test_episodes_start_from_the_reptile_initialisation[0.3]",
    "test_meta.py::test_one_task_is_the_plain_algorithm[hyperdistill]",
    "test_constrain.py::test_holds_at_each_of_1000_random_steps[proximal_box]",
    "test_constrain.py::test_holds_at_each_of_1000_random_steps[norm]",
    "test_constrain.py::test_holds_at_each_of_1000_random_steps[l2_ball]",
    "test_constrain.py::test_holds_at_each_of_1000_random_steps[box]",
    "test_faults.py::test_a_disk_that_takes_nothing[False-",
    "test_faults.py::test_batches_with_nan[start]",
    "test_faults.py::test_batches_with_nan[end]",
    "test_proximal.py::test_is_no_worse_than_a_numeric_minimiser[l1]",
    "test_select.py::test_masks_equal_a_full_sort[distinct-float64]",
    "test_select.py::test_masks_equal_a_full_sort[distinct-float16]",
    "test_optimizer.py::test_structure_never_changes_and_step_uses_the_hypergradient[t1t2_3",
    "test_optimizer.py::test_structure_never_changes_and_step_uses_the_hypergradient[unr",
    "test_optimizer.py::test_a_step_traces_each_loss_once[t1t2_3",
    "test_optimizer.py::test_a_step_traces_each_loss_once[unrolled_4_2",
    "test_greedy.py::test_equals_the_sum_by_hand[{}-sgd]",
    "test_greedy.py::test_toy_of_the_paper[greedy]",
    "test_evolution.py::test_any_function_of_the_model_is_tuned[_accuracy]",
    "test_evolution.py::test_the_model_is_trained_without_noise[persistent]",
    "test_evolution.py::test_the_model_is_trained_without_noise[antithetic]",
    "test_soba.py::test_under_folds_the_hypergradient_is_the_mean[0.0]",
    "test_soba.py::test_every_rule_gives_both_products[forward",
    "test_soba.py::test_equals_a_hand_written_one_over_100_stochastic_steps[1.0]",
    "test_penalty.py::test_the_bias_falls_as_one_over_the_strength_and_is_told[ridge]",
    "test_penalty.py::test_equals_f2sa_by_hand_on_batches[1]",
    "test_fixed_point.py::test_equals_the_sum_by_hand_off_the_fixed_point[0-",
    "test_hyperdistill.py::test_no_memory_and_no_scale_is_one_step[",
    "test_checkpoints.py::test_the_same_call_goes_on_bit_for_bit[epochs-folder]",
    "test_checkpoints.py::test_the_same_call_goes_on_bit_for_bit[loader-folder]",
    "test_constrain.py::test_holds_at_each_of_1000_random_steps[simplex]",
    "test_constrain.py::test_holds_at_each_of_1000_random_steps[non_negative]",
    "test_devices.py::test_a_run_that_goes_on_leaves_arrays_where_they_are[Auto]",
    "test_forward_mode.py::test_schedules_by_reverse_mode[2]",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(LONG_VARIANTS):
            item.add_marker(pytest.mark.slow)


class Killed(BaseException):
    """Ends a run without a chance to save."""


@pytest.fixture
def kill(monkeypatch):
    """Ends a run at a step as a power cut does: nothing is saved afterwards."""

    def at(step):
        finish = _checkpoints.Keeper.finish

        def die(state):
            if int(state.step) >= step:
                monkeypatch.setattr(_checkpoints.Keeper, "finish", lambda *args: None)
                raise Killed("killed")

        def revive():
            monkeypatch.setattr(_checkpoints.Keeper, "finish", finish)

        return die, revive

    return at
