"""Models that earlier versions saved, on either backend, are loaded and trained on."""

import importlib.util
import json
import pathlib

import keras
import numpy as np
import pytest

import tf_adaptive_ls  # noqa: F401  what is loaded is registered by it

DIRECTORY = pathlib.Path(__file__).parent.parent / "saved_models"
MODELS = sorted(DIRECTORY.glob("*/*/model.keras"))


def make():
    spec = importlib.util.spec_from_file_location("make", DIRECTORY / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_as_expected(path):
    expected = json.loads(path.with_name("expected.json").read_text())
    model = keras.models.load_model(path)
    found = make().state(model)
    # Sums in another order, on other hardware, in float16.
    outputs = np.array(expected.pop("outputs"))
    np.testing.assert_allclose(found.pop("outputs"), outputs, rtol=0.02, atol=0.02)
    next_losses = expected.pop("next_losses")
    assert found == expected
    np.testing.assert_allclose(make().losses(model, 3), next_losses, rtol=0.02)
    assert model.optimizer.skipped_steps == found["skipped_steps"]


def test_there_are_some():
    assert {path.parent.name for path in MODELS} == {"tensorflow", "jax"}


@pytest.mark.parametrize(
    "path",
    [
        path
        if path.parent.name == keras.backend.backend()
        else pytest.param(path, marks=pytest.mark.long)
        for path in MODELS
    ],
    ids=lambda path: "-".join(path.parts[-3:-1]),
)
def test_a_model_of_an_earlier_version(path):
    assert_as_expected(path)


@pytest.mark.long
def test_a_model_of_this_version(tmp_path):
    make().main(["--output", str(tmp_path)])
    assert_as_expected(tmp_path / keras.backend.backend() / "model.keras")
