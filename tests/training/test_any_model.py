"""Any Keras model: exact, trained in float16, saved, stripped."""

import copy as copy_module
import pickle

import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tests import any_models
from tests.steps import plans_of
from tf_adaptive_ls.training.layer_scaling import LayerScaling

pytestmark = [
    pytest.mark.filterwarnings("ignore:Loss scales do nothing"),
    pytest.mark.filterwarnings("ignore:.*looks like it has unbuilt state"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer"),
]

ON_JAX = keras.backend.backend() == "jax"
KINDS = {kind.__name__: kind for kind in any_models.KINDS}


@pytest.fixture(params=KINDS, name="kind")
def _kind(request):
    kind = KINDS[request.param]
    if kind in any_models.NOT_ON_JAX and ON_JAX:
        pytest.skip("plain Keras cannot train it on JAX")
    return kind


def built(kind, policy="float32"):
    """A model, its batch, and its loss."""
    keras.utils.clear_session(free_memory=False)  # names begin anew
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    model, batch = kind()
    return model, batch, any_models.LOSSES.get(kind, "mse")


def scalings(model):
    return [each for each in model._flatten_layers() if isinstance(each, LayerScaling)]


def trained(model, batch, loss, optimizer, steps=3, scales=None):
    """The weights after each step, run eagerly."""
    model.compile(optimizer, loss=loss, run_eagerly=True)
    weights = []
    for _ in range(steps):
        if scales is not None:
            for each in scalings(model):
                each.log2_scale = int(scales.integers(-20, 20))
        model.train_on_batch(*batch)
        weights.append([w.numpy() for w in model.weights if not hasattr(w, "loss_scaled")])
    return weights


def test_any_scales_train_the_plain_model(kind):
    model, batch, loss = built(any_models.PLAIN.get(kind, kind))
    expected = trained(model, batch, loss, keras.optimizers.SGD(0.1))
    model, batch, loss = built(kind)
    assert als.wrap_model(model) is model
    optimizer = als.AdaptiveLossScaleOptimizer(keras.optimizers.SGD(0.1))
    actual = trained(model, batch, loss, optimizer, scales=np.random.default_rng(1))
    compare = np.testing.assert_array_equal
    if kind in any_models.FORKS:
        largest = max(np.abs(w).max() for w in expected[-1])

        def compare(a, b):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * largest)

    for step, weights in enumerate(expected):
        assert len(weights) == len(actual[step])
        for w_actual, w_expected in zip(actual[step], weights, strict=True):
            compare(w_actual, w_expected)


def fitted(model, batch, loss, **options):
    """A model compiled with our optimizer, after eight steps in a graph."""
    model.compile(als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(0.01)), loss=loss, **options)
    model.fit(*batch, batch_size=8, epochs=8, verbose=0, shuffle=False)
    return model


def traces_of_scaling(model):
    """What a model and its layers have of this library."""
    return [
        (part.name, name)
        for part in model._flatten_layers()
        for name, value in [*vars(part).items(), ("class", type(part))]
        if "tf_adaptive_ls" in str(getattr(value, "__module__", "")) + str(type(value).__module__)
        or any("tf_adaptive_ls" in kind.__module__ for kind in type(part).__mro__)
    ]


def test_trains_in_float16_and_is_plain_again(kind, tmp_path):
    if kind in any_models.WITH_ATTENTION and ON_JAX:
        pytest.skip("JAX has no attention in float16 on a CPU")
    model, batch, loss = built(kind, "mixed_float16")
    kind_of_model, by_hand = type(model), kind is any_models.wrapped_by_hand
    fitted(als.wrap_model(model), batch, loss)
    history = model.history.history["loss"]
    assert np.isfinite(history).all() and history[-1] < history[0]
    assert isinstance(model, kind_of_model)
    assert any(each.spectrum.nonzero for each in scalings(model))
    totals = [model.optimizer.loss_scale * 2.0**each.log2_scale for each in scalings(model)]
    assert any(total != model.optimizer.initial_scale for total in totals)

    if kind not in (any_models.adapted, any_models.wrapped_by_hand):
        plain, _, _ = built(any_models.PLAIN.get(kind, kind), "mixed_float16")
        trained(plain, batch, loss, "sgd", steps=1)
        assert [w.path for w in plain.weights] == [w.path for w in model.weights]
        for one, other in [(model, plain), (plain, model)]:
            one.save_weights(tmp_path / "it.weights.h5")
            other.set_weights([0 * w for w in other.get_weights()])
            other.load_weights(tmp_path / "it.weights.h5")
            for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
                np.testing.assert_array_equal(a, b)

    if not by_hand:
        outputs = model.predict(batch[0], verbose=0)
        assert als.strip_model(model) is model
        assert type(model) is kind_of_model and not traces_of_scaling(model)
        if kind not in any_models.CHANGING:
            again = model.predict(batch[0], verbose=0)
            keras.tree.map_structure(np.testing.assert_array_equal, outputs, again)


