"""Matrix products and convolutions of Keras layers, and how they run on operands of 8 bits."""

import contextlib
import contextvars
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from keras import layers, ops

from tf_adaptive_ls.backend import devices, keras_internals, routes
from tf_adaptive_ls.training.float8.settings import E4M3


class Product(NamedTuple):
    """A layer as `activation(multiply(operand(inputs), kernel) + bias)`.

    Attributes:
        layer_class: The class of `keras.layers` whose `call` does that.
        multiply: Function `(layer, operand, kernel) -> tensor`.
        kernel: Name of the attribute that holds the kernel.
        operand: Function `(layer, inputs) -> tensor`, what the kernel is multiplied with.
        is_matrix: Whether that is a product of matrices, for which devices may have 8 bits.
    """

    layer_class: type
    multiply: Callable[[Any, Any, Any], Any]
    kernel: str = "kernel"
    operand: Callable[[Any, Any], Any] = lambda layer, inputs: inputs
    is_matrix: bool = False


def _matmul(layer, operand, kernel):
    return ops.matmul(operand, kernel)


def _einsum(layer, operand, kernel):
    return ops.einsum(layer.equation, operand, kernel)


def _convolve(layer, operand, kernel):
    return ops.conv(
        operand,
        kernel,
        strides=list(layer.strides),
        padding="valid" if layer.padding == "causal" else layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _padded(layer, inputs):
    """What a convolution that looks at the past alone puts before it."""
    if layer.padding != "causal":
        return inputs
    before = [layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0]
    last = layer.data_format == "channels_last"
    return ops.pad(inputs, [[0, 0], before, [0, 0]] if last else [[0, 0], [0, 0], before])


def _convolve_transposed(layer, operand, kernel):
    return ops.conv_transpose(
        operand,
        kernel,
        strides=list(layer.strides),
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _depthwise(layer, inputs):
    return ops.depthwise_conv(
        inputs,
        layer.depthwise_kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _pointwise(layer, operand, kernel):
    return ops.conv(operand, kernel, strides=1, padding="valid", data_format=layer.data_format)


PRODUCTS = (
    Product(layers.Dense, _matmul, is_matrix=True),
    Product(layers.EinsumDense, _einsum, is_matrix=True),
    Product(layers.Conv1D, _convolve, operand=_padded),
    Product(layers.Conv2D, _convolve),
    Product(layers.Conv3D, _convolve),
    Product(layers.Conv1DTranspose, _convolve_transposed),
    Product(layers.Conv2DTranspose, _convolve_transposed),
    Product(layers.Conv3DTranspose, _convolve_transposed),
    Product(layers.SeparableConv1D, _pointwise, "pointwise_kernel", _depthwise),
    Product(layers.SeparableConv2D, _pointwise, "pointwise_kernel", _depthwise),
)


def product_of(layer):
    """The `Product` that a layer is, or `None`.

    One with a `call` of its own, of its class or itself, is none: who knows what that does.
    """
    for product in PRODUCTS:
        if isinstance(layer, product.layer_class):
            is_own = type(layer).call is not product.layer_class.call
            is_own |= "call" in vars(layer) and routes.route_of(layer, "call") is None
            return None if is_own else product
    return None


def products_in(layer):
    """A layer and those inside it, at any depth, that are products."""
    return [part for part in keras_internals.parts_of(layer) if product_of(part)]


# How layers that are products compute in the running context, by `id`; all others as ever.
_computing: contextvars.ContextVar[Mapping[int, Callable[..., Any]]] = contextvars.ContextVar(
    "computing_in_float8", default=types.MappingProxyType({})
)


def way_of_computing(layer, call):
    """`call`, or what stands for it in the running context."""
    return _computing.get().get(id(layer), call)


@contextlib.contextmanager
def in_float8(parts, float8, rounding):
    """Makes layers that are products compute in float8.

    Args:
        parts: List of layers.
        float8: The `Float8`.
        rounding: `GradientRounding` of the products, in the order of `parts`.
    """
    calls = dict(_computing.get())
    for place, part in enumerate(parts):
        calls[id(part)] = functools.partial(_call_in_float8, part, float8, rounding, place)
        if routes.route_of(part, "call") is None:
            # It is left there, since taking it away would take it from a call that runs meanwhile.
            routes.Route(part, "call", functools.partial(_run, part))
    token = _computing.set(calls)
    try:
        yield
    finally:
        _computing.reset(token)


def _run(layer, original, args, kwargs):
    return way_of_computing(layer, original)(*args, **kwargs)


def casts(layer, float8):
    """Whether operands are cast, for the device to multiply 8 bits."""
    # No device multiplies e5m2 with e5m2.
    mixed = E4M3 in (float8.forward, float8.backward)
    return product_of(layer).is_matrix and mixed and devices.has_products_of_8_bits()


def _call_in_float8(layer, float8, rounding, place, inputs, training=None):
    """What `layer.call(inputs)` computes, from operands that are rounded."""
    product, forward, cast = product_of(layer), float8.forward_operand, casts(layer, float8)
    operand = forward.straight_through(product.operand(layer, inputs), cast)
    kernel = forward.straight_through(getattr(layer, product.kernel), cast)
    with devices.sums_of_all_bits() if cast else contextlib.nullcontext():
        outputs = product.multiply(layer, operand, kernel)
    # Before the bias, whose gradient is not an operand.
    outputs = rounding.tap(outputs, place, cast)
    if layer.bias is not None:
        outputs = ops.add(outputs, _shaped(layer, layer.bias))
    return outputs if layer.activation is None else layer.activation(outputs)


def _shaped(layer, bias):
    if getattr(layer, "data_format", "channels_last") == "channels_last":
        return bias
    return ops.reshape(bias, (1, -1) + (1,) * layer.rank)
