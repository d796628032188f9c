"""`forward_range`: overflows of the forward pass are found where they are made."""

import math
import re

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests import any_models
from tests.backends import ON_JAX
from tf_adaptive_ls import plots
from tf_adaptive_ls.backend import keras_internals

pytestmark = pytest.mark.usefixtures("mixed_float16")

LARGEST = 65504.0


def constant(value):
    return keras.initializers.Constant(value)


def dense(units=8, value=0.125, **kwargs):
    return layers.Dense(units, kernel_initializer=constant(value), **kwargs)


def model_of(middle, width=8):
    """Layers that hand eight ones to `middle`, and what takes its outputs."""
    inputs = keras.Input((width,))
    outputs = layers.Dense(2, dtype="float32", name="last")(middle(inputs))
    return keras.Model(inputs, outputs)


# On JAX Keras builds one wrongly, and cannot run another in float16. How often a loop runs may
# change when numbers are rounded.
NOT_ON_JAX = (*any_models.NOT_ON_JAX, any_models.remat_block)
LEFT_OUT = (*(NOT_ON_JAX if ON_JAX else ()), any_models.loop_of_varying_length)
KINDS = [kind for kind in any_models.KINDS if kind not in LEFT_OUT]
ONES = [np.ones((4, 8), "float32")]


def ranges_of(model, batches=ONES, **kwargs):
    return {part.name: part for part in als.forward_range(model, batches, **kwargs).parts}


def verdicts_of(model, batches=ONES, **kwargs):
    parts = ranges_of(model, batches, **kwargs).values()
    return {part.name: part.verdicts for part in parts if part.verdicts}


class RMSNorm(layers.Layer):
    """As many write it: the square overflows, its inverse root is 0, and so is the output."""

    def call(self, x):
        return x * ops.rsqrt(ops.mean(ops.square(x), axis=-1, keepdims=True) + 1e-3)


class Gated(layers.Layer):
    """Its own product overflows, none of its parts does."""

    def __init__(self, value, **kwargs):
        super().__init__(**kwargs)
        self.gate, self.up = dense(value=value, name="gate"), dense(value=value, name="up")
        self.norm = layers.LayerNormalization(name="norm")

    def call(self, x):
        return self.norm(self.gate(x) * self.up(x))


class Branch(keras.Model):
    """A model with a call of its own, around an author's layer."""

    def __init__(self, value):
        super().__init__()
        self.first, self.gated = dense(name="first"), Gated(value, name="gated")
        self.last = layers.Dense(2, dtype="float32", name="last")

    def call(self, x):
        return self.last(self.gated(self.first(x)))


class TestVerdicts:
    def test_outputs_that_are_too_large(self):
        model = model_of(dense(value=2.0**13, name="wide"))  # 2**16
        assert verdicts_of(model) == {"wide": ("output",)}

    def test_a_layer_that_casts_what_is_too_large(self):
        def middle(x):
            x = dense(value=2.0**13, dtype="float32", name="wide")(x)
            return layers.BatchNormalization(name="norm")(x)

        assert verdicts_of(model_of(middle), training=False) == {"norm": ("entry", "output")}

    def test_a_layer_that_reads_float32_as_it_is(self):
        def middle(x):
            x = dense(value=2.0**13, dtype="float32", name="wide")(x)
            return layers.LayerNormalization(name="norm")(x)

        assert verdicts_of(model_of(middle)) == {}

    def test_what_is_silently_zero(self):
        """Finite, so that no NaN tells of it."""
        model = model_of(lambda x: RMSNorm(name="norm")(x * 300.0))
        assert np.all(np.isfinite(model(ONES[0])))
        parts = ranges_of(model)
        assert parts["norm"].verdicts == ("inside",)
        assert parts["norm"].error == 1.0
        assert parts["norm"].largest_out < 2

    def test_what_an_operation_between_layers_does(self):
        def middle(x):
            y = ops.multiply(dense()(x), 2.0**17)
            return ops.multiply(y, 2.0**-17)

        (name,) = verdicts_of(model_of(middle))
        assert name.startswith("multiply")

    def test_what_an_authors_layer_does_between_its_parts(self):
        found = verdicts_of(model_of(Gated(2.0**6, name="gated")))
        assert found == {"gated": ("inside",)}

    def test_attention_whose_scores_overflow(self):
        attention = layers.MultiHeadAttention(2, 4, name="attention")

        def middle(x):
            x = layers.LayerNormalization()(layers.Reshape((4, 2))(x))
            return layers.Flatten()(attention(x, x))

        model = model_of(middle)
        for weight in attention.weights:
            if "query/kernel" in weight.path or "key/kernel" in weight.path:
                weight.assign(weight * 1000.0)
        data = [np.random.default_rng(0).normal(size=(4, 8)).astype("float32")]
        # JAX asks for the product of queries and keys in float32.
        assert verdicts_of(model, data) == ({} if ON_JAX else {"attention": ("inside",)})

    def test_nothing_hides_behind_another(self):
        def middle(x):
            x = dense(value=2.0**13, name="first")(x)
            x = layers.LayerNormalization(name="norm")(x + ops.cast(ONES[0][0], x.dtype))
            return RMSNorm(name="second")(layers.Rescaling(0.0, 300.0)(x))

        found = verdicts_of(model_of(middle))
        assert {"first", "second"} <= set(found)


