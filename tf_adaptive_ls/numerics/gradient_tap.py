"""Taps: identity ops whose backward pass scales, rounds, reports or redirects gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend import arrays, autodiff, devices
from tf_adaptive_ls.backend.types import Tensor


def gradient_tap(
    tensors: list[Tensor],
    divisors: list[Tensor | None],
    receivers: Sequence[Tensor] = (),
    report: Callable[..., Tensor] | None = None,
) -> list[Tensor]:
    """Identity whose backward pass divides gradients and reports them.

    Args:
        tensors: List of floating-point or complex tensors, at least one.
        divisors: List of float32 scalars, powers of two, one per tensor, by which its gradient is
            divided. `None` leaves a gradient as it is.
        receivers: List of tensors. The "gradient" of the last one is the report, those of the
            others are zero. Without receivers, nothing is reported.
        report: Function `(gradients, divisors) -> tensor` of the shape of the last receiver, where
            gradients are as they arrived.

    Returns:
        List of tensors equal to `tensors`. Differentiating their gradients raises a
        `NotImplementedError`.
    """
    # Most gradients of a layer share one divisor.
    distinct = {id(divisor): divisor for divisor in divisors if divisor is not None}

    def identity(
        constants: list[Tensor], *inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        values = inputs[: len(tensors)]
        silent = inputs[len(tensors) : -1]

        def backward(*gradients: Tensor) -> tuple[Tensor, ...]:
            constant = dict(zip(distinct, constants, strict=True))
            of_each = [constant.get(id(divisor)) for divisor in divisors]
            shifted = [
                gradient if divisor is None else _divide(gradient, divisor)
                for gradient, divisor in zip(gradients, of_each, strict=True)
            ]
            shifted = _refuse_second_order(shifted)
            if not receivers or report is None:
                return tuple(shifted)
            reported = devices.varying_as(report(list(gradients), of_each), inputs[-1])
            return (*shifted, *map(ops.zeros_like, silent), reported)

        return tuple(values), backward

    return list(autodiff.custom_gradient(identity, list(distinct.values()))(*tensors, *receivers))


def rounding_tap(
    tensor: Tensor,
    receiver: Tensor,
    round_gradient: Callable[[Tensor], Tensor],
    report: Callable[[Tensor], Tensor],
) -> Tensor:
    """Identity whose backward pass rounds a gradient, and reports the gradient before rounding.

    Args:
        tensor: Floating-point tensor.
        receiver: Tensor whose "gradient" is the report.
        round_gradient: Function of a tensor to a tensor of the same shape and dtype.
        report: Function of the gradient before rounding to a tensor of the shape of `receiver`.

    Returns:
        A tensor equal to `tensor`, see `gradient_tap`.
    """

    def identity(_: Any, tensor: Tensor, receiver: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        def backward(*gradients: Tensor) -> tuple[Tensor, Tensor]:
            (gradient,) = gradients
            (rounded,) = _refuse_second_order([round_gradient(gradient)])
            return rounded, report(gradient)

        return ops.convert_to_tensor(tensor), backward

    return autodiff.custom_gradient(identity)(tensor, receiver)


def redirect_gradient(value: Tensor, tensor: Tensor) -> Tensor:
    """Returns `value`; its gradient goes to `tensor` instead."""

    def replace(_: Any, tensor: Tensor, value: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        def backward(*gradients: Tensor) -> tuple[Tensor, Tensor]:
            (gradient,) = gradients
            return gradient, ops.zeros_like(value)

        return ops.convert_to_tensor(value), backward

    return autodiff.custom_gradient(replace)(tensor, ops.stop_gradient(value))


def _divide(x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor` in `x`'s dtype, rounded once."""
    if keras.backend.standardize_dtype(x.dtype).startswith("complex"):
        # Real and imaginary parts separately: multiplying by a complex number would turn zeros
        # beside infinities into NaN.
        parts = (_divide(part, divisor) for part in (ops.real(x), ops.imag(x)))
        return arrays.complex_number(*parts)
    # Not in float16, because the divisor itself would overflow at 2**16.
    wide = keras.backend.result_type(x.dtype, "float32")
    divisor = ops.cast(divisor, wide)
    return ops.cast(arrays.divide_by_power_of_two(ops.cast(x, wide), divisor), x.dtype)


def _refuse_second_order(gradients: list[Tensor]) -> list[Tensor]:
    """Returns `gradients`, which then cannot be differentiated."""

    def identity(_: Any, *tensors: Tensor) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        def backward(*_: Tensor) -> Any:
            raise NotImplementedError(
                "Expected gradients through a LossScaled layer to be taken once. "
                "Received: a gradient of such a gradient, which its loss scale would "
                "falsify. Compute the inner gradient, and the forward pass it belongs "
                "to, inside `with tf_adaptive_ls.neutral_scales():`."
            )

        return tuple(tensors), backward

    # `tf.IndexedSlices` pass unguarded, because the op that creates them is guarded.
    dense = [not arrays.is_sparse(gradient) for gradient in gradients]
    if not any(dense):
        return gradients
    guard = autodiff.custom_gradient(identity)
    guarded = iter(guard(*[g for g, d in zip(gradients, dense, strict=True) if d]))
    return [next(guarded) if d else g for g, d in zip(gradients, dense, strict=True)]
