"""Examples run, in a small version, as they are shown."""

import importlib.util
import pathlib

import keras

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