class TestRoom:
    @pytest.mark.parametrize("room, found", [(0, False), (1, False), (2, True), (3, True)])
    def test_values_may_grow_by_so_many_binades(self, room, found):
        model = model_of(dense(value=2.0**11, name="wide"))  # 2**14
        assert bool(verdicts_of(model, room=room)) == found

    def test_what_would_overflow_inside(self):
        """Squares of 200 are below 65504, those of 400 are not."""
        model = model_of(lambda x: RMSNorm(name="norm")(x * 200.0))
        assert verdicts_of(model, room=0) == {}
        part = ranges_of(model, room=1)["norm"]
        assert part.verdicts == ("inside",) and part.error < 1e-2 and part.error_grown == 1.0

    @pytest.mark.parametrize("value, found", [(LARGEST, False), (65536.0, True)])
    def test_the_largest_number_fits(self, value, found):
        model = model_of(layers.Rescaling(value, name="scaled"))
        assert bool(verdicts_of(model, room=0)) == found

    def test_figures(self):
        part = ranges_of(model_of(dense(value=16.0, name="wide")))["wide"]
        assert (part.kind, part.float_format, part.calls) == ("Dense", "float16", 1)
        assert (part.largest_in, part.largest_out, part.casts) == (1.0, 128.0, True)
        assert part.room == math.log2(LARGEST / 128)
        assert part.error == 0.0 and part.verdicts == ()
        assert part.room_of_inputs("float8_e4m3fn") == math.log2(448)

    def test_the_worst_batch_counts(self):
        model = model_of(dense(value=1.0, name="wide"))
        part = ranges_of(model, [ONES[0], 4 * ONES[0], ONES[0]])["wide"]
        assert (part.calls, part.largest_in, part.largest_out) == (3, 4.0, 32.0)

    def test_zeros(self):
        part = ranges_of(model_of(dense(name="wide")), [0 * ONES[0]])["wide"]
        assert part.room == math.inf and part.verdicts == ()

    def test_the_smallest_number(self):
        part = ranges_of(model_of(layers.Activation("linear", name="same")), [ONES[0] * 2.0**-24])
        assert part["same"].largest_out == 2.0**-24 and part["same"].error == 0.0


class TestNoFalseAlarm:
    @pytest.mark.parametrize(
        "layer",
        [
            layers.Dropout(0.5),
            layers.GaussianNoise(1.0),
            layers.AlphaDropout(0.3),
            layers.Dense(8, "softmax"),
            layers.Lambda(lambda x: ops.where(x > 0, x, -math.inf)),
        ],
        ids=lambda layer: layer.name,
    )
    def test_of_layers(self, layer):
        data = [np.random.default_rng(0).normal(size=(4, 8)).astype("float32")]
        model = model_of(lambda x: layers.Activation("softmax")(layer(x)))
        assert verdicts_of(model, data) == {}

    def test_of_a_decision(self):
        """Which of two nearly equal numbers is larger may change when they are rounded."""

        def middle(x):
            return layers.Lambda(lambda x: ops.one_hot(ops.argmax(x, axis=-1), 8))(x)

        data = [(1 + np.random.default_rng(0).uniform(size=(64, 8)) * 1e-4).astype("float32")]
        assert verdicts_of(model_of(middle), data) == {}

    @pytest.mark.filterwarnings("ignore:`build\\(\\)` was called")
    @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
    def test_of_any_model(self, kind):
        model, (x, _) = kind()
        model(x)
        result = als.forward_range(model, [(x,)])
        assert result.flagged == ()
        assert not [part for part in result.parts if part.problem]


