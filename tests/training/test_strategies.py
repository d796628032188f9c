"""Several devices train as if they were one: `tf.distribute.MirroredStrategy`."""

import collections
import functools
import json
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_adaptive_ls as als
from tests.graphs import floats
from tests.steps import scaled_layers

X, Y = floats(64, 4), floats(64, 2, seed=1)
GRAPH = {"jit_compile": False}


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.long)], ids="{} devices".format)
def strategy(request):
    return mirrored(request.param)


@pytest.fixture
def two():
    return mirrored(2)


@functools.cache
def mirrored(number):
    class Mirrored(tf.distribute.MirroredStrategy):
        # TensorFlow's way for tests to have strategies of several sizes in one process.
        _collective_key_base = 1000 * number

    return Mirrored([f"CPU:{i}" for i in range(number)])


def network():
    inputs = keras.Input((4,))
    x = layers.Dense(8, "relu", name="hidden")(inputs)
    x = layers.Dense(8, "relu", name="deep")(x)
    return keras.Model(inputs, layers.Dense(2, name="scores")(x))


def normalized():
    inputs = keras.Input((4,))
    x = layers.BatchNormalization()(layers.Dense(8)(inputs))
    return keras.Model(inputs, layers.Dense(2)(layers.ReLU()(x)))


class Subclass(keras.Model):
    """Built, wrapped and traced while it trains, on every replica."""

    def __init__(self):
        super().__init__()
        self.hidden = [layers.Dense(8, "relu", name=name) for name in ("one", "two")]
        self.scores = layers.Dense(2, name="scores")

    def call(self, x):
        for layer in self.hidden:
            x = layer(x)
        return self.scores(x)


def sgd(**kwargs):
    return keras.optimizers.SGD(0.1, momentum=0.9, **kwargs)


def ours(strategy, build=network, inner=sgd, loss="mse", float8=None, saved=None, **mode):
    with strategy.scope():
        keras.utils.set_random_seed(3)
        model = als.wrap_model(build(), float8=float8, saved_activations=saved)
        optimizer = als.AdaptiveLossScaleOptimizer(inner(), 2.0**10)
        model.compile(optimizer, loss=loss, **(GRAPH | mode))
    return model


def keras_own(strategy, build=network, inner=sgd, **mode):
    with strategy.scope():
        keras.utils.set_random_seed(3)
        model = build()
        optimizer = keras.optimizers.LossScaleOptimizer(inner(), 2.0**10)
        model.compile(optimizer, loss="mse", **(GRAPH | mode))
    return model


def fit(model, x=X, y=Y, batch_size=16, epochs=2, **kwargs):
    return model.fit(x, y, batch_size, epochs, verbose=0, shuffle=False, **kwargs)


def on_replicas(model):
    """All variables of model and optimizer, as each replica has them."""
    strategy = model.distribute_strategy
    variables = [*model.variables, *model.optimizer.variables]
    return {
        f"{i} {v.path}": [np.array(each) for each in strategy.experimental_local_results(v.value)]
        for i, v in enumerate(variables)
        # Keras lets statistics of batches differ, until they are read.
        if "moving_" not in v.path
    }


def assert_replicas_agree(model):
    replicas = model.distribute_strategy.num_replicas_in_sync
    for name, values in on_replicas(model).items():
        assert len(values) == replicas, name
        for value in values[1:]:
            np.testing.assert_array_equal(value, values[0], err_msg=name)


def weights_of(model):
    wrapped = [v for v in model.variables if "loss_scale" not in v.path]
    return [v.numpy() for v in wrapped]


def scales_of(model):
    return [model.optimizer.loss_scale, *(layer.log2_scale for layer in scaled_layers(model))]


# One decision.


def test_all_replicas_have_the_same_of_everything(mixed_float16, strategy):
    model = ours(strategy)
    for _ in range(4):
        fit(model, epochs=1)
        assert_replicas_agree(model)
    assert model.optimizer.steps == 16 and model.optimizer.skipped_steps == 0
    assert any(layer.log2_scale for layer in scaled_layers(model))


