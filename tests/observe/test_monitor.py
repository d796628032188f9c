"""`LossScaleMonitor`: figures in the logs, records that survive, and no run stuck for ever."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX, value_and_gradients
from tests.graphs import floats
from tests.steps import scaled_layers
from tf_adaptive_ls.observe.html_page import page_of
from tf_adaptive_ls.observe.monitor import RunWriter
from tf_adaptive_ls.observe.record.snapshot import Snapshot

GRAPH = {"jit_compile": JIT}
X, Y = floats(64, 4), floats(64, 2)


def network(loss="mse", float8=None, **mode):
    inputs = keras.Input((4,))
    x = layers.Dense(8, "relu", name="hidden")(inputs)
    plain = keras.Model(inputs, layers.Dense(2, name="scores")(x))
    model = als.wrap_model(plain, float8=float8)
    model.compile(als.AdaptiveLossScaleOptimizer("adam", 2.0**10), loss=loss, **(mode or GRAPH))
    return model


def fit(model, monitor, epochs=2, x=X, y=Y, batch_size=8, **kwargs):
    callbacks = [monitor, *kwargs.pop("callbacks", [])]
    return model.fit(
        x, y, batch_size, epochs, verbose=0, shuffle=False, callbacks=callbacks, **kwargs
    )


def told(caught):
    """The warnings for a user; Keras gives others of its own on JAX."""
    return [warning for warning in caught if warning.category is UserWarning]


# Logs.


@pytest.mark.parametrize(
    "mode", [{"run_eagerly": True}, GRAPH, {"jit_compile": True}], ids=["eager", "graph", "xla"]
)
def test_logs_hold_scale_skips_and_underflow(mixed_float16, mode, tmp_path):
    model = network(**mode)
    csv = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, als.LossScaleMonitor(every=3), callbacks=[csv]).history
    assert history["loss_scale"][-1] == model.optimizer.loss_scale
    assert history["skipped_steps"] == [0, 0]
    worst = max(layer.spectrum.underflow_share for layer in scaled_layers(model))
    assert history["underflow"][-1] == worst
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    assert {"loss_scale", "skipped_steps", "underflow"} <= set(header)


def test_the_progress_bar_shows_them(mixed_float16, capsys):
    network().fit(X, Y, 8, verbose=1, callbacks=[als.LossScaleMonitor(every=2)])
    bar = capsys.readouterr().out
    assert "loss_scale: 1024" in bar and "skipped_steps: 0" in bar and "underflow:" in bar


def test_the_device_is_read_at_the_interval_only(mixed_float16, monkeypatch):
    reads = []
    of = Snapshot.of
    monkeypatch.setattr(Snapshot, "of", lambda *args: reads.append(args) or of(*args))
    monitor = als.LossScaleMonitor(every=20)
    assert monitor.async_safe
    fit(network(), monitor, epochs=1, batch_size=1)
    # At the begin, after 20, 40 and 60 of 64 steps, and at the ends of epoch and training.
    assert len(reads) == 1 + 3 + 1 + 1


# Records.


def test_records_hold_every_figure_of_every_layer(mixed_float16, tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    model = network()
    fit(model, als.LossScaleMonitor(path, every=3), epochs=2)
    run = als.load_run(path)
    assert run.layers == ["hidden", "scores"] and run.layer_classes == ["Dense", "Dense"]
    # Each epoch has 8 steps, and looks at its end.
    assert run.steps.tolist() == [3, 6, 11, 14, 16]
    assert run.skipped_steps.tolist() == [0] * 5
    assert run.log2_loss_scale[-1] == np.log2(model.optimizer.loss_scale)
    for i, layer in enumerate(scaled_layers(model)):
        layer_snapshot = layer.snapshot
        assert run.log2_scales[-1, i] == layer.log2_scale
        assert run.log2_sampled_at[-1, i] == layer_snapshot.log2_sampled_at
        assert run.overflows[-1, i] == layer.overflows
        np.testing.assert_array_equal(run.spectra[-1, i], layer.spectrum.counts)
        np.testing.assert_allclose(run.underflow[-1, i], layer.spectrum.underflow_share, 1e-5)
        np.testing.assert_allclose(run.subnormal[-1, i], layer.spectrum.subnormal_share, 1e-5)
    assert np.isfinite(run.logs["loss"]).all() and "loss_scale" not in run.logs
    assert als.load_run(path, max_snapshots=2).steps.tolist() == [3, 16]
    table = [row for row in als.scale_table(model) if row.log2_scale is not None]
    assert run.table() == table


def test_records_tell_about_float8(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    float8 = als.Float8.hybrid(layer_filter=lambda layer: layer.name == "scores")
    model = network(float8=float8)
    history = fit(model, als.LossScaleMonitor(path, every=4, tensorboard=tmp_path / "board"))
    run, (_, layer) = als.load_run(path), scaled_layers(model)
    assert [each and each.name for each in run.float8.forward] == [None, "float8_e4m3fn"]
    assert [each and each.name for each in run.float8.backward] == [None, "float8_e5m2"]
    shown = layer.snapshot
    np.testing.assert_array_equal(run.float8.spectra[-1, 1], shown.operands.counts)
    assert run.float8.spectra[-1, 1].sum() > 0 and not run.float8.spectra[:, 0].any()
    assert np.isnan(run.float8.flushed[-1, 0])
    np.testing.assert_allclose(run.float8.flushed[-1, 1], shown.flushed_share, 1e-5)
    assert history.history["float8_flushed"][-1] == shown.flushed_share
    assert run.float8.saturations[-1].tolist() == [0, shown.saturations]
    first, second = run.table()
    assert second in als.scale_table(model) and first.float8 == ""
    assert "saturated steps" in page_of(run, "run")
    tags = {
        value.tag
        for file in (tmp_path / "board").iterdir()
        for event in tf.compat.v1.train.summary_iterator(str(file))
        for value in event.summary.value
    }
    assert {"float8_saturations/scores", "float8_flushed/scores"} <= tags
    assert "float8_flushed/hidden" not in tags


def test_of_float8_nothing_is_told_before_training(mixed_float16):
    model = network(float8=als.Float8(layer_filter=lambda layer: True))
    run = als.snapshot_run(model)
    assert np.isnan(run.float8.flushed).all() and not run.float8.spectra.any()
    assert [row.float8 for row in run.table()] == ["e4m3fn, e5m2"] * 2
    assert [row.flushed for row in run.table()] == [None] * 2


def test_a_live_model_makes_a_run_of_one_moment(mixed_float16):
    model = network()
    model.fit(X, Y, verbose=0)
    run = als.snapshot_run(model)
    assert run.steps.tolist() == [model.optimizer.steps] == [2]
    np.testing.assert_array_equal(run.spectra[0, 1], scaled_layers(model)[1].spectrum.counts)


def test_overflows_are_counted_by_layer(mixed_float16):
    model = network()
    model.fit(X, Y, verbose=0)
    model.get_layer("hidden").loss_scaling.log2_scale += 14
    model.fit(X[:32], Y[:32], verbose=0)
    assert model.optimizer.skipped_in_a_row == 1
    assert [layer.overflows for layer in scaled_layers(model)] == [1, 0]
    model.fit(np.full_like(X[:32], np.nan), Y[:32], verbose=0)
    assert model.optimizer.skipped_in_a_row == 2
    model.fit(X[:32], Y[:32], verbose=0)
    assert model.optimizer.skipped_in_a_row == 0
    assert (model.optimizer.skipped_steps, model.optimizer.steps) == (2, 5)


def test_a_sample_is_told_at_the_scale_it_was_taken_at(mixed_float16):
    model = network()
    model.fit(X, Y, verbose=0)
    layer = model.get_layer("hidden").loss_scaling
    binades = layer.snapshot.binades
    layer.log2_scale += 5
    assert layer.snapshot.binades == binades
    (row,) = [row for row in als.scale_table(model) if row.name == "hidden"]
    assert row.binades == binades


def test_a_second_fit_appends(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    model = network()
    for _ in range(2):
        fit(model, als.LossScaleMonitor(path, every=4), epochs=1)
    assert als.load_run(path).steps.tolist() == [4, 8, 12, 16]


def test_a_run_that_starts_anew_supersedes_what_comes_after(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    for epochs in (3, 1):  # from step 0 each, as after going back to a checkpoint
        fit(network(), als.LossScaleMonitor(path, every=4), epochs=epochs)
    assert als.load_run(path).steps.tolist() == [4, 8]
    assert path.read_text().count('"step":24,') == 1  # nothing is lost


@pytest.mark.parametrize("length", [1, 30, 200])
def test_an_unfinished_line_is_dropped(mixed_float16, tmp_path, length):
    path = tmp_path / "run.jsonl"
    model = network()
    fit(model, als.LossScaleMonitor(path, every=4), epochs=1)
    *whole, last = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole) + last[:length])
    assert als.load_run(path).steps.tolist() == [4]
    fit(model, als.LossScaleMonitor(path, every=4), epochs=1)
    assert als.load_run(path).steps.tolist() == [4, 12, 16]
    for line in path.read_text().splitlines():
        json.loads(line)


PROGRAM = """
    import os, sys
    import keras, numpy as np
    import tf_adaptive_ls as als

    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((4,))
    model = als.wrap_model(keras.Model(inputs, keras.layers.Dense(2, name="scores")(inputs)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse")
    x = np.ones((8, 4), "float32")

    class Tell(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            self.steps += 1
            print(self.steps, flush=True)

    model.fit(x, x[:, :2], batch_size=8, epochs=100_000, verbose=0,
              callbacks=[als.LossScaleMonitor(sys.argv[1], every=1), Tell()])
"""


@pytest.mark.long
def test_a_killed_process_loses_at_most_one_record(tmp_path):
    path = tmp_path / "run.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    with process:
        until = int(np.random.default_rng().integers(5, 60))
        step = 0
        while step < until:
            step = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
        last = int(rest[-1]) if rest and rest[-1].isdigit() else step
    steps = als.load_run(path).steps.tolist()
    assert steps == list(range(1, len(steps) + 1))
    assert last - 1 <= steps[-1] <= last + 1


def test_another_file_is_left_alone(mixed_float16, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("precious\n")
    with pytest.raises(ValueError, match=r"Expected the path of a new file.*Received: .*notes"):
        fit(network(), als.LossScaleMonitor(path))
    assert path.read_text() == "precious\n"
    with pytest.raises(ValueError, match=r"Expected the record of a run.*Received: .*notes"):
        als.load_run(path)
    path.write_text("")
    with pytest.raises(ValueError, match="does not begin like one"):
        als.load_run(path)


def test_a_record_that_cannot_be_written_does_not_stop_training(mixed_float16, tmp_path):
    (tmp_path / "file").write_text("")
    model = network()
    monitor = als.LossScaleMonitor(
        tmp_path / "file" / "run.jsonl", tensorboard=tmp_path / "file" / "board", every=2
    )
    with pytest.warns(UserWarning, match="LossScaleMonitor cannot write to") as caught:
        fit(model, monitor)
    assert len(told(caught)) == 2  # one each, once
    assert model.optimizer.steps == 16


def test_a_full_disk_does_not_stop_training(mixed_float16, tmp_path, monkeypatch):
    def full(self, line):
        raise OSError(28, "No space left on device")

    path = tmp_path / "run.jsonl"
    monitor = als.LossScaleMonitor(path, every=2)
    model = network()
    model.fit(X, Y, verbose=0)
    writer = RunWriter
    monkeypatch.setattr(writer, "add", lambda self, *args: full(self, None))
    with pytest.warns(UserWarning, match="No space left on device") as caught:
        fit(model, monitor)
    assert len(told(caught)) == 1


def test_steps_per_execution_and_dynamic_ends_of_data(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    model = network()
    model.compile(model.optimizer, loss="mse", steps_per_execution=4, jit_compile=JIT)
    fit(model, als.LossScaleMonitor(path, every=4), epochs=2)
    assert als.load_run(path).steps.tolist() == [4, 8, 12, 16]


# TensorBoard.


def test_tensorboard_can_read_what_is_written(mixed_float16, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model = network()
    fit(model, als.LossScaleMonitor(tensorboard=tmp_path, every=8), epochs=2)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    tags = events.Tags()["tensors"]
    each = ("log2_scale", "overflows", "underflow", "subnormal", "gradient_binades")
    assert set(tags) == {"log2_loss_scale", "skipped_steps"} | {
        f"{kind}/{name}" for kind in each for name in ("hidden", "scores")
    }
    plugins = {tag: events.SummaryMetadata(tag).plugin_data.plugin_name for tag in tags}
    histograms = {tag for tag, plugin in plugins.items() if plugin == "histograms"}
    assert histograms == {"gradient_binades/hidden", "gradient_binades/scores"}
    assert set(plugins.values()) == {"scalars", "histograms"}

    scalars = events.Tensors("log2_scale/hidden")
    assert [event.step for event in scalars] == [8, 16]
    hidden = model.get_layer("hidden").loss_scaling
    total = np.log2(model.optimizer.loss_scale) + hidden.log2_scale
    assert tf.make_ndarray(scalars[-1].tensor_proto) == total
    left, right, count = tf.make_ndarray(
        events.Tensors("gradient_binades/hidden")[-1].tensor_proto
    ).T
    np.testing.assert_array_equal(right - left, np.ones(40))
    np.testing.assert_array_equal(count, hidden.spectrum.counts[1:-1])
    occupied = left[np.flatnonzero(count)]
    assert (occupied[0], occupied[-1]) == hidden.snapshot.binades


# Stuck runs.


def stuck(model, x=X, y=Y, before=16, **monitor):
    """Trains well, then badly; returns the error and the weights before."""
    monitor = als.LossScaleMonitor(**{"every": 4, "stuck_after": 6, **monitor})
    if before:
        model.fit(X[:before], Y[:before], batch_size=8, verbose=0)
    weights = [v.numpy() for v in model.variables if not v.overwrite_with_gradient]
    with pytest.raises(als.StuckTrainingError) as caught:
        fit(model, monitor, epochs=10, x=x, y=y)
    after = [v.numpy() for v in model.variables if not v.overwrite_with_gradient]
    return caught.value, weights, after


def test_nan_in_the_data(mixed_float16, tmp_path):
    model = network()
    path = tmp_path / "run.jsonl"
    error, before, after = stuck(model, np.full_like(X, np.nan), path=path)
    first = error.explanation.first
    assert (first.phase, first.tensor, first.kind) == ("input", "x", "NaN")
    message = str(error)
    assert "the last 8 steps were skipped, all since step 2" in message
    assert "The first NaN is in the input data: x" in message
    assert "Loss scale S: 2^" in message
    for a, b in zip(after, before, strict=True):  # the last good weights
        np.testing.assert_array_equal(a, b)
    assert als.load_run(path).steps[-1] == model.optimizer.steps == 10
    # Nothing is left behind: the model trains on.
    fit(model, als.LossScaleMonitor(), epochs=1)


def test_an_overflow_of_the_forward_pass(mixed_float16):
    """No loss scale can mend it: the layers are named, and what mends them."""
    model = network()
    model.set_weights([1e5 * w if w.ndim == 2 else w for w in model.get_weights()])
    error, *_ = stuck(model, before=0)
    assert error.explanation.first.phase == "forward"
    names = [part.name for part in als.forward_range(model, [X], room=0).flagged]
    assert names and f"In the forward pass '{names[0]}'" in str(error)
    assert "`tf_adaptive_ls.widen(model, batches)` makes them compute in float32" in str(error)
    assert als.widen(model, [X], room=0).remaining == {}


def test_inf_in_the_loss(mixed_float16):
    fault = keras.Variable(1.0, trainable=False)
    model = network(lambda y, y_pred: ops.mean((y - y_pred) ** 2) * fault)
    model.fit(X, Y, verbose=0)
    fault.assign(np.inf)
    first = stuck(model, before=0)[0].explanation.first
    assert (first.phase, first.kind) == ("loss", "Inf")


def test_the_logarithm_of_zero_inside_a_layer(mixed_float16):
    class Log(layers.Layer):
        def call(self, x):
            return ops.log(x)

    inputs = keras.Input((4,))
    x = Log(name="log")(layers.Dense(4, "relu", bias_initializer="ones")(inputs))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2)(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", **GRAPH)
    first = stuck(model, -1e3 * np.abs(X), before=0)[0].explanation.first
    assert (first.phase, first.layer) == ("forward", "log")


def test_a_weight_gradient_that_overflows_whatever_the_scale(mixed_float16):
    class Divided(layers.Dense):
        """A Dense layer whose weight gradient is divided by what may be zero."""

        def build(self, input_shape):
            super().build(input_shape)
            self.divisor = self.add_weight(name="divisor", initializer="ones", trainable=False)

        def call(self, x):
            @ops.custom_gradient
            def divided(kernel, divisor):
                def backward(gradient):
                    return gradient / divisor, ops.zeros_like(divisor)

                return ops.convert_to_tensor(kernel), backward

            kernel = divided(*(ops.cast(v, x.dtype) for v in (self.kernel, self.divisor)))
            return ops.add(ops.matmul(x, kernel), self.bias)

    inputs = keras.Input((4,))
    x = Divided(4, name="divided")(layers.Dense(4, name="hidden")(inputs))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="scores")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", **GRAPH)
    model.fit(X, Y, verbose=0)
    model.get_layer("divided").divisor.assign(0.0)
    error = stuck(model, before=0)[0]
    first = error.explanation.first
    assert (first.phase, first.layer, first.tensor) == ("backward", "divided", "gradient of kernel")
    assert "Layers blamed in this run: 'divided'" in str(error)


def test_a_nan_weight(mixed_float16):
    model = network()
    model.get_layer("hidden").kernel.assign(np.full((4, 8), np.nan))
    first = stuck(model, before=0)[0].explanation.first
    assert (first.phase, first.layer, first.tensor) == ("weights", "hidden", "kernel")


def test_a_run_that_ends_stuck_says_so(mixed_float16):
    model = network()
    with pytest.raises(als.StuckTrainingError, match="explain_nonfinite") as caught:
        fit(model, als.LossScaleMonitor(stuck_after=8), epochs=1, x=np.full_like(X, np.inf))
    assert caught.value.explanation is None


def test_bad_batches_that_end_by_themselves(mixed_float16):
    x = X.copy()
    x[:48] = np.nan  # 6 of 8 batches
    model = network()
    with pytest.warns(UserWarning, match="With the next batch, which was examined"):
        fit(model, als.LossScaleMonitor(stuck_after=6), x=x, epochs=1)
    # One batch was looked into, the other trained on.
    assert (model.optimizer.steps, model.optimizer.skipped_steps) == (7, 6)


def test_it_can_be_told_never_to_stop(mixed_float16):
    model = network()
    fit(model, als.LossScaleMonitor(every=4, stuck_after=None), x=np.full_like(X, np.nan))
    assert model.optimizer.skipped_steps == 16


def test_a_step_that_cannot_be_run_again_is_told_all_the_same(mixed_float16):
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=None):
            if training is None:
                raise TypeError("not like this")
            return ops.mean(y_pred)

    inputs = keras.Input((4,))
    model = als.wrap_model(Own(inputs, layers.Dense(2)(inputs)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), **GRAPH)
    with pytest.raises(als.StuckTrainingError, match="could not be run again: not like this"):
        fit(
            model, als.LossScaleMonitor(every=4, stuck_after=4), epochs=2, x=np.full_like(X, np.nan)
        )


# Arguments.


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "often"])
@pytest.mark.parametrize("name", ["every", "stuck_after"])
def test_bad_intervals_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"Expected `{name}`.*Received: {name}="):
        als.LossScaleMonitor(**{name: value})


def test_another_optimizer_is_refused_before_training():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match=r"Expected a model compiled with .* Received: .* SGD"):
        fit(model, als.LossScaleMonitor())


def net(size, outputs, name):
    last = layers.Dense(outputs, dtype="float32")
    return als.wrap_model(
        keras.Sequential([keras.Input((size,)), layers.Dense(4, name=name), last])
    )


class Gan(keras.Model):
    """With a `compile` of its own, as those of Keras's examples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.generator, self.critic = (
            als.wrap_model(
                keras.Sequential(
                    [
                        keras.Input((n,)),
                        layers.Dense(4, name=name),
                        layers.Dense(m, dtype="float32"),
                    ]
                )
            )
            for n, m, name in ((2, 3, "made"), (3, 1, "judged"))
        )

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer

    def call(self, x):
        return self.critic(x)

    def train_step(self, *args):
        return gan_step(self, *args)


def gan_step(gan, real):
    noise = ops.ones((8, 2))
    for net, optimizer, sign in (
        (gan.critic, gan.d_optimizer, 1.0),
        (gan.generator, gan.g_optimizer, -1.0),
    ):

        def loss(optimizer=optimizer, sign=sign):
            fake = gan.generator(noise, training=True)
            scores = gan.critic(fake, training=True) - gan.critic(real, training=True)
            return optimizer.scale_loss(sign * ops.mean(scores))

        variables = net.trainable_variables
        _, gradients = value_and_gradients(loss, variables)
        optimizer.apply(gradients, variables)
    return {"loss": ops.zeros(())}


def adaptive():
    return als.AdaptiveLossScaleOptimizer("sgd", 2.0**8)


@pytest.mark.skipif(ON_JAX, reason="this `train_step` is TensorFlow's")
def test_optimizers_under_names_of_the_users_own(mixed_float16, tmp_path):
    gan, path = Gan(), tmp_path / "run.jsonl"
    gan.compile(adaptive(), adaptive())
    monitor = als.LossScaleMonitor(path, every=2, tensorboard=tmp_path / "logs")
    x = np.ones((32, 3), "float32")
    logs = gan.fit(x, batch_size=8, epochs=2, verbose=0, callbacks=[monitor]).history
    for name, layer in (("d_optimizer", "judged"), ("g_optimizer", "made")):
        assert len(logs[f"{name}_loss_scale"]) == len(logs[f"{name}_skipped_steps"]) == 2
        run = als.load_run(tmp_path / f"run-{name}.jsonl")
        assert run.layers[0].endswith(layer) and len(run.layers) == 2
        assert run.steps[-1] == 8
        assert any((tmp_path / "logs" / name).iterdir())
    # And one of them, or as somebody calls them.
    logs = gan.fit(
        x, batch_size=8, verbose=0, callbacks=[als.LossScaleMonitor(optimizer=gan.d_optimizer)]
    ).history
    assert "loss_scale" in logs
    named = als.LossScaleMonitor(optimizer={"a": gan.d_optimizer, "b": gan.g_optimizer})
    logs = gan.fit(x, batch_size=8, verbose=0, callbacks=[named]).history
    assert {"a_loss_scale", "b_underflow"} <= logs.keys()


@pytest.mark.parametrize("optimizer", ["sgd", {"d": "sgd"}, [None]])
def test_only_adaptive_optimizers_are_watched(optimizer):
    with pytest.raises(ValueError, match=r"`optimizer` to be an AdaptiveLossScaleOptimizer"):
        als.LossScaleMonitor(optimizer=optimizer)


def test_a_model_without_scaled_layers_is_watched_too(mixed_float16, tmp_path):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(inputs))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", **GRAPH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has none
        history = fit(model, als.LossScaleMonitor(tmp_path / "run.jsonl", every=4)).history
    assert "loss_scale" in history
    assert als.load_run(tmp_path / "run.jsonl").spectra.shape == (4, 0, 42)


@pytest.mark.parametrize("version", [2, 4])
def test_a_record_of_another_version_is_refused(version, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(f'{{"tf_adaptive_ls":{version},"step":0,"layers":[],"classes":[]}}\n')
    with pytest.raises(ValueError, match=rf"of version 3. Received: .* of version {version}"):
        als.load_run(path)


def test_a_damaged_line_is_left_out(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    fit(network(), als.LossScaleMonitor(path, every=2))
    expected = als.load_run(path)
    assert len(expected.steps) == 8
    lines = path.read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"log2_scales":[', '"log2_scales":[1')
    path.write_text("".join(lines))
    with pytest.warns(UserWarning, match="1 of its 9 lines are damaged and left out"):
        run = als.load_run(path)
    np.testing.assert_array_equal(run.steps, np.delete(expected.steps, 2))
    np.testing.assert_array_equal(run.spectra, np.delete(expected.spectra, 2, axis=0))


def test_a_record_of_another_model_is_left_alone(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    fit(network(), als.LossScaleMonitor(path, every=2))
    before = path.read_bytes()
    inputs = keras.Input((4,))
    other = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="other")(inputs)))
    other.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", **GRAPH)
    with pytest.warns(UserWarning, match="it is the record of another model, with") as caught:
        fit(other, als.LossScaleMonitor(path, every=2))
    assert len(told(caught)) == 1
    assert other.optimizer.steps == 16
    assert path.read_bytes() == before


HOLDER = """
    import sys
    from tf_adaptive_ls.observe.record.exclusive_file import ExclusiveFile

    file = ExclusiveFile(sys.argv[1])
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.long
def test_a_record_that_another_process_writes_is_left_alone(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    ) as process:
        assert process.stdout.readline() == "held\n"
        model = network()
        with pytest.warns(UserWarning, match="another process is writing it") as caught:
            fit(model, als.LossScaleMonitor(path, every=2))
        assert len(told(caught)) == 1 and model.optimizer.steps == 16
        assert path.read_bytes() == b""
        process.kill()
    fit(model, als.LossScaleMonitor(path, every=2))  # the dead hold no locks
    assert len(als.load_run(path).steps) == 8


def test_an_interrupted_run_gives_way_to_the_next_in_its_process(mixed_float16, tmp_path):
    path = tmp_path / "run.jsonl"
    model, interrupted = network(), als.LossScaleMonitor(path, every=2)
    stop = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[interrupted, stop])
    fit(model, als.LossScaleMonitor(path, every=2))
    steps = als.load_run(path).steps
    assert np.all(np.diff(steps) > 0)
    with pytest.warns(UserWarning, match="another run in this process writes it now"):
        interrupted.on_epoch_end(0)


def test_a_record_that_vanishes_is_told_once(mixed_float16, tmp_path):
    path = tmp_path / "runs" / "run.jsonl"
    vanish = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: shutil.rmtree(path.parent, ignore_errors=True)
    )
    model = network()
    with pytest.warns(UserWarning, match=r"cannot write to .*No such file") as caught:
        fit(model, als.LossScaleMonitor(path, every=2), callbacks=[vanish])
    assert len(told(caught)) == 1 and model.optimizer.steps == 16
    assert not path.parent.exists()


@pytest.mark.parametrize(("every_nth", "told_of"), [(10, True), (100, False)])
def test_many_skips_are_told_of_though_never_many_in_a_row(every_nth, told_of, mixed_float16):
    x = np.concatenate([X[:8]] * 350)
    x[:: 8 * every_nth] = np.nan
    y = np.concatenate([Y[:8]] * 350)
    model = network()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, als.LossScaleMonitor(), epochs=2, x=x, y=y)
    messages = [str(warning.message) for warning in told(caught)]
    assert bool(messages) == told_of
    if told_of:
        (message,) = messages
        assert re.match(r"30 of the last 300 steps were skipped", message)
        assert "scale_table(model)" in message
