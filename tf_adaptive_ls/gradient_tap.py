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
        report: Function `(gradients, shifted) -> tensor` of `state`'s shape.
            `gradients` are as they arrived; `shifted` are not yet rounded to
            the dtype of their tensor, and `None` where the shift is `None`.

    Returns:
        List of tensors equal to `tensors`. Differentiating their gradients once
        more raises a `NotImplementedError`.
    """
    zero = ops.zeros((), "float32")
    exponents = ops.stop_gradient(ops.stack([zero if s is None else s for s in shifts]))

    def identity(exponents, *inputs):
        *values, _ = inputs

        def backward(*gradients):
            if isinstance(gradients[0], (list, tuple)):  # JAX passes one tuple
                (gradients,) = gradients
            factors = power_of_two(exponents)
            shifted = [
                None if shift is None else _multiply(gradient, factors[i])
                for i, (gradient, shift) in enumerate(zip(gradients, shifts, strict=True))
            ]
            results = [
                _first_order(gradient if wide is None else _cast_like(wide, gradient))
                for gradient, wide in zip(gradients, shifted, strict=True)
            ]
            return (*results, report(list(gradients), shifted))

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
    # In float16 the factor alone would overflow at 2**16.
    wide = keras.backend.result_type(x.dtype, "float32")
    if keras.backend.standardize_dtype(x.dtype) != wide:
        x = ops.cast(x, wide)
    return ops.multiply(x, ops.cast(factor, wide))


def _cast_like(x, reference):
    return x if x.dtype == reference.dtype else ops.cast(x, reference.dtype)


def _first_order(gradient):
    if hasattr(gradient, "indices"):  # `tf.IndexedSlices`; its source is guarded
        return gradient

    @keras.ops.custom_gradient
    def identity(x):
        def backward(*_):
            raise NotImplementedError(
                "Expected gradients through a LossScaled layer to be taken once. "
                "Received: a gradient of such a gradient, which its loss scale would "
                "falsify. Compute the inner gradient, and the forward pass it belongs "
                "to, inside `with tf_adaptive_ls.neutral_scales():`."
            )

        return x, backward

    return identity(gradient)