def test_float8_on_several_devices(mixed_float16, two):
    model = ours(two, float8=als.Float8(backward="float8_e4m3fn", rounding="stochastic"))
    fit(model)
    assert_replicas_agree(model)
    deep = model.get_layer("deep").loss_scaling
    assert deep.snapshot.operands.counts.sum() == 16 * 8
    before = deep.snapshot.saturations
    # On the second replica alone the gradient of one step is too large for the format.
    deep.log2_scale += 5
    y = np.where(np.arange(16) < 8, 0, 1)[:, None] * Y[:16] * 2.0**2
    fit(model, X[:16], y, epochs=1)
    assert deep.snapshot.saturations == before + 1
    assert model.optimizer.skipped_steps == 0
    assert_replicas_agree(model)


@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
@pytest.mark.parametrize("policy", ["float16", "bfloat16"])
def test_stochastic_rounding_on_several_devices(two, policy):
    keras.config.set_dtype_policy(policy)
    try:
        with two.scope():
            keras.utils.set_random_seed(3)
            model = als.wrap_model(normalized())
            inner = keras.optimizers.AdamW(0.01, global_clipnorm=1.0)
            optimizer = als.AdaptiveLossScaleOptimizer(inner, 2.0**7, stochastic_rounding=True)
            model.compile(optimizer, "mse", **GRAPH)
        losses = fit(model, epochs=4).history["loss"]
    finally:
        keras.config.set_dtype_policy("float32")
    assert_replicas_agree(model)
    assert losses[-1] < losses[0]
    assert {v.dtype for v in inner.variables if "velocity" in v.path} == {"float32"}


@pytest.mark.parametrize("build", [network, normalized])
def test_saved_activations_on_several_devices(mixed_float16, two, build):
    plain, saved = (
        ours(two, build, functools.partial(keras.optimizers.SGD, 0.01), saved=format)
        for format in (None, "float8_e5m2")
    )
    losses, losses_of_saved = (fit(each).history["loss"] for each in (plain, saved))
    assert_replicas_agree(saved)
    np.testing.assert_allclose(losses_of_saved, losses, rtol=0.01)
    assert losses_of_saved[1:] != losses[1:]


