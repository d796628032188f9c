"""The JAX backend, in a process of its own: a process has one backend.

`./dev test --backend jax` runs all tests on it, but those in `tensorflow_alone`.
"""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

SMOKE = "any_scales_give_the_plain_model and residual"


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="all tests are on JAX")
def test_smoke():
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SMOKE, "-m", "not long"]
    result = subprocess.run(
        [sys.executable, *command, "tests/training/test_graphs_exact.py"],
        cwd=pathlib.Path(__file__).parents[1],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "1 passed" in result.stdout
