"""One step of a layer or model, and everything that can be told apart about it."""

import dataclasses

import keras
import numpy as np

from tests.backends import compiled, dense, value_and_gradients
from tf_adaptive_ls.models.planned_call import planned_call_of
from tf_adaptive_ls.training.layer_scaling import LayerScaling, is_of_scaling


@dataclasses.dataclass
class Step:
    """What a step computed, as NumPy arrays."""

    outputs: list
    gradients: dict  # by path of the weight, or place of the input
    updates: dict  # values of all variables afterwards, by number and path


def stepper(call, inputs, weights, others, losses=None, training=True, mode="eager"):
    """Returns a function that runs `call(**inputs)` forward and backward.

    It undoes the updates, and is compiled once, however often it is called. The
    loss is a fixed random linear function of the outputs, plus `losses()`.

    Args:
        call: A layer, model or function.
        inputs: Dict of arrays or nested lists of arrays, passed by name; under the
            name "args" a tuple to be passed by position.
        weights: The variables to differentiate by.
        others: The variables that the call may update.
        losses: Function that returns losses added during the call.
        training: Passed on, unless `None`.
        mode: One of `MODES`.
    """
    inputs = keras.tree.map_structure(np.asarray, dict(inputs))
    flat = keras.tree.flatten(inputs)
    floats = [x for x in flat if x.dtype.kind == "f"]
    # Fed from outside, lest the optimizer of graphs fold them into the gradients.
    noise = np.random.default_rng(0).normal(size=10_000).astype("float32")

    variables = [*weights, *others]

    def compute(noise, *floats):
        def loss_of(*floats):
            """The loss, and the outputs."""
            remaining = iter(floats)
            filled = [next(remaining) if x.dtype.kind == "f" else x for x in flat]
            arguments = keras.tree.pack_sequence_as(inputs, filled)
            if training is not None:
                arguments["training"] = training
            outputs = keras.tree.flatten(call(*arguments.pop("args", ()), **arguments))
            loss = sum(_linear(y, noise) for y in outputs)
            for extra in losses() if losses else ():
                loss += keras.ops.cast(extra, "float32")
            return loss, outputs

        (_, outputs), gradients = value_and_gradients(loss_of, weights, floats)
        return outputs, [dense(gradient) for gradient in gradients]

    run_compiled = compiled(compute, variables, mode)
    names = [*(v.path for v in weights), *(f"input {i}" for i in range(len(floats)))]

    def run():
        before = [(v, v.numpy()) for v in variables]
        outputs, gradients = run_compiled(*map(keras.ops.convert_to_tensor, (noise, *floats)))
        result = Step(
            [np.array(y) for y in outputs],
            {n: None if g is None else np.array(g) for n, g in zip(names, gradients, strict=True)},
            {f"{i} {v.path}": v.numpy() for i, (v, _) in enumerate(before)},
        )
        for variable, value in before:
            variable.assign(value)
        return result

    return run


def _linear(y, noise):
    if not keras.backend.is_float_dtype(y.dtype):
        return 0.0
    y = keras.ops.reshape(keras.ops.cast(y, "float32"), [-1])
    return keras.ops.sum(y * noise[: keras.ops.shape(y)[0]])


def layer_stepper(layer, plain, inputs, **options):
    """`stepper` of `layer`, with regard to the variables of the layer `plain` inside."""
    weights = [v for v in plain.trainable_variables if not is_of_scaling(v)]
    others = plain.non_trainable_variables + rnn_states(plain)
    return stepper(layer, inputs, weights, others, losses=lambda: layer.losses, **options)


def rnn_states(layer):
    """The states of stateful recurrent layers, which Keras does not list as variables."""
    layers = [each for each in layer._flatten_layers() if getattr(each, "stateful", False)]
    return [state for each in layers for state in keras.tree.flatten(each.states)]


def scaled_layers(model):
    """What scales the layers of a model, nested ones too."""
    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, LayerScaling)]


def plans_of(model):
    """The scale plans that a model has run under."""
    return [plan for plan, _ in planned_call_of(model)._plans.values() if plan is not None]


def randomize_scales(model, rng):
    """Sets every log2 scale to a random value in [-8, 8]; all differ from 0."""
    for layer in scaled_layers(model):
        layer.log2_scale = int(rng.choice([r for r in range(-8, 9) if r]))


def assert_equal(actual, expected):
    """Bit for bit the same step."""
    for y, y_expected in zip(actual.outputs, expected.outputs, strict=True):
        np.testing.assert_array_equal(y, y_expected)
    for name, value in expected.updates.items():
        np.testing.assert_array_equal(actual.updates[name], value, err_msg=name)
    assert_gradients_equal(actual, expected)


def assert_gradients_equal(actual, expected):
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        if value is None:
            assert actual.gradients[name] is None, name
        else:
            np.testing.assert_array_equal(actual.gradients[name], value, err_msg=name)


def assert_gradients_within(actual, expected, ulps):
    """Gradients that differ by at most `ulps` units of their tensor's largest element."""
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        if value is None:
            assert actual.gradients[name] is None, name
        else:
            unit = np.spacing(np.max(np.abs(value), initial=0))
            difference = np.max(np.abs(actual.gradients[name] - value), initial=0)
            assert difference <= ulps * unit, f"{name}: {difference / unit} ulps"
