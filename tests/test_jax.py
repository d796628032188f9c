"""The JAX backend, in processes of its own: a process has one backend.

`./dev test --backend jax` runs all tests on it, but those in `tensorflow_alone`.
"""

import os
import pathlib
import subprocess
import sys
import textwrap

import pytest

from tests.backends import ON_JAX

pytestmark = pytest.mark.skipif(ON_JAX, reason="all tests are on JAX")

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = [
    "training/test_graphs_exact.py::test_any_scales_give_the_plain_model[residual-eager]",
    "training/test_jax_loops.py::test_as_keras_documents_it[checkpoint]",
    "training/test_jax_loops.py::test_shards_of_a_batch_as_jax_checks_them",
    "training/test_overflow.py::test_a_layer_that_passes_a_fault_on_is_not_to_blame",
    "training/test_self_contained.py::test_second_order_gradients_are_refused[xla]",
]


def run(backend, *arguments):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    of_jax = {"KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **of_jax},
        capture_output=True,
        text=True,
        check=False,
    )


def test_smoke():
    tests = [f"tests/{test}" for test in SMOKE]
    result = run("jax", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped" not in result.stdout


def test_tensorflow_is_not_imported_there():
    script = """
        import sys, keras, numpy as np, tf_adaptive_ls as als
        model = als.wrap_model(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
        model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse")
        monitor = als.LossScaleMonitor()
        model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0, callbacks=[monitor])
        als.scale_table(model)
        als.explain_nonfinite(model, np.ones((8, 4)), np.ones((8, 1)))
        assert "tensorflow" not in sys.modules
    """
    result = run("jax", "-W", "ignore", "-c", textwrap.dedent(script))
    assert result.returncode == 0, result.stderr


def test_other_backends_are_refused_when_imported():
    result = run("numpy", "-c", "import tf_adaptive_ls")
    assert result.returncode == 1
    assert "Expected Keras on TensorFlow or JAX. Received: Keras on the backend 'numpy'" in (
        result.stderr
    )
