"""`plain_copy`: the same weights beside the model, also in float32, where all can be exported."""

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests import any_models
from tests.training.test_any_model import built, fitted, scalings, traces_of_scaling

ON_JAX = keras.backend.backend() == "jax"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Loss scales do nothing"),
    pytest.mark.filterwarnings("ignore:.*looks like it has unbuilt state"),
]
# Made of arguments that Keras has no config for, or different in any two calls.
NO_CONFIG = {
    "in_list", "in_tuples", "in_dicts", "shared", "in_closure", "residual_blocks", "recurrent",
    "own_cell", "tied_embedding", "submodel_twice", "weights_between", "own_layers",
    "subclass_of_dense", "own_activation", "ops_cond", "remat_layers", "remat_block",
    "time_distributed", "own_wrapper", "wrapped_by_hand", "many_arguments",
    "model_in_list_of_models", "softmax_at_the_end", "made_in_build_of_a_block", "own_gradient",
}  # fmt: skip
CHANGING = {kind.__name__ for kind in any_models.CHANGING}
ZOO = {kind.__name__: kind for kind in any_models.KINDS}


def block(x):
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 3)(y, y)
    return x + layers.EinsumDense("abc,cd->abd", output_shape=(None, 6))(x)


def every_layer():
    """Recurrent, nested, normalized, attending, cast by hand, and with a head in float32."""
    x = inputs = keras.Input((8, 8, 3))
    inner = keras.Sequential([keras.Input((4, 4, 6)), layers.DepthwiseConv2D(3, padding="same")])
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, strides=2, padding="same")(x))
    x = layers.SeparableConv2D(6, 3, padding="same", activation="relu")(inner(x))
    x = layers.Conv2DTranspose(6, 2)(x)
    x = block(layers.Reshape((25, 6))(x))
    x = keras.ops.cast(x, keras.config.dtype_policy().compute_dtype)
    x = layers.Bidirectional(
        layers.GRU(4, return_sequences=True, recurrent_initializer="glorot_uniform")
    )(x)
    x = layers.TimeDistributed(layers.Dense(4, "gelu"))(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3, dtype="float32")(x))


IMAGES = any_models.floats(4, 8, 8, 3)
TRAINS_IN = "mixed_bfloat16" if ON_JAX else "mixed_float16"


def twin_of(make, policy, x):
    """The twin of a wrapped model, and a model built in float32 with its weights."""
    keras.config.set_dtype_policy(policy)
    model = als.wrap_model(make())
    model(x)
    for w in model.trainable_variables:  # such as 16 bits can hold
        w.assign(keras.random.normal(w.shape, seed=w.shape[-1] if w.shape else 1) * 0.3)
    twin = als.plain_copy(model, dtype="float32")
    assert keras.config.dtype_policy().name == policy
    keras.config.set_dtype_policy("float32")
    expected = make()
    expected(x)
    weights = [w for w in model.weights if not hasattr(w, "loss_scaled")]
    expected.set_weights([np.asarray(w, "float32") for w in weights])
    return twin, expected


def assert_float32(model):
    for part in model._flatten_layers():
        assert {part.compute_dtype, part.variable_dtype} <= {"float32", "int32", "string"}, part
    assert {w.dtype for w in model.weights} <= {"float32", "int32", "int64", "uint32"}


def same(a, b):
    for x, y in zip(keras.tree.flatten(a), keras.tree.flatten(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "float16", "bfloat16"])
def test_a_twin_is_what_would_have_been_built_in_float32(policy):
    if policy.endswith("float16") and "b" not in policy and ON_JAX:
        pytest.skip("JAX has no attention in float16 on a CPU")
    twin, expected = twin_of(every_layer, policy, IMAGES)
    assert_float32(twin)
    same(twin(IMAGES), expected(IMAGES))
    same(twin.predict(IMAGES, verbose=0), expected.predict(IMAGES, verbose=0))


@pytest.mark.parametrize("name", sorted(set(ZOO) - NO_CONFIG - CHANGING))
def test_of_any_model_that_has_a_config(name):
    if ZOO[name] in any_models.NOT_ON_JAX and ON_JAX:
        pytest.skip("plain Keras cannot train it on JAX")
    if name == "dicts_in_and_out" and ON_JAX:
        pytest.skip("Keras builds it from its config on TensorFlow alone")
    _, (x, _), _ = built(ZOO[name])
    twin, expected = twin_of(lambda: ZOO[name]()[0], TRAINS_IN, x)
    assert_float32(twin)
    assert not scalings(twin) and not traces_of_scaling(twin)
    same(twin(x), expected(x))


