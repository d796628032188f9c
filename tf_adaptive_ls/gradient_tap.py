"""The one custom-gradient op: identity forward, powers of two backward."""

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls import backend

_MIN_EXPONENT, _MAX_EXPONENT = -126, 127
# A table, since `2 ** k` need not be exact on an accelerator.
_POWERS_OF_TWO = np.ldexp(np.float32(1), np.arange(_MIN_EXPONENT, _MAX_EXPONENT + 1))


def power_of_two(exponent):
    """Exactly `2 ** exponent` in float32, for whole numbers in [-126, 127]."""
    return ops.take(_POWERS_OF_TWO, ops.cast(exponent, "int32") - _MIN_EXPONENT)


def gradient_tap(tensors, shifts, state, report):
    """Identity whose backward pass shifts gradients and reports what it saw.

    Args:
        tensors: List of floating-point tensors, at least one.
        shifts: List of scalars, one per tensor: the gradient of `tensors[i]` is
            multiplied by `2 ** shifts[i]`. `None` leaves a gradient as it is.
        state: Tensor that receives the report as its "gradient".
        report: Function `(gradients, factors) -> tensor` of `state`'s shape: of the
            gradients as they arrived, and what each is multiplied by, `None` for
            nothing.

    Returns:
        List of tensors equal to `tensors`. Differentiating their gradients once
        more raises a `NotImplementedError`.
    """
    # Most gradients of a layer share one shift.
    distinct = list({id(shift): shift for shift in shifts if shift is not None}.values())
    places = [next((i for i, d in enumerate(distinct) if d is s), None) for s in shifts]
    exponents = ops.stop_gradient(ops.stack(distinct)) if distinct else np.zeros(0, "float32")

    def identity(exponents, *inputs):
        *values, _ = inputs

        def backward(*gradients):
            if isinstance(gradients[0], (list, tuple)):  # JAX passes one tuple
                (gradients,) = gradients
            powers = ops.unstack(power_of_two(exponents), len(distinct)) if distinct else []
            factors = [None if place is None else powers[place] for place in places]
            shifted = [
                gradient if factor is None else _multiply(gradient, factor)
                for gradient, factor in zip(gradients, factors, strict=True)
            ]
            return (*_first_order(shifted), report(list(gradients), factors))

        return tuple(values), backward

    return list(backend.custom_gradient(identity, exponents)(*tensors, state))


def replaced(tensor, value):
    """`value`, whose gradient goes to `tensor` instead."""

    @keras.ops.custom_gradient
    def replace(tensor, value):
        def backward(*gradients):
            (gradient,) = gradients
            return gradient, ops.zeros_like(value)

        return ops.convert_to_tensor(value), backward

    return replace(tensor, ops.stop_gradient(value))


def _multiply(x, factor):
    """`x * factor` in `x`'s dtype, rounded once."""
    # In float16 the factor alone would overflow at 2**16.
    narrow = keras.backend.standardize_dtype(x.dtype)
    wide = keras.backend.result_type(narrow, "float32")
    if narrow == wide:
        return ops.multiply(x, ops.cast(factor, wide))
    return ops.cast(ops.multiply(ops.cast(x, wide), factor), narrow)


def _first_order(gradients):
    """`gradients`, which cannot be differentiated."""

    @keras.ops.custom_gradient
    def identity(*tensors):
        def backward(*_):
            raise NotImplementedError(
                "Expected gradients through a LossScaled layer to be taken once. "
                "Received: a gradient of such a gradient, which its loss scale would "
                "falsify. Compute the inner gradient, and the forward pass it belongs "
                "to, inside `with tf_adaptive_ls.neutral_scales():`."
            )

        return tuple(tensors), backward

    # `tf.IndexedSlices` are let through: their source is guarded.
    dense = [not hasattr(gradient, "indices") for gradient in gradients]
    if not any(dense):
        return gradients
    guarded = iter(identity(*[g for g, d in zip(gradients, dense, strict=True) if d]))
    return [next(guarded) if d else g for g, d in zip(gradients, dense, strict=True)]
