"""The matmuls and convolutions of Keras layers, and how they get float8 operands."""

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import layers, ops

from tf_adaptive_ls.backend import autodiff, devices, keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.training.float8.call import Float8Call
from tf_adaptive_ls.training.float8.operand import Axes, tensor_of
from tf_adaptive_ls.training.float8.settings import E4M3, Float8
from tf_adaptive_ls.training.kept_results import activation_of
from tf_adaptive_ls.training.ways import computing, has_own_call

Labels = tuple[str, str, str]


class Product(NamedTuple):
    """A layer of the form `activation(multiply(operand(inputs), kernel) + bias)`.

    Attributes:
        layer_class: The Keras class whose `call` computes this.
        multiply: Function `(layer, operand, kernel) -> tensor`.
        labels: Function `(layer, rank of the operand)` to the axes of the operand, of the kernel
            and of the result: a string of labels for each, as in `einsum`. A `*` precedes an axis
            that contains the groups of a convolution.
        kernel: Name of the attribute that holds the kernel.
        operand: Function `(layer, inputs) -> tensor`, the operand that meets the kernel.
        is_matrix: Whether it is a matrix multiplication, for which devices may have float8.
    """

    layer_class: Any
    multiply: Callable[[Any, Any, Any], Any]
    labels: Callable[[Any, int], Labels]
    kernel: str = "kernel"
    operand: Callable[[Any, Any], Any] = lambda layer, inputs: inputs
    is_matrix: bool = False


def _matmul(layer: keras.layers.Layer, operand: Tensor, kernel: Tensor) -> Tensor:
    return ops.matmul(operand, kernel)


def _einsum(layer: keras.layers.Layer, operand: Tensor, kernel: Tensor) -> Tensor:
    return ops.einsum(layer.equation, operand, kernel)


