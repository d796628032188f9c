"""Runs a layer on given values of its weights: once, or once more in the backward pass."""

import contextlib
import contextvars

from keras import ops, tree

from tf_adaptive_ls.numerics import backend
from tf_adaptive_ls.training import keras_internals, scale_plan
from tf_adaptive_ls.training.call_tensors import is_float_tensor, with_mask_of
from tf_adaptive_ls.training.held_variables import HeldVariables, values_of

_runs_again = contextvars.ContextVar("runs_again", default=False)


def runs_again():
    """Whether this is the second run of a call, in the backward pass."""
    return _runs_again.get()


def call_held(layer, weights, args, kwargs, within=contextlib.nullcontext):
    """Calls a layer, and makes the updates of variables that its call asks for.

    Args:
        layer: The layer inside a `LossScaled` one.
        weights: Pairs of a variable that gradients are taken by and its value.
        args: A tuple of arguments by position.
        kwargs: A dict of arguments by name.
        within: Function that makes a context in which the layer is to run.

    Returns:
        The outputs, and a list of the losses that the layer has added.
    """
    values = values_of(layer, weights)
    again = keras_internals.is_rematerialised(layer, args, kwargs)
    with keras_internals.not_rematerialised(layer):
        call = _call_twice if again else _call
        outputs, losses, updates, _ = call(layer, values, args, kwargs, within)
    for variable, value in updates:
        variable.assign(value)
    return outputs, losses


def _call(layer, values, args, kwargs, within):
    with scale_plan.running(None), HeldVariables(layer, values) as held, within():
        outputs = layer(*args, **kwargs)
        losses = list(held.losses)
        held.losses.clear()  # Keras 3.12 would look for each by its value, which graphs have not
        keras_internals.drop_losses(layer)
    return outputs, losses, held.updates, held.found


def _call_twice(layer, values, args, kwargs, within):
    """`_call` that keeps nothing for the backward pass, but runs the layer there once more.

    So would Keras, but TensorFlow then finds no gradients by what are not variables, and
    here they are taken by values: each must be an argument of what is run again.
    """
    variables = [variable for variable, _ in values]
    # As they are now: statistics and seeds are updated before the second run.
    tensors = [ops.copy(value) for _, value in values]
    given = tree.flatten((args, kwargs))
    leaves = [*given, *tensors]
    places = [i for i, leaf in enumerate(leaves) if is_float_tensor(leaf)]
    first = {}

    def run(*floats):
        filled = list(leaves)
        for i, tensor in zip(places, floats, strict=True):
            filled[i] = with_mask_of(leaves[i], tensor)
        new_args, new_kwargs = tree.pack_sequence_as((args, kwargs), filled[: len(given)])
        new_values = list(zip(variables, filled[len(given) :], strict=True))
        new_values += first.get("found", [])
        token = _runs_again.set(bool(first) or runs_again())
        try:
            with keras_internals.not_rematerialised(layer):
                outputs, losses, updates, found = _call(
                    layer, new_values, new_args, new_kwargs, within
                )
        finally:
            _runs_again.reset(token)
        leaves_out = [*tree.flatten(outputs), *losses]
        are_floats = [is_float_tensor(leaf) for leaf in leaves_out]
        first.setdefault("found", found)
        first.setdefault("outputs", outputs)
        first.setdefault("are_floats", are_floats)
        first.setdefault("updated", [variable for variable, _ in updates])
        floats_out, others_out = _divided(leaves_out, are_floats)
        masks = [keras_internals.mask_of(leaf) for leaf in floats_out]
        return floats_out, (others_out, masks, [value for _, value in updates])

    floats_out, (others_out, masks, updates) = backend.rematerialised(run)(
        *(leaves[i] for i in places)
    )
    for tensor, mask in zip(floats_out, masks, strict=True):
        if mask is not None:
            keras_internals.set_mask(tensor, mask)
    floats_out, others_out = iter(floats_out), iter(others_out)
    leaves_out = [next(floats_out if each else others_out) for each in first["are_floats"]]
    number = len(tree.flatten(first["outputs"]))
    outputs = tree.pack_sequence_as(first["outputs"], leaves_out[:number])
    updates = list(zip(first["updated"], updates, strict=True))
    return outputs, leaves_out[number:], updates, first["found"]


def _divided(items, chosen):
    """Those that are chosen, and the others."""
    pairs = list(zip(items, chosen, strict=True))
    return [item for item, yes in pairs if yes], [item for item, yes in pairs if not yes]