@pytest.mark.parametrize("kind", any_models.AT_S, ids=lambda kind: kind.__name__)
def test_where_there_is_no_plan_a_table_says_why(kind):
    model, batch, loss = built(kind, "mixed_float16")
    fitted(als.wrap_model(model), batch, loss, run_eagerly=True)
    assert not plans_of(model)
    assert any_models.AT_S[kind] in str(als.scale_table(model)).lower()


def test_a_subclass_has_the_plan_of_its_functional_twin(mixed_float16):
    def ends(make):
        keras.utils.set_random_seed(0)
        model = als.wrap_model(make())
        fitted(model, (any_models.X, any_models.Y), "mse")
        (plan,) = plans_of(model)[-1:]
        names = {id(layer): i for i, layer in enumerate(scalings(model))}
        routes = [
            [[{names[id(each)] for each in group.layers} for group in (*r.args, *r.outputs)]
            for r in plan.routes.values()]
        ]  # fmt: skip
        return routes, [each.log2_scale for each in scalings(model)], model.get_weights()

    def functional():
        x = inputs = keras.Input((4,))
        for units in (5, 5, 5):
            x = keras.layers.Dense(units, "relu")(x)
        return keras.Model(inputs, keras.layers.Dense(2)(x))

    def subclass():
        dense = [keras.layers.Dense(5, "relu") for _ in range(3)] + [keras.layers.Dense(2)]
        model = any_models.Called(dense, any_models.in_turn)
        model(any_models.X)
        return model

    (routes, scales, weights), (*others, other_weights) = ends(functional), ends(subclass)
    assert [routes, scales] == others and any(scales)
    for a, b in zip(weights, other_weights, strict=True):
        np.testing.assert_array_equal(a, b)


class Moody(keras.Model):
    """It runs otherwise than on symbolic tensors."""

    def __init__(self):
        super().__init__()
        self.first, self.second = keras.layers.Dense(4), keras.layers.Dense(4)

    def call(self, x):
        if isinstance(x, keras.KerasTensor):
            return self.second(self.first(x))
        return self.first(self.second(x))


def test_a_run_that_is_not_as_traced_is_refused_and_a_way_named():
    model = als.wrap_model(Moody())
    with pytest.raises(RuntimeError, match=r"wrap_model\(model, plan=False\)"):
        model(any_models.X)
    als.wrap_model(model, plan=False)(any_models.X)


def test_a_tensor_that_leaves_by_a_global_returns_to_the_loss_scale():
    """Without that its gradient would be wrong, and nothing else would notice."""
    model, batch, _ = built(any_models.kept_in_global)
    als.wrap_model(model)
    model(batch[0]), model(batch[0])
    (plan,) = plans_of(model)
    by_name = {layer.name: plan.routes[id(layer)] for layer in plan.layers}
    assert [bool(group.layers) for group in by_name["dense"].outputs] == [False]
    assert [bool(group.layers) for group in by_name["dense_1"].outputs] == [True]


def test_a_layer_that_gets_layers_when_it_is_built_is_scaled_inside():
    model, batch, _ = built(any_models.made_in_build_of_a_block)
    als.wrap_model(model)(batch[0])
    assert len(scalings(model)) == 4


def test_a_call_that_is_set_after_wrapping_stays_when_scales_go():
    model, batch, loss = built(any_models.attributes, "mixed_float16")
    als.wrap_model(model)(batch[0])
    scaled = model.second.call
    model.second.call = lambda x, **options: 2 * scaled(x, **options)
    expected = model.predict(batch[0], verbose=0)
    fitted(model, batch, loss)
    assert scalings(model)[1].spectrum.nonzero
    outputs = model.predict(batch[0], verbose=0)
    als.strip_model(model)
    assert not scalings(model) and np.any(outputs != expected)
    np.testing.assert_array_equal(model.predict(batch[0], verbose=0), outputs)


