"""What a step launches on a GPU, compiled on this machine: where `./dev benchmark kernels` can."""

import json
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PYTHON = ROOT / ".venv-gpu" / "bin" / "python"

# Kernels, bytes and temporary memory, at most, relative to Keras's.
BARS = {
    "ResNet-20": (1.15, 1.10, 1.01),
    "transformer": (1.06, 1.05, 1.02),
    "MLP 20 x 1024": (0.90, 1.05, 1.01),
}


@pytest.mark.long
@pytest.mark.skipif(not PYTHON.exists(), reason="`./dev benchmark kernels` was not set up")
@pytest.mark.parametrize("name", BARS)
def test_hardly_more_than_under_one_scale(name, tmp_path):
    command = [PYTHON, "-m", "benchmarks.kernels", "--only", name, "--ways", "Keras", "ours"]
    subprocess.run([*command, "--output", tmp_path], check=True, cwd=ROOT, capture_output=True)
    (path,) = tmp_path.glob("*.json")
    ways = json.loads(path.read_text())["ways"]
    assert ways["ours"]["conditionals"] == 0
    for figure, most in zip(("kernels", "bytes", "temporary"), BARS[name], strict=True):
        assert ways["ours"][figure] <= most * ways["Keras"][figure], figure
