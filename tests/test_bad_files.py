"""What is damaged is refused, or read as what it says, and leaves all as it was."""

import json
import random
import zipfile

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import tf_adaptive_ls as als
from benchmarks.faults import files
from tests.graphs import floats


def check_damaged(kind, directory, number):
    file = kind(directory)

    @settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed):
        with files.whole_tracebacks():
            assert file.problem(random.Random(seed)) is None

    check()


@pytest.mark.parametrize("kind", files.KINDS)
def test_damaged(kind, tmp_path):
    check_damaged(kind, tmp_path, 5)


@pytest.mark.long
@pytest.mark.parametrize("kind", files.KINDS)
def test_damaged_often(kind, tmp_path):
    check_damaged(kind, tmp_path, 300)


@pytest.fixture
def archive(tmp_path):
    """A saved model: its path, and a function that changes its config."""
    x = inputs = keras.Input((4,))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="scores")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse")
    path = tmp_path / "model.keras"
    model.save(path)
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}

    def change(change_config):
        config = json.loads(members["config.json"])
        change_config(config)
        with zipfile.ZipFile(path, "w") as file:
            for name, content in {**members, "config.json": json.dumps(config)}.items():
                file.writestr(name, content)

    return path, change


def optimizer_config(config):
    return config["compile_config"]["optimizer"]["config"]


CHANGES = {
    "a newer version": (
        lambda config: config["config"].update(tf_adaptive_ls=99),
        "wrapped model saved in version 2 to 4 .* Received: version 99. Install a newer",
    ),
    "an older version": (
        lambda config: config["config"].pop("tf_adaptive_ls"),
        "wrapped model saved in version 2 to 4 .* Received: version 1. Load it with",
    ),
    "float8 with something else": (
        lambda config: config["config"].update(float8={"scores": {"unknown": 7}}),
        "config of a Float8 to hold .* Received: .*unknown",
    ),
    "an optimizer with something else": (
        lambda config: optimizer_config(config).update(dynamic_growth_steps=7),
        "AdaptiveLossScaleOptimizer to hold .* Received: .*dynamic_growth_steps",
    ),
    "a rule with something else": (
        lambda config: optimizer_config(config)["rule"]["config"].update(unknown=7),
        "config of a QuantileRule to hold its settings alone: .* Received: .*unknown",
    ),
}


@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
@pytest.mark.parametrize("change", CHANGES)
def test_a_config_is_refused_by_name(change, archive):
    path, change_config = archive
    apply, message = CHANGES[change]
    change_config(apply)
    with pytest.raises((ValueError, TypeError), match=message):
        keras.saving.load_model(path)


def test_the_format_of_a_file_that_is_no_dict():
    with pytest.raises(
        ValueError, match=r"config of a LossScaled layer to be a dict\. Received: 3"
    ):
        als.LossScaled.from_config(3)


# Keras tries what has failed by another way, and warns, before it raises.
AFTERWARDS = pytest.mark.filterwarnings("ignore:Skipping nested container")


@AFTERWARDS
@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_a_scale_that_is_not_finite_is_refused(suffix, tmp_path):
    inputs = keras.Input((4,))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="scores")(inputs)))
    model.layers[-1].loss_scaling.log2_scale = 5
    good, bad = tmp_path / f"good{suffix}", tmp_path / f"bad{suffix}"
    save = model.save if suffix == ".keras" else model.save_weights
    save(good)
    model.layers[-1].loss_scaling.loss_scale.assign([np.nan, 1.0])
    save(bad)
    model.load_weights(good)
    with pytest.raises(ValueError, match=r"Expected finite numbers as the scale of .*'scores'"):
        model.load_weights(bad)
    assert model.layers[-1].loss_scaling.log2_scale == 5


@pytest.mark.parametrize("what", ["memory", pytest.param("dynamic_scale", marks=pytest.mark.long)])
def test_a_damaged_optimizer_is_refused(what, tmp_path, mixed_float16):
    model = files.trained_model()
    optimizer = model.optimizer
    variable = {
        "dynamic_scale": optimizer.dynamic_scale,
        "memory": optimizer._keeper._of_loss["memory"],
    }[what]
    variable.assign(np.full(variable.shape, {"dynamic_scale": 3.0, "memory": np.nan}[what]))
    model.save_weights(tmp_path / "bad.weights.h5")
    with pytest.raises(ValueError, match="Expected a power of two as the loss scale, and finite"):
        files.trained_model().load_weights(tmp_path / "bad.weights.h5")


def test_no_code_is_run(tmp_path):
    """Of a Lambda in a wrapped model, unless Keras is told to trust the file."""
    inputs = keras.Input((4,))
    x = layers.Lambda(lambda x: 2 * x)(layers.Dense(3)(inputs))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2)(x)))
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"disallowed|safe_mode|unsafe"):
        keras.saving.load_model(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", safe_mode=False)
    x = floats(3, 4)
    np.testing.assert_array_equal(loaded(x), model(x))


def test_a_wrapped_lambda_is_no_way_around(tmp_path):
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Lambda(lambda x: 2 * x)])
    model = keras.Sequential([keras.Input((4,)), als.LossScaled(inner), layers.Dense(2)])
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"disallowed|safe_mode|unsafe"):
        keras.saving.load_model(tmp_path / "model.keras")