class TestModels:
    def test_a_composite_of_an_author_and_what_is_in_it(self):
        model = Branch(2.0**6)
        model(ONES[0])
        inside = ["first", "gated", "gated/gate", "gated/up", "gated/norm", "last"]
        assert list(ranges_of(model)) == [model.name, *inside]
        assert verdicts_of(model) == {"gated": ("inside",)}

    def test_nested_and_shared(self):
        inner = model_of(dense(value=2.0**13, name="wide"))
        inputs = keras.Input((8,))
        model = keras.Model(inputs, inner(inputs) + inner(inputs * 2.0))
        part = ranges_of(model)[f"{inner.name}/wide"]
        assert part.calls == 2 and part.largest_out == 2.0**17
        assert verdicts_of(model) == {f"{inner.name}/wide": ("output",)}

    def test_a_recurrent_layer_is_one_part(self):
        inputs = keras.Input((5, 8))
        outputs = layers.Bidirectional(layers.LSTM(4, name="lstm"), name="both")(inputs)
        model = keras.Model(inputs, layers.Dense(2)(outputs))
        parts = ranges_of(model, [np.ones((2, 5, 8), "float32")])
        assert set(parts) == {model.name, "both", model.layers[-1].name}
        assert parts["both"].error < 1e-2

    def test_layers_that_run_again_in_the_backward_pass(self):
        with keras.RematScope("full"):
            model = model_of(dense(value=2.0**13, name="wide"))
        assert verdicts_of(model) == {"wide": ("output",)}

    def test_several_inputs(self):
        a, b = keras.Input((8,), name="a"), keras.Input((8,), name="b")
        x = layers.Add(name="sum")([a, dense(value=2.0**12, name="wide")(b)])
        model = keras.Model({"a": a, "b": b}, layers.Dense(2, dtype="float32")(x))
        data = [{"a": ONES[0], "b": ONES[0]}]
        assert verdicts_of(model, data) == {
            "wide": ("output",),
            "sum": ("entry", "output"),
        }

    def test_a_sequential_model_that_casts(self):
        inner = keras.Sequential([layers.LayerNormalization(), dense()], name="inner")

        def middle(x):
            return inner(dense(value=2.0**13, dtype="float32")(x))

        found = verdicts_of(model_of(middle))
        assert found["inner"] == ("entry",)

    def test_an_input_of_float16(self):
        inputs = keras.Input((8,), dtype="float16")
        model = keras.Model(inputs, layers.Dense(2, dtype="float32")(inputs))
        assert verdicts_of(model, [2.0**17 * ONES[0]]) == {model.name: ("entry",)}

    @pytest.mark.parametrize(
        "wrap", [als.wrap_model, lambda model: als.wrap_model(model, float8=als.Float8())]
    )
    def test_wrapped(self, wrap):
        def build():
            keras.utils.set_random_seed(0)
            return Branch(2.0**6)

        results = []
        for change in (lambda model: model, wrap):
            model = build()
            model(ONES[0])
            parts = als.forward_range(change(model), ONES).parts
            results.append([_without_numbers(f"{part}") for part in parts])
        assert results[0] == results[1]

    def test_wrapped_by_hand(self):
        model = model_of(als.LossScaled(dense(value=2.0**13, name="wide")))
        assert verdicts_of(model) == {"wide": ("output",)}

    @pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
    def test_what_has_the_range_of_float32(self, policy):
        keras.config.set_dtype_policy(policy)
        result = als.forward_range(model_of(dense(value=2.0**20)), ONES)
        assert result.flagged == ()
        assert "No part of this model computes in a dtype with less range" in str(result)


