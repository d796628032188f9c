"""What LiteRT makes of a quantized model: the same kernels in 4 or 8 bits, the same outputs."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests.deploy.test_quantization import IMAGES, QUICK, randomized

litert_quantizer = pytest.importorskip("litert_quantizer")
pytestmark = [
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="Keras exports it from TensorFlow"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def model(bits):
    """LiteRT has no depthwise kernels of 4 bits."""
    parts = [layers.Conv2D(8, 3, strides=2, padding="same"), layers.BatchNormalization()]
    parts += [layers.ReLU(), layers.Conv2D(16, 3, padding="same", activation="relu")]
    parts += [layers.DepthwiseConv2D(3, padding="same", activation="relu")] if bits == 8 else []
    parts += [layers.GlobalAveragePooling2D(), layers.Dense(8, "relu"), layers.Dense(3)]
    return randomized(keras.Sequential([keras.Input((8, 8, 3)), *parts]))


def run(file):
    """Outputs, and the numbers of channels of kernels of integers."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=file)
    taken = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(taken, IMAGES.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken, IMAGES)
    interpreter.invoke()
    outputs = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    scales = [t["quantization_parameters"]["scales"] for t in interpreter.get_tensor_details()]
    return outputs, sorted(len(each) for each in scales if len(each))


def converted(quantized, bits, folder):
    """The file in float32, and the one that the quantizer makes of it, which takes `bits`."""
    narrow, wide = str(folder / f"model{bits}.tflite"), str(folder / "model.tflite")
    quantized.export(wide, format="litert", verbose=False)
    quantizer = litert_quantizer.Quantizer(wide)
    recipes = litert_quantizer.recipe
    quantizer.load_quantization_recipe(
        recipes.weight_only_wi4_afp32() if bits == 4 else recipes.weight_only_wi8_afp32()
    )
    quantizer.quantize().export_model(narrow)
    return wide, narrow


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ["mse", "multipoint", "adaround"])
def test_the_quantizer_finds_the_same_grids(bits, method, tmp_path):
    budget = 0.3 if method == "multipoint" else 0.0
    quantized, report = als.quantize_weights(
        model(bits), IMAGES, bits, method=method, budget=budget, first_and_last_bits=None, **QUICK
    )
    wide, narrow = converted(quantized, bits, tmp_path)
    expected = quantized.predict(IMAGES, verbose=0)
    outputs, channels = run(narrow)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(run(wide)[0], expected, rtol=0, atol=2e-6 * largest)
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=2e-6 * largest)
    kernels = [w for w in quantized.weights if "kernel" in w.path]
    assert len(channels) == len(kernels) > len(report.kernels) - 1
    if method == "multipoint":
        assert any("_points" in w.path for w in kernels)
    other = converted(quantized, 12 - bits, tmp_path)[1]
    if bits == 4:  # which are not on the grid of 8 bits
        assert np.abs(run(other)[0] - expected).max() > 1e-4 * largest
