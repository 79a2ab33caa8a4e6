import os

import jax


# Most of the time of the tests is compilation. The flops and the memory that XLA
# reports do not depend on this.
flags = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
# Several devices, so that code for many of them is tested on one CPU.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)

import itertools

import jax.random as jr
import pytest


@pytest.fixture
def getkey():
    numbers = itertools.count()
    return lambda: jr.key(next(numbers))
