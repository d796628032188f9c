"""Examples run, in a small version, as they are shown."""

import importlib.util
import pathlib
import re

import keras
import nbclient
import nbformat
import pytest

import tf_adaptive_ls as als

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def main_of(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_digits(tmp_path, capsys):
    path = tmp_path / "made" / "digits.keras"
    main_of("digits")(["--epochs", "1", "--batch-size", "256", "--output", str(path)])
    printed = capsys.readouterr().out
    for expected in ("Test accuracy:", "Skipped steps: 0 of 5", "block3_conv2", str(path)):
        assert expected in printed
    model = keras.models.load_model(path)
    assert type(model) is keras.Model or type(model).__module__.startswith("keras.")


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
    assert len(pictures) == 3
