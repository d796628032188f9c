"""Results as notebooks, JSON and pandas take them."""

import json
import xml.etree.ElementTree as ET

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als

X, Y = np.ones((8, 4), "float32"), np.zeros((8, 2), "float32")


@pytest.fixture
def model(mixed_float16):
    inputs = keras.Input((4,))
    hidden = layers.ReLU()(layers.Dense(8, name="hidden")(inputs))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, dtype="float32")(hidden)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse")
    return model


# What makes the result, what of it pandas takes, and how many rows that has.
RESULTS = {
    "ScaleTable": (als.scale_table, "layers", 4),
    "Calibration": (lambda model: als.calibrate(model, [(X, Y)]), "layers", 2),
    "ForwardRange": (lambda model: als.forward_range(model, [X]), "parts", 4),
    "Explanation": (lambda model: als.explain_nonfinite(model, X * np.nan, Y), "trail", 0),
    "Allocation": (
        lambda model: als.loss_change(model, model.get_weights(), model.get_weights(), [(X, Y)]),
        "layers",
        2,
    ),
    "QuantizationReport": (
        lambda model: als.quantize_weights(
            als.plain_copy(model, dtype="float32"), X, method="mse", verbose=False
        )[1],
        "kernels",
        2,
    ),
}


@pytest.mark.filterwarnings("ignore:.*NaN|invalid value:RuntimeWarning")
@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_html_json_and_rows(name, model):
    make, rows, number = RESULTS[name]
    result = make(model)
    assert type(result).__name__ == name
    page = ET.fromstring(f"<div>{result._repr_html_()}</div>")
    assert len(page.findall("table/thead/tr")) == 1
    assert len(page.findall("table/tbody/tr")) >= 1
    found = result.to_dict()
    json.dumps(found)
    assert len(found[rows]) == number
    if not isinstance(found[rows], dict):
        assert len({frozenset(row) for row in found[rows]}) == min(number, 1)


def test_pandas_takes_them(model):
    pandas = pytest.importorskip("pandas")
    table = als.scale_table(model)
    assert list(pandas.DataFrame(table)["name"])[1] == "hidden"
    assert len(pandas.DataFrame(als.calibrate(model, [(X, Y)]).to_dict()["layers"])) == 2


def test_the_rows_of_scaled_layers_alone(model):
    table = als.scale_table(model)
    assert [row.name for row in table.scaled] == ["hidden", "dense"]
    assert "re_lu" in str(table) and "re_lu" not in str(table.scaled)
