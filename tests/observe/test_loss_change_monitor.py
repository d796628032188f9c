"""`LossChangeMonitor`: chords add up, records survive, and training is as without."""

import signal
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import floats

X, Y = floats(64, 4), floats(64, 2)
DATA = [(X[:16], Y[:16]), (X[16:32], Y[16:32])]


def network(optimizer=None, dropout=0.1):
    """A compiled model in float16, of 8 steps per epoch; wrapped unless told its optimizer."""
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy("mixed_float16")
    x = inputs = keras.Input((4,))
    x = layers.Dense(6, name="first")(x)
    x = layers.Dropout(dropout)(ops.relu(layers.BatchNormalization(name="norm")(x)))
    model = keras.Model(inputs, layers.Dense(2, dtype="float32", name="last")(x))
    if optimizer is None:
        model = als.wrap_model(model)
        optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.01))
    model.compile(optimizer, loss="mse", jit_compile=JIT)
    return model


def fit(model, *callbacks, epochs=2, x=X):
    settings = {"batch_size": 8, "shuffle": False, "verbose": 0}
    return model.fit(x, Y, epochs=epochs, callbacks=list(callbacks), **settings).history


def loss_of(model, data=DATA):
    return np.mean([float(ops.mean(ops.square(model(x) - y))) for x, y in data])


def test_chords_add_up_to_the_whole_change_of_the_loss(tmp_path):
    model = network()
    monitor = als.LossChangeMonitor(
        DATA, tmp_path / "run.jsonl", every=3, tolerance=1e-4, max_intervals=32
    )
    history = fit(model, monitor, epochs=3)
    found = als.load_run(tmp_path / "run.jsonl").loss_changes
    assert found.layers == ["first", "norm", "last"]
    np.testing.assert_array_equal(found.steps, [3, 6, 8, 11, 14, 16, 19, 22, 24])
    np.testing.assert_array_equal(found.since, [0, *found.steps[:-1]])
    np.testing.assert_allclose(found.loss_before[1:], found.loss_after[:-1], rtol=1e-8)
    allocated = found.allocated.sum() + found.statistics.sum()
    assert allocated == pytest.approx(found.loss_after[-1] - found.loss_before[0], abs=9e-4)
    assert found.loss_after[-1] == pytest.approx(loss_of(model), abs=1e-3)
    assert (found.error <= 1e-4).all()
    assert history["loss_change_error"] == pytest.approx(found.error[2::3])
    assert np.isnan(found.as_trained).all()
    assert ((found.helping > 0) & (found.helping < 1)).all()
    assert (found.standard_errors > 0).all()


def test_training_is_the_same_as_without(tmp_path):
    plain, watched = network(), network()
    fit(plain)
    fit(watched, als.LossChangeMonitor(DATA, every=3, as_trained=True))
    variables = zip(
        [*plain.variables, *plain.optimizer.variables],
        [*watched.variables, *watched.optimizer.variables],
        strict=True,
    )
    for one, other in variables:
        np.testing.assert_array_equal(one.value, other.value, err_msg=one.path)


def test_single_steps(tmp_path):
    path = tmp_path / "run.jsonl"
    fit(network(), als.LossChangeMonitor(DATA, path, every=4, single_steps=True))
    found = als.load_run(path).loss_changes
    np.testing.assert_array_equal(found.steps - found.since, 1)
    np.testing.assert_array_equal(found.since[:2], [0, 4])
    fit(network(), als.LossChangeMonitor(DATA, path, every=1, single_steps=True))
    np.testing.assert_array_equal(als.load_run(path).loss_changes.since, range(16))


def test_as_trained_it_is_nearly_the_same_where_nothing_is_lost(tmp_path):
    model = network()
    fit(model)  # until scales have settled
    path = tmp_path / "run.jsonl"
    fit(model, als.LossChangeMonitor(DATA, path, every=8, as_trained=True, tolerance=1e-4))
    found = als.load_run(path).loss_changes
    scale = np.abs(found.allocated).max()
    np.testing.assert_allclose(found.as_trained, found.allocated, atol=0.02 * scale)
    assert (found.as_trained != found.allocated).any()