def _convolve(layer: keras.layers.Layer, operand: Tensor, kernel: Tensor) -> Tensor:
    return ops.conv(
        operand,
        kernel,
        strides=list(layer.strides),
        padding="valid" if layer.padding == "causal" else layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _padded(layer: keras.layers.Layer, inputs: Tensor) -> Tensor:
    """Pads the inputs of a causal convolution at the front."""
    if layer.padding != "causal":
        return inputs
    before = [layer.dilation_rate[0] * (layer.kernel_size[0] - 1), 0]
    last = layer.data_format == "channels_last"
    return ops.pad(inputs, [[0, 0], before, [0, 0]] if last else [[0, 0], [0, 0], before])


def _convolve_transposed(layer: keras.layers.Layer, operand: Tensor, kernel: Tensor) -> Tensor:
    return ops.conv_transpose(
        operand,
        kernel,
        strides=list(layer.strides),
        padding=layer.padding,
        output_padding=layer.output_padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _depthwise(layer: keras.layers.Layer, inputs: Tensor) -> Tensor:
    return ops.depthwise_conv(
        inputs,
        layer.depthwise_kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )


def _pointwise(layer: keras.layers.Layer, operand: Tensor, kernel: Tensor) -> Tensor:
    return ops.conv(operand, kernel, strides=1, padding="valid", data_format=layer.data_format)


_DIGITS = "0123456789"


def _of_matrix(layer: keras.layers.Layer, rank: int) -> Labels:
    places = _DIGITS[: rank - 1]
    return places + "k", "kn", places + "n"


def _of_equation(layer: keras.layers.Layer, rank: int) -> Labels:
    operand, kernel, result = re.split(",|->", layer.equation.replace(" ", ""))
    places = _DIGITS[: rank - len(operand.replace("...", ""))]
    return operand.replace("...", places), kernel, result.replace("...", places)


def _of_convolution(layer: keras.layers.Layer, rank: int, kernel: str = "{window}c*n") -> Labels:
    places = _DIGITS[: layer.rank]
    layout = "b{places}*{c}" if layer.data_format == "channels_last" else "b*{c}{places}"
    window = "xyz"[: layer.rank]
    operand, result = (layout.format(places=places, c=channel) for channel in "cn")
    return operand, kernel.format(window=window), result


_of_transposed = functools.partial(_of_convolution, kernel="{window}*nc")

PRODUCTS = (
    Product(layers.Dense, _matmul, _of_matrix, is_matrix=True),
    Product(layers.EinsumDense, _einsum, _of_equation, is_matrix=True),
    Product(layers.Conv1D, _convolve, _of_convolution, operand=_padded),
    Product(layers.Conv2D, _convolve, _of_convolution),
    Product(layers.Conv3D, _convolve, _of_convolution),
    Product(layers.Conv1DTranspose, _convolve_transposed, _of_transposed),
    Product(layers.Conv2DTranspose, _convolve_transposed, _of_transposed),
    Product(layers.Conv3DTranspose, _convolve_transposed, _of_transposed),
    Product(layers.SeparableConv1D, _pointwise, _of_convolution, "pointwise_kernel", _depthwise),
    Product(layers.SeparableConv2D, _pointwise, _of_convolution, "pointwise_kernel", _depthwise),
)


def product_of(layer: keras.layers.Layer) -> Product | None:
    """The `Product` of a layer, or `None`.

    A layer whose `call` is overridden has none, because it may compute something else.
    """
    for product in PRODUCTS:
        if isinstance(layer, product.layer_class):
            return None if has_own_call(layer, product.layer_class) else product
    return None


def products_in(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers with a matmul inside of a layer, at any depth, including itself."""
    return [part for part in keras_internals.parts_of(layer) if product_of(part)]


def in_float8(parts: list[keras.layers.Layer], call: Float8Call) -> Any:
    """Context manager in which layers compute from float8 operands.

    Args:
        parts: List of layers that have a `Product`.
        call: `Float8Call`, for the matmuls in the order of `parts`.
    """
    return computing(
        [
            (part, functools.partial(_call_in_float8, part, call, place))
            for place, part in enumerate(parts)
        ]
    )


def casts(layer: keras.layers.Layer, float8: Float8) -> bool:
    """Whether operands are cast to float8, so that the device can multiply in float8."""
    # No device multiplies e5m2 by e5m2, and only Blackwell and later multiply in blocks.
    mixed = E4M3 in (float8.forward, float8.backward) and float8.block_size is None
    product = product_of(layer)
    is_matrix = product is not None and product.is_matrix
    return is_matrix and mixed and devices.has_products_of_8_bits()


def _call_in_float8(
    layer: keras.layers.Layer,
    call: Float8Call,
    place: int,
    inputs: Tensor,
    training: bool | None = None,
) -> Tensor:
    """`layer.call(inputs)` from quantized operands."""
    product = product_of(layer)
    assert product is not None
    multiply = _multiply if call.float8.block_size is None else _multiply_by_blocks
    operand, kernel = product.operand(layer, inputs), getattr(layer, product.kernel)
    outputs = multiply(product, layer, operand, kernel, call, place)
    if layer.bias is not None:
        outputs = ops.add(outputs, _shaped(layer, layer.bias))
    activation = activation_of(layer)
    return outputs if activation is None else activation(outputs)


def _multiply(
    product: Product,
    layer: keras.layers.Layer,
    operand: Tensor,
    kernel: keras.Variable,
    call: Float8Call,
    place: int,
) -> Tensor:
    """The matmul of operands that each have one power-of-two scale."""
    forward, cast = call.float8.forward_operand, casts(layer, call.float8)
    operand, kernel = (forward.straight_through(each, cast) for each in (operand, kernel))
    with devices.sums_of_all_bits() if cast else contextlib.nullcontext():
        outputs = product.multiply(layer, operand, kernel)
    # Before the bias is added, because the gradient of the bias is not an operand.
    return call.tap(outputs, place, cast)


def _multiply_by_blocks(
    product: Product,
    layer: keras.layers.Layer,
    operand: Tensor,
    kernel: keras.Variable,
    call: Float8Call,
    place: int,
) -> Tensor:
    """The matmul of operands that are quantized in blocks along the axes it sums over.

    So are the operands of the two matmuls of its gradients.
    """
    multiply = functools.partial(product.multiply, layer)
    of_operand, of_kernel, of_result = product.labels(layer, len(operand.shape))
    forward, backward = call.float8.forward_operand, call.float8.backward_operand

    def along(x: Tensor, own: str, others: str, kept: str) -> Axes:
        return _axes(ops.shape(x), own, set(others) - set(kept), getattr(layer, "groups", 1))

    def differentiable(_: Any, x: Tensor, w: Tensor) -> tuple[Tensor, Callable[..., Any]]:
        def gradients(*of_outputs: Tensor) -> tuple[Tensor, Tensor]:
            (g,) = of_outputs
            noise = [call.noise(ops.shape(g), place, use) for use in (0, 1)]
            by_x = autodiff.pulled_back(
                lambda x: multiply(
                    x, forward.rounded_along(w, along(w, of_kernel, of_result, of_operand))
                ),
                x,
                backward.rounded_along(g, along(g, of_result, of_kernel, of_operand), noise[0]),
            )
            by_w = autodiff.pulled_back(
                lambda w: multiply(
                    forward.rounded_along(x, along(x, of_operand, of_result, of_kernel)), w
                ),
                w,
                backward.rounded_along(g, along(g, of_result, of_operand, of_kernel), noise[1]),
            )
            return by_x, by_w

        outputs = multiply(
            forward.rounded_along(x, along(x, of_operand, of_kernel, of_result)),
            forward.rounded_along(w, along(w, of_kernel, of_operand, of_result)),
        )
        return outputs, gradients

    return autodiff.custom_gradient(differentiable)(tensor_of(operand), tensor_of(kernel))


def _axes(shape: Sequence[Any], labels: str, chosen: set[str], groups: int) -> Axes:
    """The `Axes` of a tensor that have one of the chosen labels. `*` stands for groups."""
    shape = list(shape)
    if "*" in labels:
        place = labels.index("*")
        shape[place : place + 1] = [groups, shape[place] // groups]
    return Axes(tuple(shape), tuple(i for i, each in enumerate(labels) if each in chosen))


def _shaped(layer: keras.layers.Layer, bias: keras.Variable) -> keras.Variable:
    if getattr(layer, "data_format", "channels_last") == "channels_last":
        return bias
    return ops.reshape(bias, (1, -1) + (1,) * layer.rank)
