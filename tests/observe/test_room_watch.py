"""`LossScaleMonitor(batch=…)`: how far the forward pass is from overflow while a model trains."""

import math
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops
from numpy.testing import assert_array_equal

import tf_adaptive_ls as als
from tests import any_models
from tests.backends import JIT, ON_JAX
from tests.graphs import floats
from tf_adaptive_ls import plots
from tf_adaptive_ls.__main__ import main
from tf_adaptive_ls.observe.forward_range import room_watch
from tf_adaptive_ls.observe.forward_range.compiled_pass import CompiledPass
from tf_adaptive_ls.observe.forward_range.room_watch import RoomWatch

pytestmark = pytest.mark.usefixtures("mixed_float16")

ONES = np.ones((4, 8), "float32")
LARGEST = 65504.0


class RMSNorm(layers.Layer):
    """Its square overflows long before its inputs and outputs do."""

    def call(self, x):
        return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + 1e-3)


class Mask(layers.Layer):
    """Adds what hides some values: large, and always the same."""

    def call(self, x):
        return x + ops.cast([0.0] * 7 + [-10000.0], x.dtype)


def growing(*after):
    """A layer that returns its inputs times a number, and what reads that."""
    inputs = keras.Input((8,))
    x = layers.Dense(8, use_bias=False, kernel_initializer="identity", name="grows")(inputs)
    for layer in after:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(2, dtype="float32", name="last")(x))


def grown_to(model, magnitude):
    model.get_layer("grows").set_weights([magnitude * np.eye(8)])


def warnings_of(watch, model, magnitudes, every=10):
    """What is warned of while outputs of the layer "grows" take magnitudes: steps and messages."""
    found = []
    for record, magnitude in enumerate(magnitudes):
        grown_to(model, magnitude)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch.look(every * record)
        told = [str(each.message) for each in caught if each.category is UserWarning]
        found += [(every * record, message) for message in told]
    return found


def as_figures(parts):
    """What a compiled pass can know of parts, and all digits that do not depend on compiling."""
    return [
        (p.name, p.float_format, p.calls, p.casts, f"{p.largest_in:.5g}", f"{p.largest_out:.5g}")
        for p in parts
    ]


class TestCompiledPass:
    KINDS = (
        any_models.shared,
        any_models.dicts_in_and_out,
        any_models.recurrent,
        any_models.vit,
        any_models.submodel_twice,
        *(() if ON_JAX else (any_models.remat_layers,)),
    )

    @pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_it_finds_what_forward_range_finds(self, kind, eager):
        keras.utils.set_random_seed(0)
        model, (x, _) = kind()
        model(x)
        model.run_eagerly = eager
        expected = als.forward_range(model, [x])
        before = [np.array(v) for v in model.variables]
        found = CompiledPass(model, x).ranges(2)
        assert as_figures(found) == as_figures(expected.parts)
        assert all(map(np.array_equal, before, model.variables))

    def test_it_sees_weights_as_they_are_now(self):
        model = growing()
        compiled = CompiledPass(model, ONES)
        for magnitude in (1.0, 1000.0, 3.0):
            grown_to(model, magnitude)
            assert compiled.ranges(2)[1].largest_out == magnitude

    def test_it_sees_past_what_overflows(self):
        model = growing(layers.Rescaling(0.5, name="half"))
        grown_to(model, 2.0**17)
        _, grows, half, _ = CompiledPass(model, ONES).ranges(2)
        assert (grows.verdicts, grows.largest_out) == (("output",), 2.0**17)
        assert (half.verdicts, half.largest_out) == (("entry", "output"), 2.0**16)


