"""Any Keras model: exact, trained in float16, saved, stripped."""

import any_models
import keras
import numpy as np
import pytest

import tf_adaptive_ls as als
from tf_adaptive_ls.training.layer_scaling import LayerScaling

pytestmark = [
    pytest.mark.filterwarnings("ignore:Loss scales do nothing"),
    pytest.mark.filterwarnings("ignore:.*looks like it has unbuilt state"),
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer"),
]

KINDS = {kind.__name__: kind for kind in any_models.KINDS}


@pytest.fixture(params=KINDS, name="kind")
def _kind(request):
    return KINDS[request.param]


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
        compare = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # noqa: E731
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
    model, batch, loss = built(kind, "mixed_float16")
    kind_of_model, by_hand = type(model), kind is any_models.wrapped_by_hand
    fitted(als.wrap_model(model), batch, loss)
    history = model.history.history["loss"]
    assert np.isfinite(history).all() and history[-1] < history[0]
    assert isinstance(model, kind_of_model)
    assert any(each.spectrum.nonzero for each in scalings(model))
    assert any(each.log2_scale for each in scalings(model))

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
        again = model.predict(batch[0], verbose=0)
        if kind not in any_models.CHANGING:
            keras.tree.map_structure(np.testing.assert_array_equal, outputs, again)
