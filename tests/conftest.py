import jax


# Several devices, so that code for many of them is tested on one CPU.
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)

import itertools

import jax.random as jr
import pytest


@pytest.fixture
def getkey():
    numbers = itertools.count()
    return lambda: jr.key(next(numbers))