@keras.saving.register_keras_serializable("tests")
class Saved(any_models.Functional):
    pass


@keras.saving.register_keras_serializable("tests")
class SavedSubclass(keras.Model):
    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.hidden = [keras.layers.Dense(units, "relu") for _ in range(2)]
        self.last = keras.layers.Dense(2)

    def build(self, shape):
        self.hidden[0].build(shape)
        self.hidden[1].build((None, self.units))
        self.last.build((None, self.units))

    def call(self, x):
        return self.last(self.hidden[1](self.hidden[0](x)))


def sequential():
    dense = [keras.layers.Dense(4, "relu"), keras.layers.Dense(2)]
    return keras.Sequential(dense), (any_models.X, any_models.Y)


FILES = {
    "sequential": sequential,
    "own constructor": lambda: (Saved(), (any_models.X, any_models.Y)),
    "subclass": lambda: (SavedSubclass(), (any_models.X, any_models.Y)),
}


def state_of(model):
    return [v.numpy() for v in [*model.variables, *model.optimizer.variables]]


@pytest.mark.parametrize("how", ["file", "pickle"])
@pytest.mark.parametrize("name", FILES)
def test_a_saved_model_is_of_its_class_and_goes_on_bit_for_bit(name, how, tmp_path):
    model, batch, loss = built(FILES[name], "mixed_float16")
    kind = type(model)
    fitted(als.wrap_model(model), batch, loss)
    if how == "file":
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    else:
        loaded = pickle.loads(pickle.dumps(model))
    assert isinstance(loaded, kind)
    for each in (model, loaded):
        each.fit(*batch, batch_size=8, epochs=3, verbose=0, shuffle=False)
    for a, b in zip(state_of(model), state_of(loaded), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(als.strip_model(loaded)) is kind


def test_what_was_chosen_is_saved(tmp_path):
    x = inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="a")], name="inner")
    for layer in (keras.layers.Dense(4, name="b"), inner, keras.layers.Dense(4, name="c")):
        x = layer(x)
    model = als.wrap_model(
        keras.Model(inputs, keras.layers.Dense(2, name="d")(x)),
        layer_filter=lambda layer, path: path != "b",
        float8=als.Float8(layer_filter=lambda layer, path: path == "inner/a"),
        plan=False,
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        rows = {row.name: row for row in als.scale_table(each)}
        assert rows["b"].note == "not wrapped"
        assert rows["inner/a"].float8 == "e4m3fn, e5m2" and rows["c"].float8 != rows["inner/a"]
        each(any_models.X)
        assert not plans_of(each)


# Of the copy, which is plain and is compiled as the model is.
@pytest.mark.filterwarnings("ignore:.*without trainable LossScaled")
@pytest.mark.parametrize("name", FILES)
def test_copies_line_up(name, tmp_path):
    """As for moving averages of weights."""
    model, batch, loss = built(FILES[name], "mixed_float16")
    fitted(als.wrap_model(model), batch, loss)
    outputs = model.predict(batch[0], verbose=0)
    plain = als.plain_copy(model)
    assert not scalings(plain) and not traces_of_scaling(plain)
    for copy in (keras.models.clone_model(model), copy_module.deepcopy(model), plain):
        if not copy.built:
            copy.build((None, 4))
        shapes = [w.shape for w in copy.weights]
        assert shapes == [w.shape for w in model.weights]
        copy.set_weights(model.get_weights())
        np.testing.assert_array_equal(copy.predict(batch[0], verbose=0), outputs)


def test_an_h5_file_is_that_of_the_plain_model(tmp_path):
    x = inputs = keras.Input((4,))
    x = keras.layers.Dense(4, "relu")(x)
    model = als.wrap_model(keras.Model(inputs, keras.layers.Dense(2)(x)))
    model.save(tmp_path / "model.h5")
    loaded = keras.models.load_model(tmp_path / "model.h5")
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wrapped_model_inside_a_new_one():
    model, (x, _), _ = built(FILES["sequential"])
    model.build((None, 4))
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, keras.layers.Dense(2)(als.wrap_model(model)(inputs)))
    expected = outer(x)
    for each in scalings(outer):
        each.log2_scale = 3
    np.testing.assert_array_equal(outer(x), expected)
    als.wrap_model(outer)
    assert len(scalings(outer)) == 3
    np.testing.assert_array_equal(outer(x), expected)