def test_beside_a_model_that_goes_on_training():
    keras.config.set_dtype_policy("mixed_float16")
    x = inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(layers.Dense(8, "relu")(x)))
    fitted(als.wrap_model(model), (any_models.X, any_models.Y), "mse")
    before = model.get_weights()
    twin = als.plain_copy(model, dtype="float32")
    twin.set_weights([0 * w for w in twin.get_weights()])
    same(model.get_weights(), before)
    assert model.layers[1].compute_dtype == "float16" and len(scalings(model)) == 2
    model.fit(any_models.X, any_models.Y, verbose=0)


def test_wrappers_in_the_graph_are_left_out():
    x = inputs = keras.Input((4,))
    x = als.LossScaled(layers.Dense(8, "relu", dtype="mixed_float16"))(x)
    model = keras.Model(inputs, als.LossScaled(layers.Dense(2, dtype="mixed_float16"))(x))
    twin = als.plain_copy(model, dtype="float32")
    assert_float32(twin)
    assert [type(layer) for layer in twin.layers[1:]] == [layers.Dense] * 2


def test_int8_of_the_twin():
    keras.config.set_dtype_policy("mixed_float16")
    x = inputs = keras.Input((4,))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2)(layers.Dense(8, "relu")(x))))
    expected = model.predict(any_models.X, verbose=0)
    twin = als.plain_copy(model, dtype="float32")
    twin.quantize("int8", filters="dense")
    np.testing.assert_allclose(twin.predict(any_models.X, verbose=0), expected, atol=0.05)


class Insists(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2, dtype="float16")

    def call(self, x):
        return self.dense(x)


def test_a_class_that_insists_on_a_dtype():
    model = Insists()
    model(any_models.X)
    with pytest.raises(ValueError, match=r"Received: model 'insists.*'dense.*': 'float16'"):
        als.plain_copy(model, dtype="float32")
    assert als.plain_copy(model).dense.dtype_policy.name == "float16"
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize("dtype", ["float16", "int8", 32])
def test_other_dtypes(dtype):
    with pytest.raises(ValueError, match=rf"None or 'float32'. Received: {dtype!r}"):
        als.plain_copy(every_layer(), dtype=dtype)


def small():
    x = inputs = keras.Input((8, 8, 3), batch_size=4)
    for stride in (1, 2):
        x = layers.Conv2D(6, 3, strides=stride, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
        x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def run_saved_model(folder):
    import tensorflow as tf

    loaded = tf.saved_model.load(folder)
    return np.asarray(loaded.serve(IMAGES))


def run_litert(file):
    litert = pytest.importorskip("ai_edge_litert.interpreter")
    interpreter = litert.Interpreter(model_path=file)
    taken = interpreter.get_input_details()[0]["index"]
    interpreter.resize_tensor_input(taken, IMAGES.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken, IMAGES)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def run_onnx(file):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {session.get_inputs()[0].name: IMAGES})[0]


def run_openvino(file):
    openvino = pytest.importorskip("openvino")
    return openvino.Core().compile_model(file, "CPU")([IMAGES])[0]


FORMATS = {
    "tf_saved_model": ("", run_saved_model),
    "litert": (".tflite", run_litert),
    "onnx": (".onnx", run_onnx),
    "openvino": (".xml", run_openvino),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:In the future `np.object`:FutureWarning")
@pytest.mark.parametrize("form", FORMATS)
def test_exported(form, tmp_path):
    if ON_JAX and form != "tf_saved_model":
        pytest.skip("Keras exports it from TensorFlow")
    if form in ("onnx", "openvino"):
        pytest.importorskip({"onnx": "tf2onnx"}.get(form, form))
    keras.config.set_dtype_policy("mixed_float16")
    model = als.wrap_model(small())
    model(IMAGES)
    twin = als.plain_copy(model, dtype="float32")
    suffix, run = FORMATS[form]
    file = str(tmp_path / f"model{suffix}")
    twin.export(file, format=form, verbose=False)
    np.testing.assert_allclose(run(file), twin.predict(IMAGES, verbose=0), rtol=1e-4, atol=1e-5)
