"""Invariant 7: what is saved is all there is; a resumed run goes on bit for bit."""

import os
import subprocess
import sys
import textwrap
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import GRAPHS, floats
from tests.steps import plans_of, randomize_scales, scaled_layers


def compiled(model, **options):
    optimizer = als.AdaptiveLossScaleOptimizer(
        keras.optimizers.Adam(0.01), rule=als.QuantileRule(headroom=4), sample_every=3
    )
    model.compile(optimizer, loss="mse", metrics=["mae"], jit_compile=JIT, **options)
    return model


def network():
    """Statistics and a nested model. Seeds of Dropout are not saved by Keras itself."""
    x = inner_inputs = keras.Input((6,))
    x = layers.BatchNormalization()(layers.Dense(6)(x))
    inner = keras.Model(inner_inputs, x, name="inner")
    x = inputs = keras.Input((4,))
    x = layers.ReLU()(inner(layers.Dense(6)(x)))
    return als.wrap_model(keras.Model(inputs, layers.Dense(2)(x)))


X, Y = floats(24, 4), floats(24, 2, seed=1)


def fit(model, epochs=1, initial_epoch=0, callbacks=()):
    options = {"batch_size": 8, "shuffle": False, "verbose": 0}
    model.fit(X, Y, epochs=epochs, initial_epoch=initial_epoch, callbacks=callbacks, **options)


