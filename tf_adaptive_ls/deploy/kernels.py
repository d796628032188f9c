"""Reads the kernels of layers as matrices: which weights are multiplied by which inputs.

In each group, an output channel at one position is the scalar product of the weights of the
channel and the inputs of that position. A kernel is therefore a *matrix* of shape
(groups, channels, inputs). It is multiplied by *rows* of shape (groups, positions, inputs):

    outputs[g, p, c] = sum over i of rows[g, p, i] * matrix[g, c, i]
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import keras
import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from tf_adaptive_ls.backend.keras_internals import is_from_keras
from tf_adaptive_ls.backend.types import Tensor

Array = NDArray[Any]

CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)
SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
DENSE = (layers.Dense, layers.EinsumDense)

# The most numbers that rows may have at once: 256 MB.
_MOST = 2**26


class Kernel(Protocol):
    """One kernel of a layer, as a matrix."""

    @property
    def variable(self) -> keras.Variable:
        """The weight."""

    def matrix(self, kernel: Array) -> Array:
        """The matrix `[groups, channels, inputs]` of an array that has the shape of the weight."""

    def kernel(self, matrix: Array) -> Array:
        """Undoes `matrix`."""

    def rows(self, x: Tensor) -> Iterator[Array]:
        """Yields the rows of inputs of the layer in parts, as float32."""


def kernels_of(layer: keras.layers.Layer) -> "list[Kernel]":
    """The kernels of a layer that can be quantized, in the order in which they are applied.

    A layer with a user-defined `call` has none, because it may use its kernel in any way.
    """
    if not is_from_keras(type(layer).call):
        return []
    if isinstance(layer, SEPARABLE):
        depthwise = ConvolutionKernel(layer, layer.depthwise_kernel, _depthwise)
        return [depthwise, _PointwiseKernel(layer, layer.pointwise_kernel, _pointwise, depthwise)]
    for kinds, convolve in ((DEPTHWISE, _depthwise), (TRANSPOSED, _transposed)):
        if isinstance(layer, kinds):
            return [ConvolutionKernel(layer, layer.kernel, convolve)]
    if isinstance(layer, CONVOLUTIONS):
        return [ConvolutionKernel(layer, layer.kernel, _plain)]
    if isinstance(layer, layers.EinsumDense):
        return [EinsumKernel(layer.kernel, layer.equation)]
    if isinstance(layer, layers.Dense):
        return [EinsumKernel(layer.kernel, "...a,ab->...b")]
    return []


@dataclasses.dataclass(frozen=True)
class EinsumKernel:
    """The kernel of Dense and EinsumDense.

    Attributes:
        variable: The weight.
        equation: As in `EinsumDense`.
    """

    variable: keras.Variable
    equation: str

    def matrix(self, kernel: Array) -> Array:
        groups, channels, summed = self._labels
        order = [self._of_kernel.index(label) for label in groups + channels + summed]
        sizes = [self._size(labels) for labels in self._labels]
        return kernel.transpose(order).reshape(sizes)

    def kernel(self, matrix: Array) -> Array:
        order = "".join(self._labels)
        arranged = matrix.reshape([self._size(label) for label in order])
        return arranged.transpose([order.index(label) for label in self._of_kernel])

    def rows(self, x: Tensor) -> Iterator[Array]:
        groups, _, summed = self._labels
        x = _array(x)
        labels = self.equation.partition(",")[0].replace("...", "")
        ahead = x.ndim - len(labels)  # the axes that the ellipsis stands for; they come first
        axes = {label: ahead + i for i, label in enumerate(labels)}
        positions = [
            i for i in range(x.ndim) if i not in {axes[label] for label in groups + summed}
        ]
        order = [*(axes[n] for n in groups), *positions, *(axes[n] for n in summed)]
        yield x.transpose(order).reshape(self._size(groups), -1, self._size(summed))

    @property
    def _of_kernel(self) -> str:
        return self.equation.partition("->")[0].partition(",")[2]

    @property
    def _labels(self) -> tuple[str, str, str]:
        """The labels of the kernel's axes: of groups, of channels, of inputs."""
        inputs, outputs = self.equation.partition(",")[0], self.equation.partition("->")[2]
        kinds = {label: (label in inputs, label in outputs) for label in self._of_kernel}
        return (
            "".join(label for label, kind in kinds.items() if kind == (True, True)),
            "".join(label for label, kind in kinds.items() if kind == (False, True)),
            "".join(label for label, kind in kinds.items() if kind == (True, False)),
        )

    def _size(self, labels: str) -> int:
        sizes = dict(zip(self._of_kernel, self.variable.shape, strict=True))
        return int(np.prod([sizes[label] for label in labels], dtype=int))


@dataclasses.dataclass(frozen=True)
class _Convolution:
    """A kind of convolution: a function `(layer, x, kernel)`, and the layout of its kernel."""

    apply: Any
    # From the layout (window, inputs or channels, …) of a kernel to (groups, channels, inputs,
    # window).
    to_matrix: Any
    to_kernel: Any