class TestRoomWatch:
    def test_rooms_are_binades_up_to_overflow(self):
        model = growing(layers.LayerNormalization(name="norm"))
        watch = RoomWatch(model, ONES)
        grown_to(model, LARGEST / 2**6)
        rooms = watch.look(0)
        # A LayerNormalization reads in float32, and the last layer is no part of float16.
        assert list(rooms) == ["grows", "norm"]
        assert (rooms["grows"], watch.least) == (6.0, 6.0)
        assert rooms["norm"] > 14

    def test_what_comes_near_is_told_of_once(self):
        model = growing()
        falling = [LARGEST / 2**room for room in (5.5, 5.2, 4.9, 4.6, 4.3, 3.9, 3.5, 1.0, -1.0)]
        ((step, message),) = warnings_of(RoomWatch(model, ONES), model, falling)
        assert step == 50
        assert "At step 50 the forward pass is close to overflow" in message
        assert "'grows' has 3.9 binades left in float16, 1.3 less than 40 steps before" in message
        assert "`tf_adaptive_ls.widen(model, batches)`" in message

    def test_what_heads_for_overflow_is_told_of_before_it_is_near(self):
        model = growing()
        falling = [LARGEST / 2**room for room in (12, 11.2, 10.4, 9.6, 8.8, 8.0, 7.2)]
        ((step, message),) = warnings_of(RoomWatch(model, ONES), model, falling)
        assert step == 50 and "going on like that it overflows at step 150" in message

    @pytest.mark.parametrize(
        "rooms",
        [
            (3.0,) * 8,
            (5.0, 4.9, 4.8, 4.7, 4.6, 4.5, 4.4, 4.3, 4.2),  # slowly
            (15.0, 12.0, 10.5, 9.5, 9.0, 8.75, 8.6, 8.5),  # ever more slowly
            (8, 7, 8, 7, 8, 7, 8, 7),
            (40.0, 30.0, 25.0, 20.0, 16.0, 14.0, 13.0, 12.5),  # from next to nothing
        ],
    )
    def test_of_what_is_sound_nothing_is_told(self, rooms):
        model = growing()
        magnitudes = [LARGEST / 2.0**room for room in rooms]
        assert warnings_of(RoomWatch(model, ONES), model, magnitudes) == []

    def test_a_large_mask_is_nothing_new(self):
        model = growing(Mask(name="mask"))
        watch = RoomWatch(model, ONES)
        assert warnings_of(watch, model, [1.0, 1.5, 1.0]) == []
        assert watch.least == pytest.approx(math.log2(LARGEST / 10000), abs=1e-3)

    def test_what_overflows_from_the_first_step_on_is_told_of_there(self):
        model = growing()
        ((step, message),) = warnings_of(RoomWatch(model, ONES), model, [2 * LARGEST] * 3)
        assert step == 0 and "'grows' has -1.0 binades left" in message

    def test_what_overflows_inside_is_told_of_though_room_is_left(self):
        model = growing(RMSNorm(name="norm"))
        falling = [LARGEST / 2**room for room in (12.0, 11.0, 10.5, 10.0, 9.5, 9.0, 8.5)]
        ((step, message),) = warnings_of(RoomWatch(model, ONES), model, falling)
        # Looked at when values have doubled: of 45, 4 times as large, the square is below 65504,
        # of 128 it is beyond that.
        assert step == 50 and "'norm' overflows in what it computes in between" in message

    def test_parts_are_run_by_themselves_when_values_have_doubled(self, monkeypatch):
        runs, original = [], room_watch.ranges_of

        def counted(*args, **kwargs):
            runs.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(room_watch, "ranges_of", counted)
        model = growing()
        watch = RoomWatch(model, ONES)
        for magnitude, expected in ((1.0, 1), (3.0, 1), (8.0, 2), (15.0, 2), (8.0, 2), (17.0, 3)):
            grown_to(model, magnitude)
            watch.look(0)
            assert len(runs) == expected, magnitude

    def test_many_are_counted(self):
        model = growing(*[layers.Activation("linear") for _ in range(8)])
        ((_, message),) = warnings_of(RoomWatch(model, ONES), model, [2 * LARGEST])
        assert "and 4 more" in message

    def test_nothing_is_narrow(self):
        keras.config.set_dtype_policy("float32")
        model = growing()
        watch = RoomWatch(model, ONES)
        assert watch.look(0) == {} and watch.least == math.inf


# In the monitor.

X, Y = floats(64, 8), floats(64, 2)


def trained(epochs=2, **monitor):
    """A wrapped model that is trained with a monitor, and its history."""
    keras.utils.set_random_seed(0)
    model = als.wrap_model(growing(layers.BatchNormalization(name="norm"), layers.Dropout(0.5)))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", jit_compile=JIT)
    callbacks = [als.LossScaleMonitor(every=3, **monitor)] if monitor else []
    history = model.fit(X, Y, 8, epochs, verbose=0, shuffle=False, callbacks=callbacks)
    return model, history.history


def test_room_is_logged_recorded_and_drawn(tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    model, history = trained(batch=(X[:8], Y[:8]), path=path)
    run = als.load_run(path)
    found = run.forward_rooms
    assert_array_equal(found.steps, [0, *run.steps])
    expected = RoomWatch(model, X[:8]).look(16)
    assert found.parts == list(expected)
    np.testing.assert_allclose(found.rooms[-1], list(expected.values()), rtol=1e-3)
    assert history["forward_room"][-1] == pytest.approx(found.least[-2], rel=1e-3)

    above, axes, _ = plots.plot_forward_rooms(path).axes
    assert_array_equal(above.lines[0].get_ydata(), found.least)
    assert_array_equal(axes.collections[0].get_array(), found.rooms.T)
    main([str(path), "-o", str(tmp_path), "--html"])
    assert (tmp_path / "forward_rooms.png").exists()
    assert "binades left at its nearest" in (tmp_path / "report.html").read_text()


def test_training_is_the_same_bit_for_bit():
    (plain, _), (watched, _) = trained(), trained(batch=X[:8])
    assert all(map(np.array_equal, plain.get_weights(), watched.get_weights()))


def test_without_a_batch_there_is_none(tmp_path):
    path = tmp_path / "run.jsonl"
    _, history = trained(path=path)
    assert "forward_room" not in history and als.load_run(path).forward_rooms is None
    with pytest.raises(ValueError, match=r"LossScaleMonitor\(batch=…\).*one without a batch"):
        plots.plot_forward_rooms(path)
    with pytest.raises(ValueError, match=r"Received: 3 \(of type int\)"):
        plots.plot_forward_rooms(3)


def test_a_second_process_goes_on_where_the_first_was_stopped(tmp_path):
    path = tmp_path / "run.jsonl"
    trained(batch=X[:8], path=path)
    trained(epochs=1, batch=X[:8], path=path)
    assert_array_equal(als.load_run(path).forward_rooms.steps, [0, 0, 3, 6, 8])


def test_tensorboard_shows_it(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trained(epochs=1, batch=X[:8], tensorboard=tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert [e.step for e in events.Tensors("forward_room/grows")] == [0, 3, 6, 8]


@pytest.mark.parametrize(
    "batch",
    ["x", 3, (), [], (None,), np.zeros((0, 8)), iter([X])],
    ids=["string", "number", "empty tuple", "empty list", "none", "no example", "iterator"],
)
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(ValueError, match=r"Expected `batch` to be one small batch.*Received: "):
        als.LossScaleMonitor(batch=batch)


def test_a_batch_that_is_not_finite_is_refused_before_training():
    bad = np.full((2, 8), np.nan, "float32")
    with pytest.raises(ValueError, match=r"finite in float32"):
        trained(batch=bad)
