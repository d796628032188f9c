import gc
import os
import platform

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Without fused multiply-add, which rounds once where two operations round twice, and which XLA
# uses or does not, depending on what else is in its program: then equal means equal.
if platform.machine() == "x86_64":
    # Nor optimized further: what is compiled runs a few times, on little.
    flags = "--xla_cpu_max_isa=AVX --xla_backend_optimization_level=0"
    os.environ.setdefault("XLA_FLAGS", flags)

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests import tensorflow_alone

# Sums of several threads differ from run to run, also in plain Keras.
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
# For tests of several devices.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 4
)


def pytest_collection_finish():
    # What is imported stays: not to be looked through after every test.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """Under `KERAS_BACKEND=jax`: leaves out what is TensorFlow's alone."""
    if keras.backend.backend() == "jax":
        for item in items:
            reason = tensorflow_alone.reason(item)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh_keras():
    """Every test starts from the same seed and the default policy."""
    keras.utils.set_random_seed(1910)
    keras.config.set_dtype_policy("float32")
    yield
    keras.config.set_dtype_policy("float32")
    # Without looking for garbage: it would take longer than most tests.
    keras.utils.clear_session(free_memory=False)


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")


@pytest.fixture
def rng():
    return np.random.default_rng(12385)