@dataclasses.dataclass(frozen=True)
class ConvolutionKernel:
    """The kernel of a convolution: plain, depthwise, grouped or transposed.

    Attributes:
        layer: The layer, which has strides, padding and so on.
        variable: The weight.
        convolution: The kind of convolution.
    """

    layer: keras.layers.Layer
    variable: keras.Variable
    convolution: _Convolution

    def matrix(self, kernel: Array) -> Array:
        flat = kernel.reshape(-1, *kernel.shape[-2:])
        return self.convolution.to_matrix(flat, getattr(self.layer, "groups", 1))

    def kernel(self, matrix: Array) -> Array:
        window = tuple(self.variable.shape[:-2])
        kernel = self.convolution.to_kernel(matrix, int(np.prod(window)))
        return kernel.reshape(*window, *kernel.shape[-2:])

    def rows(self, x: Tensor) -> Iterator[Array]:
        """The outputs of the convolution for a kernel that copies each input separately."""
        groups, _, inputs = self.matrix(np.empty(self.variable.shape, "float32")).shape
        unit = np.broadcast_to(np.eye(inputs, dtype="float32"), (groups, inputs, inputs))
        kernel = ops.convert_to_tensor(self.kernel(unit), "float32")
        x = ops.cast(x, "float32")
        size = int(np.prod(x.shape[1:])) * int(np.prod(self.variable.shape[:-2]))
        for part in _parts(x, size * getattr(self.layer, "depth_multiplier", 1)):
            y = self.convolution.apply(self.layer, part, kernel)
            if self.layer.data_format == "channels_first":
                y = ops.moveaxis(y, 1, -1)
            yield _array(y).reshape(-1, groups, inputs).transpose(1, 0, 2)


@dataclasses.dataclass(frozen=True)
class _PointwiseKernel(ConvolutionKernel):
    """The second kernel of a separable convolution, whose inputs are outputs of the first."""

    first: ConvolutionKernel

    def rows(self, x: Tensor) -> Iterator[Array]:
        first = self.first
        y = first.convolution.apply(self.layer, ops.cast(x, "float32"), first.variable.value)
        yield from super().rows(y)


def _parts(x: Tensor, size: int) -> Iterator[Tensor]:
    """Splits a batch into parts of at most `_MOST` numbers; an example makes `size` numbers."""
    step = max(1, _MOST // max(size, 1))
    for start in range(0, x.shape[0], step):
        yield x[start : start + step]


def _array(x: Tensor) -> Array:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, "float32")))


def _options(layer: Any) -> dict[str, Any]:
    return {
        "strides": layer.strides,
        "padding": layer.padding,
        "dilation_rate": layer.dilation_rate,
        "data_format": layer.data_format,
    }


def _convolved(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    options = _options(layer)
    if layer.padding == "causal":
        before = layer.dilation_rate[0] * (layer.kernel_size[0] - 1)
        last = layer.data_format == "channels_last"
        x = ops.pad(x, [[0, 0], [before, 0], [0, 0]] if last else [[0, 0], [0, 0], [before, 0]])
        options["padding"] = "valid"
    return ops.conv(x, kernel, **options)


def _convolved_depthwise(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    return ops.depthwise_conv(x, kernel, **_options(layer))


def _convolved_transposed(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    options = {**_options(layer), "strides": list(layer.strides)}
    return ops.conv_transpose(x, kernel, output_padding=layer.output_padding, **options)


def _convolved_pointwise(layer: Any, x: Tensor, kernel: Tensor) -> Tensor:
    return ops.conv(x, kernel, 1, "valid", data_format=layer.data_format)


def _matrix(kernel: Array, groups: int) -> Array:
    """From the layout (window, inputs of a group, channels)."""
    window, inputs, channels = kernel.shape
    split = kernel.reshape(window * inputs, groups, channels // groups)
    return split.transpose(1, 2, 0)


def _kernel(matrix: Array, window: int) -> Array:
    groups, channels, inputs = matrix.shape
    return matrix.transpose(2, 0, 1).reshape(window, inputs // window, groups * channels)


def _matrix_transposed(kernel: Array, groups: int) -> Array:
    """From the layout (window, channels, inputs)."""
    window, channels, inputs = kernel.shape
    return kernel.transpose(1, 0, 2).reshape(1, channels, window * inputs)


def _kernel_transposed(matrix: Array, window: int) -> Array:
    _, channels, inputs = matrix.shape
    return matrix.reshape(channels, window, inputs // window).transpose(1, 0, 2)


def _matrix_depthwise(kernel: Array, groups: int) -> Array:
    """From the layout (window, inputs, multiplier). Each input is a group."""
    return kernel.transpose(1, 2, 0)


def _kernel_depthwise(matrix: Array, window: int) -> Array:
    return matrix.transpose(2, 0, 1)


_plain = _Convolution(_convolved, _matrix, _kernel)
_depthwise = _Convolution(_convolved_depthwise, _matrix_depthwise, _kernel_depthwise)
_transposed = _Convolution(_convolved_transposed, _matrix_transposed, _kernel_transposed)
_pointwise = _Convolution(_convolved_pointwise, _matrix, _kernel)