@pytest.mark.parametrize("ours_first", [True, False])
def test_one_file_with_the_scales(ours_first, tmp_path):
    path = tmp_path / "run.jsonl"
    callbacks = [als.LossChangeMonitor(DATA, path, every=4), als.LossScaleMonitor(path, every=2)]
    fit(network(), *callbacks[:: 1 if ours_first else -1])
    run = als.load_run(path)
    np.testing.assert_array_equal(run.steps, range(2, 17, 2))
    np.testing.assert_array_equal(run.loss_changes.steps, [4, 8, 12, 16])
    assert "first" in str(run.table())
    few = als.load_run(path, 2)
    assert (len(few.steps), len(few.loss_changes.steps)) == (2, 4)
    fit(network(), als.LossScaleMonitor(path, every=2))  # the file is free again


def test_models_without_scales_have_a_record_too(tmp_path):
    keras_own = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), initial_scale=2.0)
    for optimizer in ("adam", keras_own):
        path = tmp_path / f"{type(optimizer).__name__}.jsonl"
        monitor = als.LossChangeMonitor(DATA, path, every=5, as_trained=True)
        fit(network(optimizer), monitor, epochs=1)
        run = als.load_run(path)
        assert len(run.steps) == 0
        assert len(run.loss_changes.steps) == 2
        assert run.loss_changes.steps[-1] in (7, 8)  # skipped steps do not count there
        assert np.isfinite(run.loss_changes.as_trained).all()


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """What comes after the checkpoint is superseded, and the record is as if undisturbed."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == 13:
                raise KeyboardInterrupt

    def run(name, *callbacks):
        backup = keras.callbacks.BackupAndRestore(tmp_path / name)
        monitor = als.LossChangeMonitor(DATA, tmp_path / f"{name}.jsonl", every=3)
        # Keras saves no seeds of dropout.
        fit(network(dropout=0), backup, monitor, *callbacks, epochs=3)

    run("undisturbed")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", Stop())
    run("stopped")
    expected, found = (
        als.load_run(tmp_path / f"{name}.jsonl").loss_changes for name in ("undisturbed", "stopped")
    )
    for name, values in vars(expected).items():
        np.testing.assert_array_equal(getattr(found, name), values, err_msg=name)


KILLED = """
import sys
sys.path[:0] = {path}
from tests.observe.test_loss_change_monitor import *
class Kill(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        if batch == 7:
            os.kill(os.getpid(), signal.SIGKILL)
fit(network(), als.LossChangeMonitor(DATA, sys.argv[1], every=3), Kill())
"""


@pytest.mark.long
def test_records_survive_a_kill(tmp_path):
    path = tmp_path / "run.jsonl"
    program = KILLED.format(path=sys.path)
    process = subprocess.run([sys.executable, "-c", program, path], check=False)
    assert process.returncode == -signal.SIGKILL
    np.testing.assert_array_equal(als.load_run(path).loss_changes.steps, [3, 6])


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monitor = als.LossChangeMonitor(DATA, tensorboard=tmp_path, every=8, as_trained=True)
    fit(network(), monitor, epochs=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()["tensors"]
    expected = {"loss_change/first", "loss_change_as_trained/last", "loss_change/error"}
    assert expected <= set(tags)


def test_a_path_that_is_not_finite_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    data = [(np.full_like(X, np.nan), Y)]
    with pytest.warns(UserWarning, match="leaves out steps 0 to 8: .* a loss of nan"):
        fit(network(), als.LossChangeMonitor(data, path, every=8), epochs=1)
    with pytest.raises(ValueError, match="at least one snapshot"):
        als.load_run(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": 3}, "data as for `fit`"),
        ({"data": iter(DATA)}, "repeatedly"),
        ({"every": 0}, "steps, at least 1"),
        ({"path": ""}, "path of a file"),
        ({"tensorboard": 3}, "path of a file"),
        ({"single_steps": 1}, "single_steps"),
        ({"as_trained": "yes"}, "as_trained"),
        ({"tolerance": -1}, "tolerance"),
        ({"max_intervals": 3}, "max_intervals"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(ValueError, match=f"(?s)Expected.*{message}"):
        als.LossChangeMonitor(**{"data": DATA, **settings})
