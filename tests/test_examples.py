"""Examples run, in a small version, as they are shown."""

import importlib.util
import pathlib
import re

import keras
import nbclient
import nbformat
import numpy as np
import pytest

import tf_adaptive_ls as als

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def main_of(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


# What each says in the end, after two steps or as many as said.
SAYS = {
    "digits": (
        "Test accuracy:",
        "float16, one loss scale",
        "scale",
        "Skipped steps: 0 of 2",
        "block3_conv2",
    ),
    "deploy": ("Test accuracy, 4 bits:", "block3_conv2/kernel", "3x3x64x64"),
    "cifar10": ("Test accuracy:", "Skipped steps: 0 of 2", "conv2d_18"),
    "addition": ("Right sums, of 1000 new ones:", "multi_head_attention", "Skipped steps: 0 of 2"),
    "lstm": ("Test accuracy:", "Skipped steps: 0 of 2", "lstm"),
    "custom_loop": ("Epoch 1 of 1: loss", "Test accuracy:", "Skipped steps: 0 of 2"),
    "gan": (
        "The digits 0 to 9:",
        "Scales of the generator.",
        "Skipped steps: 0 of 2",
        "conv2d_transp",
    ),
    "deep_mlp": ("float16, no scaling", "100.00%", "Skipped steps: 0 of 2", "hidden_16"),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "digits" else pytest.param(name, marks=pytest.mark.long) for name in SAYS],
)
def test_examples_run_and_say_what_was_seen(name, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    path = tmp_path / "made" / f"{name}.keras"
    arguments = ["--tiny", "--output", str(path)]
    if name == "cifar10":
        images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3)).astype("uint8")
        labels = np.arange(300) % 10
        np.savez(
            tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images, y_test=labels
        )
        arguments += ["--data", str(tmp_path / "data.npz"), "--record", str(tmp_path / "run")]
    main_of(name)(arguments)
    printed = capsys.readouterr().out
    for expected in (*SAYS[name], str(path)):
        assert expected in printed
    model = keras.models.load_model(path)
    assert type(model) is keras.Model or type(model).__module__.startswith("keras.")


def test_halp(tmp_path, capsys):
    path = tmp_path / "made" / "halp.png"
    main_of("halp")(["--tiny", "--output", str(path)])
    printed = capsys.readouterr().out
    found = re.findall(r"^(.*?) +(\S+)  (\S+)%$", printed, re.MULTILINE)
    assert [name for name, _, _ in found] == ["SGD", "SGD, 8 bits", "SVRG"] + [
        f"HALP, {bits} bits" for bits in (2, 4, 8, 16)
    ]
    assert all(0 < float(norm) < 1 and float(accuracy) > 50 for _, norm, accuracy in found)
    assert path.stat().st_size > 1000


@pytest.mark.long
def test_several_processes(tmp_path, capfd):
    record = tmp_path / "run"
    arguments = ["--demo", "2", "--epochs", "1", "--record", str(record)]
    main_of("several_processes")(arguments)
    printed = capfd.readouterr().out
    ends = re.findall(r"Process \d: (S = .*)", printed)
    assert len(ends) == 2 and ends[0] == ends[1]
    assert "Skipped steps: 0 of 22" in printed
    assert list(als.load_run(record).steps) == [10, 20, 22]


@pytest.mark.long
def test_the_tour(tmp_path, monkeypatch):
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "strip outputs before committing"
    # Its kernel listens where no other run's does.
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in cells for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    for expected in (
        "  0.00% of the weights ever had a gradient",
        "Settled after",
        "lost by one scale",
        "skipped: 0 of",
        "The first NaN is in the input data: x (1 value).",
        "Training is stuck: the last 10 steps were skipped",
    ):
        assert expected in printed
    accuracy = float(printed.split("test accuracy: ")[1].split("%")[0])
    assert accuracy > 40  # chance is 10
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
