"""`widen`: what overflows in the forward pass computes in float32, and nothing else does."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_adaptive_ls as als
from tests.backends import JIT, ON_JAX
from tests.observe.test_forward_range import ONES, Branch, Gated, RMSNorm, dense, model_of
from tf_adaptive_ls.backend.keras_internals import parts_of

pytestmark = pytest.mark.usefixtures("mixed_float16")

BIG = 2.0**13  # eight of them make 2**16


def dtypes_of(model):
    return {part.name: part.compute_dtype for part in parts_of(model) if part.variables}


def wide(model):
    return {name for name, dtype in dtypes_of(model).items() if dtype == "float32"}


def outputs_of(model, x=ONES[0]):
    return keras.tree.map_structure(ops.convert_to_numpy, model(x))


def between(x):
    y = dense(name="cheap")(x) * 2.0**17
    return layers.Dense(8, name="after")(y * 2.0**-17)


def residual(x):
    for i in range(3):
        h = layers.LayerNormalization(name=f"norm{i}")(x)
        x = layers.Add(name=f"add{i}")([x, dense(value=BIG * (i == 0), name=f"dense{i}")(h + 1)])
    return layers.LayerNormalization(name="end")(x)


# By name: what is in the middle of a model, and what of it is to be widened.
KINDS = {
    "output": (lambda x: dense(value=BIG, name="wide")(x), {"wide"}),
    "inside": (lambda x: RMSNorm(name="norm")(layers.Rescaling(300.0)(x)), {"norm"}),
    "between": (between, {"cheap"}),
    "residual": (residual, {"dense0", "add0", "add1", "add2"}),
    "nothing": (lambda x: dense(name="wide")(x), set()),
}


@pytest.mark.parametrize("kind", KINDS)
class TestEachKind:
    def test_is_mended_and_nothing_else_is_touched(self, kind):
        middle, expected = KINDS[kind]
        keras.utils.set_random_seed(0)
        model = model_of(middle)
        weights = model.get_weights()
        widening = als.widen(model, ONES)
        assert set(widening.names) == expected and widening.remaining == {}
        by_layer = {layer.name: layer.compute_dtype for layer in model.layers}
        assert {name for name, dtype in by_layer.items() if dtype == "float32"} - {
            "last",
            model.layers[0].name,
        } == expected
        assert als.forward_range(model, ONES).flagged == ()
        assert np.all(np.isfinite(outputs_of(model)))
        keras.tree.map_structure(np.testing.assert_array_equal, weights, model.get_weights())

    def test_can_be_undone_and_done_again(self, kind):
        model = model_of(KINDS[kind][0])
        before, policies = outputs_of(model), [part.dtype_policy for part in parts_of(model)]
        widening = als.widen(model, ONES)
        names, widened = widening.names, outputs_of(model)
        widening.undo()
        assert widening.names == ()
        np.testing.assert_array_equal(outputs_of(model), before)
        assert [part.dtype_policy for part in parts_of(model)] == policies
        again = als.widen(model, names=names)
        assert again.names == names and again.share_narrow is None
        np.testing.assert_array_equal(outputs_of(model), widened)

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_wrapped(self, kind, when):
        results = []
        for is_wrapped in (False, True):
            keras.utils.set_random_seed(0)
            model = keras.models.clone_model(model_of(KINDS[kind][0]))
            if is_wrapped and when == "before":
                model = als.wrap_model(model)
            names = als.widen(model, ONES).names
            if is_wrapped and when == "after":
                model = als.wrap_model(model)
            if is_wrapped:
                model = als.strip_model(model)
            results.append((names, outputs_of(model)))
        assert results[0][0] == results[1][0]
        np.testing.assert_array_equal(results[0][1], results[1][1])

    def test_is_saved(self, kind, tmp_path):
        model = model_of(KINDS[kind][0])
        als.widen(model, ONES)
        model.save(tmp_path / "model.keras")
        custom = {"RMSNorm": RMSNorm}
        loaded = keras.models.load_model(tmp_path / "model.keras", custom_objects=custom)
        assert [layer.compute_dtype for layer in loaded.layers] == [
            layer.compute_dtype for layer in model.layers
        ]
        np.testing.assert_array_equal(outputs_of(loaded), outputs_of(model))


class Stream(keras.Model):
    """A residual stream in a `call` of its own: each addition is its own operation."""

    def __init__(self):
        super().__init__()
        self.embed = dense(value=BIG / 4, name="embed")  # 2**14
        self.norms = [layers.LayerNormalization(name=f"norm{i}") for i in range(2)]
        self.branches = [layers.Dense(8, name=f"branch{i}") for i in range(2)]
        self.last_norm = layers.LayerNormalization(name="last_norm")
        self.last = layers.Dense(2, dtype="float32", name="last")

    def call(self, x):
        x = self.embed(x) * 8.0
        for norm, branch in zip(self.norms, self.branches, strict=True):
            x = x + branch(norm(x))
        return self.last(self.last_norm(x))


class TestWhatIsMadeOfLayers:
    def test_the_cheapest_that_suffice(self):
        model = Stream()
        model(ONES[0])
        widening = als.widen(model, ONES)
        assert widening.remaining == {}
        # TensorFlow does not add float32 to float16: there all that is added has to be wide.
        assert widening.names == (("embed",) if ON_JAX else ("embed", "branch0", "branch1"))
        assert widening.share_narrow == (2 / 3 if ON_JAX else 0.0)
        assert np.all(np.isfinite(outputs_of(model)))

    def test_an_authors_layer(self):
        model = Branch(2.0**6)
        model(ONES[0])
        widening = als.widen(model, ONES)
        # Of two factors one is enough, where Keras's backend multiplies float32 by float16.
        assert set(widening.names) <= {"gated/gate", "gated/up"}
        assert len(widening.names) == (1 if ON_JAX else 2)
        assert als.forward_range(model, ONES).flagged == ()

    def test_a_graph_in_a_model_with_a_call_of_its_own(self):
        """On TensorFlow, what the graph returns then cannot be added to what is narrow."""

        class Outer(keras.Model):
            def __init__(self):
                super().__init__()
                self.first = dense(name="first")
                inputs = keras.Input((8,))
                self.graph = keras.Model(inputs, dense(value=BIG, name="wide")(inputs))
                self.last = layers.LayerNormalization(name="last")

            def call(self, x):
                x = self.first(x)
                return self.last(x + self.graph(x))

        model = Outer()
        model(ONES[0])
        widening = als.widen(model, ONES)
        assert widening.remaining == {} and f"{model.graph.name}/wide" in widening.names
        assert np.all(np.isfinite(outputs_of(model)))

    def test_names_are_asked_for_again_in_a_model_made_anew(self):
        model = model_of(Gated(2.0**6, name="gated"))
        names = als.widen(model, ONES).names
        loaded = model_of(Gated(2.0**6, name="gated"))
        loaded.set_weights(model.get_weights())
        assert als.forward_range(loaded, ONES).flagged
        als.widen(loaded, names=names)
        np.testing.assert_array_equal(outputs_of(loaded), outputs_of(model))

    def test_attention_as_a_whole(self):
        attention = layers.MultiHeadAttention(2, 4, name="attention")

        def middle(x):
            x = layers.LayerNormalization()(layers.Reshape((4, 2))(x))
            return layers.Flatten()(attention(x, x))

        model = model_of(middle)
        for weight in attention.weights:
            if "query/kernel" in weight.path or "value/kernel" in weight.path:
                weight.assign(weight * 1e5)
        data = [np.random.default_rng(0).normal(size=(4, 8)).astype("float32")]
        assert als.widen(model, data).names[0] == "attention"
        assert {part.compute_dtype for part in parts_of(attention)} == {"float32"}

    def test_a_sequential_model_that_casts(self, tmp_path):
        inner = keras.Sequential([layers.LayerNormalization(), dense()], name="inner")
        model = model_of(lambda x: inner(dense(value=BIG, dtype="float32")(x)))
        assert als.widen(model, ONES).names == ("inner",)
        assert np.all(np.isfinite(outputs_of(model)))
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        np.testing.assert_array_equal(outputs_of(loaded), outputs_of(model))


@pytest.mark.parametrize("wrap", [lambda model: model, als.wrap_model], ids=["plain", "wrapped"])
def test_training_goes_on_without_nan(wrap):
    """The step that was compiled before is forgotten, for a nested model too."""
    model = wrap(model_of(model_of(residual)))
    optimizer = keras.optimizers.SGD(1e-3)
    if wrap is als.wrap_model:
        optimizer = als.AdaptiveLossScaleOptimizer(optimizer)
    else:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(optimizer, "mse", jit_compile=JIT)
    data = np.random.default_rng(0).normal(size=(16, 8)).astype("float32"), np.ones((16, 2))
    before = [w.numpy() for w in model.layers[-1].trainable_variables[:1]]
    model.fit(*data, verbose=0)
    np.testing.assert_array_equal(before[0], model.layers[-1].trainable_variables[0])
    als.widen(model, [data])
    history = model.fit(*data, epochs=20, verbose=0).history["loss"]
    assert np.all(np.isfinite(history)) and history[-1] < history[0]


def test_a_cast_that_is_written_out_is_not_mended():
    model = model_of(lambda x: ops.tanh(ops.cast(ops.cast(x, "float32") * 2.0**16, "float16")))
    widening = als.widen(model, ONES)
    assert widening.names == () and list(widening.remaining.values()) == ["output"]
    assert "Not repaired:\n  cast" in str(widening)


def test_it_prints_what_and_why():
    widening = als.widen(model_of(between), ONES)
    lines = str(widening).splitlines()
    assert lines[0] == "Computed in float32:"
    assert lines[1].startswith("  cheap: feeds multiply") and lines[1].endswith(": output")
    assert lines[2] == "50 % of multiplications stay narrow."
    assert str(als.widen(model_of(dense()), ONES)) == "Nothing was widened."


class TestBadInput:
    @pytest.mark.parametrize("arguments", [{}, {"batches": ONES, "names": ["wide"]}])
    def test_neither_or_both(self, arguments):
        with pytest.raises(ValueError, match="either `batches` or `names`"):
            als.widen(model_of(dense(name="wide")), **arguments)

    def test_unknown_names(self):
        model = model_of(dense(value=BIG, name="wide"))
        with pytest.raises(ValueError, match=r"names of parts.*\['deep'\].*'wide'"):
            als.widen(model, names=["wide", "deep"])
        assert wide(model) == {"last"}

    def test_a_model_that_is_not_finite_in_float32(self):
        model = model_of(lambda x: layers.Lambda(ops.log, name="log")(dense()(x) * 0.0 - 1.0))
        with pytest.raises(ValueError, match="finite in float32"):
            als.widen(model, ONES)
        assert wide(model) == {"last"}