@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
@pytest.mark.parametrize("build", [network, normalized, Subclass])
def test_exactly_as_plain_keras_in_float32(strategy, build):
    model, plain = ours(strategy, build), keras_own(strategy, build)
    if build is Subclass:  # on all replicas at once
        assert not scaled_layers(model)
        fit(model, epochs=1), fit(plain, epochs=1)
    for layer, r in zip(scaled_layers(model), (5, -7, 3), strict=True):
        layer.log2_scale = r
    fit(model)
    fit(plain)
    assert_replicas_agree(model)
    for actual, expected in zip(weights_of(model), weights_of(plain), strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.long
def test_as_near_to_one_device_as_plain_keras(mixed_float16, strategy):
    one = tf.distribute.get_strategy()

    def distance(make):
        several, alone = make(strategy), make(one)
        fit(several)
        fit(alone)
        pairs = zip(weights_of(several), weights_of(alone), strict=True)
        return max(np.max(np.abs(a - b)) for a, b in pairs)

    assert distance(ours) <= 2 * distance(keras_own)


def test_an_overflow_on_one_replica_skips_the_step_on_all(mixed_float16, strategy):
    model = ours(strategy)
    fit(model)
    before, scales = weights_of(model), scales_of(model)
    y = Y[:16].copy()
    y[-1] = np.inf
    fit(model, X[:16], y, epochs=1)
    assert_replicas_agree(model)
    for value, expected in zip(weights_of(model), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    assert model.optimizer.last_step_skipped
    # It was not finite from the loss on: S is to blame.
    assert scales_of(model) == [scales[0] * 2.0**-10, *scales[1:]]


def test_the_layer_that_overflowed_on_one_replica_is_blamed(mixed_float16, strategy):
    model = ours(strategy)
    fit(model)
    deep = model.get_layer("deep").loss_scaling
    deep.log2_scale = 40
    # Only the last example, on the last replica, has gradients.
    fit(model, X[:16], Y[:16], epochs=1, sample_weight=np.float32([0] * 15 + [1]))
    assert_replicas_agree(model)
    assert model.optimizer.last_step_skipped
    assert deep.log2_scale == 30
    assert {layer.name: layer.overflows for layer in scaled_layers(model)} == {
        "hidden": 0,
        "deep": 1,
        "scores": 0,
    }


@pytest.mark.long
def test_a_custom_loop_does_what_fit_does(mixed_float16, strategy):
    fitted, looped = ours(strategy), ours(strategy)
    fit(fitted)
    optimizer = looped.optimizer
    with strategy.scope():
        optimizer.build(looped.trainable_variables)
    loss_fn = keras.losses.MeanSquaredError()

    @tf.function
    def step(batch):
        def on_replica(batch):
            x, y = batch
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(loss_fn(y, looped(x, training=True)))
            variables = looped.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)

        strategy.run(on_replica, args=(batch,))

    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    for _ in range(2):
        for batch in strategy.experimental_distribute_dataset(batches):
            step(batch)
    assert_replicas_agree(looped)
    assert scales_of(looped) == scales_of(fitted)
    for value, expected in zip(weights_of(looped), weights_of(fitted), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.long
def test_gradient_accumulation_without_graphs(strategy):
    def inner():
        return sgd(gradient_accumulation_steps=2)

    model = ours(strategy, inner=inner, run_eagerly=True)
    plain = keras_own(strategy, inner=inner, run_eagerly=True)
    with pytest.warns(UserWarning, match="Loss scales do nothing"):
        fit(model)
    fit(plain)
    assert_replicas_agree(model)
    for actual, expected in zip(weights_of(model), weights_of(plain), strict=True):
        np.testing.assert_array_equal(actual, expected)


# Both fail in plain Keras, in float32 and without a loss scale too: a conditional that
# merges replicas, and a collective in a loop.


@pytest.mark.xfail(raises=RuntimeError, strict=True)
@pytest.mark.parametrize("make", [ours, keras_own])
def test_gradient_accumulation_in_graphs(mixed_float16, two, make):
    fit(make(two, inner=lambda: sgd(gradient_accumulation_steps=2)))


@pytest.mark.xfail(raises=tf.errors.InvalidArgumentError, strict=True)
@pytest.mark.parametrize("make", [ours, keras_own])
def test_several_steps_per_execution(mixed_float16, two, make):
    fit(make(two, steps_per_execution=2))


@pytest.mark.long
def test_batches_that_are_ragged_or_leave_a_replica_empty(mixed_float16, strategy):
    model = ours(strategy)
    fit(model)
    settled = scales_of(model)
    # The last batch has a single example.
    fit(model, X[:49], Y[:49])
    assert_replicas_agree(model)
    assert model.optimizer.skipped_steps == 0
    # What an empty replica sends are zeros, and nothing has vanished. The gradients of one
    # example may be 16 times those of the mean of 16.
    assert np.all(np.abs(np.subtract(scales_of(model)[1:], settled[1:])) <= 4)


# What it costs.


def collectives(model):
    """How many collectives of what shape a step of training has, on each replica."""
    strategy = model.distribute_strategy
    with strategy.scope():
        model.optimizer.build(model.trainable_variables)
    batches = tf.data.Dataset.from_tensor_slices((X, Y)).batch(16)
    batch = next(iter(strategy.experimental_distribute_dataset(batches)))
    step = tf.function(lambda batch: strategy.run(model.train_step, args=(batch,)))
    graph = step.get_concrete_function(batch).graph.as_graph_def()
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    kinds = collections.Counter(node.op for node in nodes if "Collective" in node.op)
    return {kind: n // strategy.num_replicas_in_sync for kind, n in kinds.items()}


def test_one_small_collective_more_than_plain_keras(mixed_float16, strategy):
    expected = collectives(keras_own(strategy))
    assert expected == {"CollectiveReduceV2": 1}
    assert collectives(ours(strategy)) == {"CollectiveReduceV2": 2}


# Around it.


def test_monitor(mixed_float16, strategy, tmp_path):
    model = ours(strategy)
    history = fit(model, callbacks=[als.LossScaleMonitor(tmp_path / "run", every=2)]).history
    assert history["loss_scale"][-1] == model.optimizer.loss_scale
    run = als.load_run(tmp_path / "run")
    assert list(run.steps) == [2, 4, 6, 8]
    assert list(run.log2_scales[-1]) == scales_of(model)[1:]


def test_stuck_runs_end(mixed_float16, two):
    model = ours(two)
    monitor = als.LossScaleMonitor(stuck_after=3)
    x = X.copy()
    x[:] = np.nan
    with pytest.raises(als.StuckTrainingError, match="input data") as error:
        fit(model, x, callbacks=[monitor], epochs=5)
    assert error.value.explanation.first.phase == "input"


@pytest.mark.long
def test_calibrate(mixed_float16, two):
    model = ours(two)
    before = weights_of(model)
    found = als.calibrate(model, [(X[:16], Y[:16])] * 20)
    assert found.settled
    assert_replicas_agree(model)
    for value, expected in zip(weights_of(model), before, strict=True):
        np.testing.assert_array_equal(value, expected)
    scales = scales_of(model)[1:]
    fit(model, epochs=1)
    assert model.optimizer.skipped_steps == 0
    assert np.all(np.abs(np.subtract(scales_of(model)[1:], scales)) <= 3)


@pytest.mark.long
def test_explain_nonfinite(mixed_float16, two):
    model = ours(two)
    fit(model, epochs=1)
    x = X[:16].copy()
    assert als.explain_nonfinite(model, x, Y[:16]).first is None
    x[3] = np.inf
    assert als.explain_nonfinite(model, x, Y[:16]).first.phase == "input"


def test_saving_and_going_on(mixed_float16, two, tmp_path):
    model = ours(two)
    fit(model)
    model.save(tmp_path / "model.keras")
    with two.scope():
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    fit(model)
    fit(loaded)
    assert_replicas_agree(loaded)
    assert scales_of(loaded) == scales_of(model)
    for value, expected in zip(weights_of(loaded), weights_of(model), strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.long
def test_processes_that_train_in_a_loop_of_their_own(tmp_path):
    worker = pathlib.Path(__file__).parent.parent / "tensorflow_worker.py"
    with socket.socket() as first, socket.socket() as second:
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
        ports = [str(free.getsockname()[1]) for free in (first, second)]
    command = [sys.executable, str(worker), str(tmp_path), "--ports", *ports, "--process"]
    processes = [subprocess.Popen([*command, str(process)]) for process in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    results = [json.loads((tmp_path / f"{process}.json").read_text()) for process in range(2)]
    assert results[0] == results[1]
    assert results[0]["steps"] == [13, 1]
    assert results[0]["overflows"] == [0, 0, 0, 0] and any(results[0]["log2_scales"])


# What cannot be.


def test_a_strategy_that_cannot_sum_is_refused(mixed_float16):
    central = tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"])
    model = ours(central)
    with pytest.raises(ValueError, match="Received: CentralStorageStrategy"):
        fit(model)
    assert not model.optimizer.built


@pytest.mark.parametrize(
    "kind", [tf.distribute.experimental.ParameterServerStrategy, tf.distribute.TPUStrategy]
)
def test_strategies_of_other_machines_are_refused(mixed_float16, monkeypatch, kind):
    strategy = object.__new__(kind)
    model = ours(tf.distribute.get_strategy())
    monkeypatch.setattr(tf.distribute, "get_strategy", lambda: strategy)
    monkeypatch.setattr(tf.distribute, "has_strategy", lambda: True)
    with pytest.raises(ValueError, match=f"Received: {kind.__name__}"):
        model.optimizer.build(model.trainable_variables)


def test_xla_compiles_for_one_device_only(mixed_float16, two):
    model = ours(two, jit_compile=True)
    with pytest.raises(ValueError, match="Compile it with `jit_compile=False`"):
        fit(model)
    model = ours(tf.distribute.OneDeviceStrategy("CPU:0"), jit_compile=True)
    fit(model, epochs=1)


def test_a_model_from_outside_of_the_scope(mixed_float16, two):
    keras.utils.set_random_seed(3)
    model = als.wrap_model(network())
    with two.scope(), pytest.raises(ValueError, match="scope"):
        model.compile(als.AdaptiveLossScaleOptimizer(sgd()), loss="mse", **GRAPH)
        fit(model)


def test_an_optimizer_from_outside_of_the_scope(mixed_float16, two):
    with two.scope():
        model = als.wrap_model(network())
    optimizer = als.AdaptiveLossScaleOptimizer(sgd())
    with pytest.raises(RuntimeError, match="Mixing different"):
        model.compile(optimizer, loss="mse", **GRAPH)
        fit(model)
