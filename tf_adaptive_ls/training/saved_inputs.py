"""Makes layers without weights save their inputs in 8 bits."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from tf_adaptive_ls.backend import autodiff, keras_internals, routes
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.training import max_pooling
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.functional_call import rematerialized_from_8_bits
from tf_adaptive_ls.training.kept_results import is_repeatable
from tf_adaptive_ls.training.neutral_scales import are_scales_neutral

# Other layers need nothing (sums, means, copies) or one byte per number (dropout).
_KINDS = (layers.ELU, layers.LeakyReLU, layers.Multiply)
# Keras stores the inputs of these activations on their outputs, and computes crossentropies from
# them.
_WITH_LOGITS = (keras.activations.softmax, keras.activations.sigmoid)


def saves_inputs(layer: keras.layers.Layer) -> bool:
    """Whether a layer has no weights and needs only its inputs in the backward pass."""
    if type(layer) is layers.Activation:
        return layer.activation not in _WITH_LOGITS
    return type(layer) in (*_KINDS, layers.ReLU) or max_pooling.saves_positions(layer)


def save_inputs(layer: keras.layers.Layer) -> Callable[[], None]:
    """Makes a layer save its inputs in 8 bits. Returns a function that undoes it."""
    repeatable = _is_repeatable(layer)

    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = CallTensors((args, kwargs))
        if (
            are_scales_neutral()
            or keras_internals.is_symbolic()
            or not autodiff.is_differentiated(given.tensors)
        ):
            return original(*args, **kwargs)
        if max_pooling.saves_positions(layer):
            return max_pooling.pool(layer, original, given.tensors[0])

        def function(*tensors: Tensor) -> tuple[list[Tensor], Any]:
            new_args, new_kwargs = given.replaced(tensors)
            return [original(*new_args, **new_kwargs)], None

        def keep(tensors: Any) -> Any:
            return function(*tensors)[0] if repeatable else tensors

        (outputs,), _ = rematerialized_from_8_bits(layer, function, keep)(*given.tensors)
        return outputs

    return routes.Route(layer, "call", run).end


def _is_repeatable(layer: keras.layers.Layer) -> bool:
    """Whether the outputs can be saved instead of the inputs; the next layer saves them anyway."""
    if type(layer) is layers.ReLU:
        return layer.max_value is None and not layer.negative_slope and not layer.threshold
    return is_repeatable(getattr(layer, "activation", None))