def _without_numbers(text):
    return re.sub(r"_\d+\b", "", text)


class TestNothingChanges:
    def test_of_the_model(self):
        inputs = keras.Input((8,))
        x = layers.Dropout(0.5)(layers.BatchNormalization()(inputs))
        x = layers.Dense(8, activity_regularizer="l2")(x)
        model = keras.Model(inputs, Gated(1.0)(x))
        parts = keras_internals.parts_of(model)
        before = [
            [v.numpy() for v in model.variables],
            [part.dtype_policy for part in parts],
            [sorted(vars(part)) for part in parts],
            model(ONES[0]),
            len(model.losses),
        ]
        als.forward_range(model, ONES)
        after = [
            [v.numpy() for v in model.variables],
            [part.dtype_policy for part in parts],
            [sorted(vars(part)) for part in parts],
            model(ONES[0]),
            len(model.losses),
        ]
        keras.tree.map_structure(np.testing.assert_array_equal, before[0], after[0])
        assert before[1:3] == after[1:3] and before[4] == after[4]
        np.testing.assert_array_equal(before[3], after[3])

    def test_if_the_model_raises(self):
        model = model_of(dense(name="wide"))
        with pytest.raises(ValueError, match="shape"):
            als.forward_range(model, [np.ones((4, 9), "float32")])
        assert "call" not in vars(model.get_layer("wide"))
        assert model.get_layer("wide").compute_dtype == "float16"


class TestBadInput:
    def test_a_model_that_is_not_finite_in_float32_either(self):
        model = model_of(layers.Lambda(lambda x: ops.log(x - 1.0), name="log"))
        with pytest.raises(ValueError, match=r"finite in float32.*first produced by 'log'"):
            als.forward_range(model, ONES)

    def test_a_cast_that_is_written_out(self):
        model = model_of(lambda x: ops.cast(ops.cast(x, "float32") * 2.0**16, "float16"))
        with pytest.raises(ValueError, match=r"first produced by 'cast.*explicit cast"):
            als.forward_range(model, ONES)

    @pytest.mark.parametrize("batches", [[], iter(())])
    def test_no_batch(self, batches):
        with pytest.raises(ValueError, match="at least one batch"):
            als.forward_range(model_of(dense()), batches)

    @pytest.mark.parametrize("room", [-1, 17, math.nan, "2", None, True])
    def test_room(self, room):
        with pytest.raises(ValueError, match="`room` to be a number of binades"):
            als.forward_range(model_of(dense()), ONES, room)

    def test_no_model(self):
        with pytest.raises(ValueError, match="`forward_range` expected a built model"):
            als.forward_range(dense(), ONES)
        with pytest.raises(ValueError, match="not built yet"):
            als.forward_range(keras.Sequential([dense()]), ONES)


def test_it_prints_parts_with_a_verdict_first():
    def middle(x):
        return layers.LayerNormalization(name="norm")(dense(value=2.0**13, name="wide")(x))

    text = str(als.forward_range(model_of(middle), ONES))
    lines = [line.split() for line in text.splitlines()]
    assert lines[2][:3] == ["wide", "Dense", "float16"] and "output" in lines[2]
    assert text.endswith(
        "1 part overflows, or would at values 4 times as large. The model's outputs are not finite."
    )


def test_a_cast_that_is_hidden_later_is_seen():
    model = model_of(lambda x: ops.tanh(ops.cast(ops.cast(x, "float32") * 2.0**16, "float16")))
    (part,) = als.forward_range(model, ONES).flagged
    assert part.kind == "Cast" and part.verdicts == ("output",) and part.room == -math.inf


def test_the_picture_shows_parts_at_their_magnitudes():
    result = als.forward_range(model_of(dense(value=2.0**10, name="wide")), ONES)
    (axes,) = plots.plot_forward_range(result).axes
    inputs, outputs = axes.collections[1:3]
    rows = [part.name for part in result.parts if part.float_format == "float16"]
    np.testing.assert_array_equal(inputs.get_offsets()[rows.index("wide")], [0, 0])
    np.testing.assert_array_equal(outputs.get_offsets()[rows.index("wide")], [13, 0])