def everything(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [v.numpy() for v in variables]


def assert_same(a, b):
    for x, y in zip(everything(a), everything(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_half_trained_model_is_saved_whole_and_goes_on(tmp_path, mixed_float16):
    model = compiled(network())
    fit(model)
    randomize_scales(model, np.random.default_rng(0))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    assert [type(layer) for layer in loaded.layers] == [type(layer) for layer in model.layers]
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.optimizer.rule == als.QuantileRule(headroom=4)
    assert_same(loaded, model)
    for each in (loaded, model):
        each.jit_compile = JIT
        fit(each, epochs=2)
    assert_same(loaded, model)


# Keras recognizes a layer that two others refer to only if both do so directly, not
# by way of a wrapper: TimeDistributed has the same trouble.
@pytest.mark.parametrize("name", sorted(GRAPHS.keys() - {"tied"}))
def test_every_graph_is_loaded_with_its_plan(name, tmp_path):
    model, inputs = GRAPHS[name]()
    wrapped = als.wrap_model(model)
    randomize_scales(wrapped, np.random.default_rng(0))
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(wrapped)
    np.testing.assert_equal(
        [layer.log2_scale for layer in scaled_layers(loaded)],
        [layer.log2_scale for layer in scaled_layers(wrapped)],
    )
    outputs = [keras.tree.flatten(each(*inputs)) for each in (loaded, wrapped)]
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(routes(loaded), routes(wrapped), strict=True):
        assert a == b


def routes(model):
    """The plan of a model, with numbers for layers."""
    number = {id(layer): i for i, layer in enumerate(scaled_layers(model))}

    def numbered(groups):
        return [{number[id(layer)] for layer in group.layers} for group in groups]

    (plan,) = plans_of(model)
    for layer in scaled_layers(model):
        route = plan.routes.get(id(layer))
        if route is None:
            yield None
        else:
            kwargs = {name: numbered(value) for name, value in route.kwargs.items()}
            yield numbered(route.args), kwargs, numbered(route.outputs)


def test_weights_alone(tmp_path, mixed_float16):
    model = compiled(network())
    fit(model)
    model.save_weights(tmp_path / "all.weights.h5")
    other = compiled(network())
    fit(other, epochs=2)
    other.load_weights(tmp_path / "all.weights.h5")
    assert_same(other, model)


class Killed(Exception):
    pass


class KillAt(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Killed


def test_a_killed_run_goes_on_bit_for_bit(tmp_path, mixed_float16):
    undisturbed = compiled(network())
    fit(undisturbed, epochs=5)

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    keras.utils.set_random_seed(1910)
    killed = compiled(network())
    with pytest.raises(Killed):
        fit(killed, epochs=5, callbacks=[backup(), KillAt(3)])
    keras.utils.set_random_seed(4)
    resumed = compiled(network())
    fit(resumed, epochs=5, callbacks=[backup()])
    assert_same(resumed, undisturbed)


@keras.saving.register_keras_serializable("tests")
class WithTrainStep(keras.Model):
    """A Functional model with a training step of its own, as Keras's guides show it."""

    steps = 0

    def train_step(self, *args):
        self.steps += 1
        return super().train_step(*args)


def test_a_functional_subclass_stays_what_it_is(tmp_path):
    x = inputs = keras.Input((4,))
    model = WithTrainStep(inputs, layers.Dense(2)(x))
    wrapped = als.wrap_model(model)
    assert isinstance(wrapped, WithTrainStep)
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(wrapped)
    loaded.compile("sgd", loss="mse", run_eagerly=True)
    with pytest.warns(UserWarning, match="compiled with SGD"):
        fit(loaded)
    assert loaded.steps == 3
    assert type(als.strip_model(loaded)) is WithTrainStep


@keras.saving.register_keras_serializable("tests")
class Backbone(keras.Model):
    """Makes its graph in its constructor, as those of KerasHub do."""

    def __init__(self, width, **kwargs):
        inputs = keras.Input((4,))
        hidden = layers.Dense(width, activation="relu", name="hidden")(inputs)
        super().__init__(inputs, layers.Dense(3, name="out")(hidden), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}


def test_a_nested_model_that_makes_its_graph_itself_is_wrapped_layer_by_layer(tmp_path):
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, layers.Dense(2)(Backbone(5, name="backbone")(inputs)))
    wrapped = als.wrap_model(plain)
    scaled = [row.name for row in als.scale_table(wrapped) if row.log2_scale is not None]
    assert scaled[:2] == ["backbone/hidden", "backbone/out"]
    wrapped.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    stripped = als.strip_model(loaded)
    expected = plain(X)
    for model in (wrapped, loaded, stripped):
        np.testing.assert_array_equal(model(X), expected)


@pytest.mark.parametrize("saved_as", ["keras", "export"])
def test_a_stripped_model_needs_no_trace_of_the_library(saved_as, tmp_path, mixed_float16):
    model = compiled(network())
    fit(model)
    stripped = als.strip_model(model)
    path = tmp_path / ("model.keras" if saved_as == "keras" else "model")
    if saved_as == "keras":
        stripped.save(path)
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    else:
        stripped.export(path, verbose=False)
        content = b"".join(p.read_bytes() for p in path.rglob("*") if p.is_file())
    for trace in (b"tf_adaptive_ls", b"loss_scale_report", b"LossScaled", b"Adaptive"):
        assert trace not in content
    np.save(tmp_path / "x.npy", X)
    script = f"""
        import sys
        sys.modules["tf_adaptive_ls"] = None
        import numpy as np, keras, tensorflow as tf
        x = np.load({str(tmp_path / "x.npy")!r})
        path = {str(path)!r}
        if path.endswith(".keras"):
            y = keras.models.load_model(path).predict(x, verbose=0)
        else:
            model = tf.saved_model.load(path)
            y = model.serve(x)
        np.save({str(tmp_path / "y.npy")!r}, y)
    """
    environment = {**os.environ, "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment)
    np.testing.assert_allclose(
        np.load(tmp_path / "y.npy"), model.predict(X, verbose=0), rtol=1e-3, atol=1e-3
    )


def test_inference_graphs_hold_nothing_but_identities():
    model = network()
    plain = als.strip_model(model)

    def operations(model):
        function = tf.function(lambda x: model(x, training=False))
        concrete = function.get_concrete_function(tf.TensorSpec((8, 4)))
        # What runs: TensorFlow leaves out what no output needs.
        frozen = convert_variables_to_constants_v2(concrete)
        output = frozen.outputs[0].op.name
        needed = tf.compat.v1.graph_util.extract_sub_graph(frozen.graph.as_graph_def(), [output])
        nothing = ("Const", "Identity", "IdentityN")
        return sorted(node.op for node in needed.node if node.op not in nothing)

    assert operations(model) == operations(plain)
    assert "MatMul" in operations(plain)
