"""Layers whose channels are single points, followed by a 0/1 layer that sums them."""

from typing import Any

import numpy as np
from keras import layers, ops
from numpy.typing import NDArray

from tf_adaptive_ls.deploy.grids import Points
from tf_adaptive_ls.deploy.kernels import (
    CONVOLUTIONS,
    DEPTHWISE,
    SEPARABLE,
    TRANSPOSED,
    ConvolutionKernel,
    Kernel,
    kernels_of,
)

Array = NDArray[Any]

_DIMENSIONS = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
_DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}


def can_be_wide(layer: Any) -> bool:
    """Whether the points of a layer's kernels can be channels of their own."""
    kinds = (*CONVOLUTIONS, *TRANSPOSED, *DEPTHWISE, *SEPARABLE, layers.Dense)
    return type(layer) in kinds and getattr(layer, "groups", 1) == 1


def split(layer: Any) -> list[Any]:
    """The two convolutions that a separable convolution consists of; any other layer by itself."""
    if not isinstance(layer, SEPARABLE):
        return [layer]
    dimensions = len(layer.kernel_size)
    config = layer.get_config()
    shared = ("kernel_size", "strides", "padding", "data_format", "dilation_rate", "dtype")
    first = _DEPTHWISE[dimensions](
        **{name: config[name] for name in shared},
        depth_multiplier=layer.depth_multiplier,
        use_bias=False,
        name=f"{layer.name}_depthwise",
    )
    first.build(_shape(layer, layer.depthwise_kernel.shape[-2]))
    first.set_weights([layer.depthwise_kernel.numpy()])
    second = _sums(layer, np.asarray(layer.pointwise_kernel.numpy()), layer.name)
    return [first, second]


def wide(layer: Any, points: Points) -> list[Any]:
    """The layers that run instead of a layer, so that each kernel has one point per channel.

    Args:
        layer: A layer for which `can_be_wide` is true; not a separable convolution.
        points: `Points` of its kernel.
    """
    (kernel,) = kernels_of(layer)
    shape = kernel.matrix(kernel.variable.numpy()).shape
    channels = shape[1]
    of_points = (points.integers * points.scales[..., None]).astype("float32")
    of_points = of_points.reshape(-1, *shape)
    used = (points.scales != 0).reshape(-1, *shape[:2])
    if isinstance(layer, DEPTHWISE):
        return _wide_depthwise(layer, kernel, of_points, used.any(axis=2))
    extra = [(j, c) for j in range(1, len(used)) for c in range(channels) if used[j, 0, c]]
    rows = [*of_points[0, 0], *(of_points[j, 0, c] for j, c in extra)]
    config = layer.get_config() | {"use_bias": False, "activation": "linear"}
    config["units" if isinstance(layer, layers.Dense) else "filters"] = len(rows)
    made = type(layer).from_config(config)
    made.build(_shape(layer, _inputs(layer)))
    made.set_weights([_kernel(kernel, np.stack(rows)[None])])
    adds = np.concatenate([np.eye(channels), np.eye(channels)[[c for _, c in extra]]])
    return [made, _sums(layer, adds, f"{layer.name}_points")]


def _wide_depthwise(layer: Any, kernel: Kernel, of_points: Array, used: Array) -> list[Any]:
    """For a depthwise convolution: each input is repeated once per point."""
    groups, channels = of_points.shape[1:3]
    extra = [(j, g) for j in range(1, len(used)) for g in range(groups) if used[j, g]]
    taken = [*range(groups), *(g for _, g in extra)]
    matrix = np.stack([*of_points[0], *(of_points[j, g] for j, g in extra)])
    config = layer.get_config() | {"use_bias": False, "activation": "linear"}
    made = type(layer).from_config(config)
    made.build(_shape(layer, len(taken)))
    made.set_weights([_kernel(kernel, matrix)])
    adds = np.kron(np.eye(groups)[taken], np.eye(channels))
    axis = 1 if layer.data_format == "channels_first" else -1
    return [
        lambda x: ops.take(x, taken, axis=axis),
        made,
        _sums(layer, adds, f"{layer.name}_points"),
    ]


def _kernel(kernel: Kernel, matrix: Array) -> Array:
    """A kernel with another number of channels."""
    if isinstance(kernel, ConvolutionKernel):
        return kernel.kernel(matrix)
    return matrix[0].T  # a Dense layer


def _sums(layer: Any, adds: Array, name: str) -> Any:
    """A layer that sums channels, and applies the bias and activation of another layer.

    Args:
        layer: The other layer.
        adds: 0/1 array `[channels, sums]`, or with leading axes of length 1.
        name: Name of the new layer.
    """
    options: dict[str, Any] = {
        "use_bias": layer.use_bias,
        "activation": layer.activation,
        "name": name,
        "dtype": layer.dtype_policy,
    }
    if isinstance(layer, layers.Dense):
        made = layers.Dense(adds.shape[-1], **options)
    else:
        dimensions = len(layer.kernel_size)
        adds = adds.reshape((1,) * dimensions + adds.shape[-2:])
        # "valid" is the same for a window of 1, but TensorFlow 2.21 on a CPU crashes when its graph
        # optimizer fuses such a convolution, its bias, and an addition of a padded tensor.
        options |= {"data_format": layer.data_format, "padding": "same"}
        made = _DIMENSIONS[dimensions](adds.shape[-1], 1, **options)
    made.build(_shape(layer, adds.shape[-2]))
    made.set_weights([adds, *([layer.bias.numpy()] if layer.use_bias else [])])
    return made


def _inputs(layer: Any) -> int:
    return int(layer.kernel.shape[-1 if isinstance(layer, TRANSPOSED) else -2])


def _shape(layer: Any, channels: int) -> tuple[int | None, ...]:
    """The input shape of a layer like `layer` with another number of channels."""
    sizes = (None,) * (0 if isinstance(layer, layers.Dense) else len(layer.kernel_size))
    first = getattr(layer, "data_format", None) == "channels_first"
    return (None, channels, *sizes) if first else (None, *sizes, channels)
