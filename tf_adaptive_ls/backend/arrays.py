"""Operations on arrays that `keras.ops` lacks: reading bits, casting, ragged and sparse tensors."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.backend import autodiff, devices
from tf_adaptive_ls.backend.types import Tensor

_FLOAT32 = np.finfo(np.float32)


def power_of_two(exponent: Tensor) -> Tensor:
    """Exactly `2 ** exponent` in float32, for whole numbers in [-126, 127]."""
    # Assembled from bits, because `2 ** k` may be inexact on an accelerator.
    biased = keras.ops.cast(exponent, "int32") + (_FLOAT32.maxexp - 1)
    return bitcast(keras.ops.left_shift(biased, _FLOAT32.nmant), "float32")


def is_sparse(x: Tensor) -> bool:
    """Whether a gradient is a `tf.IndexedSlices`: some of its rows, as for an embedding."""
    return hasattr(x, "indices")


def dense(x: Tensor) -> Tensor:
    """A gradient with all of its rows, including rows of zeros."""
    if not is_sparse(x):
        return x
    import tensorflow as tf

    return tf.convert_to_tensor(x)


def has_known_rank(x: Tensor) -> bool:
    """Whether the number of axes of a tensor is known. In a TensorFlow graph, it may not be."""
    return x.shape is not None and getattr(x.shape, "rank", 0) is not None


def dense_parts(x: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The dense tensors that a value consists of, and a function that rebuilds it from others.

    A ragged or sparse tensor consists of several.

    Args:
        x: Any leaf of a structure of `keras.tree`.

    Returns:
        A list of tensors and other values, and a function from such a list to a value like `x`.

    Raises:
        ValueError: If `x` contains tensors that cannot be replaced.
    """
    if keras.backend.backend() == "jax":
        import jax

        parts, structure = jax.tree.flatten(x)
        return parts, functools.partial(jax.tree.unflatten, structure)
    import tensorflow as tf

    if isinstance(x, tf.TensorArray) or getattr(x, "dtype", None) == tf.variant:
        raise ValueError(
            "Expected a LossScaled layer to take and return tensors of numbers. Received: "
            f"{x!r} (of type {type(x).__name__}), which hides its gradients. Unpack it "
            "inside the layer (`tensor_array.stack()`), or leave the layer out by `layer_filter`."
        )
    if isinstance(x, tf.__internal__.CompositeTensor) and not isinstance(x, tf.Variable):
        parts = tf.nest.flatten(x, expand_composites=True)
        return parts, lambda parts: tf.nest.pack_sequence_as(x, parts, expand_composites=True)
    return [x], lambda parts: parts[0]


def behind_activation(x: Tensor) -> tuple[list[Tensor], Callable[..., Any]] | None:
    """The input of the softmax or sigmoid that computed a tensor, and that function; or `None`.

    Keras's crossentropies look for it in TensorFlow graphs. The result is as that of `dense_parts`.
    """
    if not autodiff.builds_graph():
        return None
    import tensorflow as tf

    functions = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}
    if not isinstance(x, tf.Tensor) or x.op.type not in functions:
        return None
    return list(x.op.inputs), lambda parts: functions[x.op.type](*parts)


def is_inexact_dtype(dtype: str) -> bool:
    """Whether the dtype of a tensor is floating-point or complex."""
    name = keras.backend.standardize_dtype(dtype)
    return keras.backend.is_float_dtype(name) or name.startswith("complex")


def real_numbers(x: Tensor) -> Tensor:
    """The numbers of a dense or sparse gradient as real numbers; a complex number counts as two."""
    x = x.values if is_sparse(x) else x
    if not keras.backend.standardize_dtype(x.dtype).startswith("complex"):
        return x
    return keras.ops.stack([keras.ops.real(x), keras.ops.imag(x)], axis=-1)


def complex_number(real: Tensor, imaginary: Tensor) -> Tensor:
    """The complex tensor of two floating-point tensors of the same dtype."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.complex(real, imaginary)
    import tensorflow as tf

    return tf.complex(real, imaginary)


def bitcast(x: Tensor, dtype: str) -> Tensor:
    """Reinterprets the bits of `x` as another dtype of the same size.

    `ops.view` of Keras 3.15 refuses tensors of unknown size on TensorFlow.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.bitcast_convert_type(x, dtype)
    import tensorflow as tf

    return tf.bitcast(x, dtype)


def random_bits(seed: Tensor, shape: Any, number: int) -> Tensor:
    """Uniform random int32 numbers in `[0, 2**number)`, the same for the same seed.

    Keras's random functions do not take a tensor as the seed.

    Args:
        seed: Uint32 tensor `[2]`, as from a `keras.random.SeedGenerator`.
        shape: Shape of the result.
        number: Int below 32.
    """
    if keras.backend.backend() == "jax":
        import jax

        bits = jax.random.bits(jax.random.wrap_key_data(seed), shape, "uint32")
        return keras.ops.cast(keras.ops.right_shift(bits, np.uint32(32 - number)), "int32")
    import tensorflow as tf

    seed = tf.bitcast(tf.cast(seed, "uint32"), "int32")
    if number == 31:  # all int32 numbers are below 2**31
        bits = tf.random.stateless_uniform(shape, seed, None, None, "int32")
        return tf.bitwise.bitwise_and(bits, np.int32(2**31 - 1))
    return tf.random.stateless_uniform(shape, seed, 0, 2**number, "int32")


# What one block of a GPU reduces at a time.
_MOST_PARTS = 1024


def largest_of_each(tensors: Sequence[Tensor]) -> Tensor:
    """The maximum of each tensor, of shape `[len(tensors)]`. Numbers must be >= 0; empty gives 0.

    On a GPU, the maximum of a large tensor takes two kernels: one computes a partial maximum per
    block, and one reduces these. Here the second kernel is shared by all tensors.
    """
    sizes = [-1 if None in x.shape else math.prod(x.shape) for x in tensors]
    if len(tensors) == 1 or -1 in sizes or not devices.on_gpu():
        empty = keras.ops.zeros((), tensors[0].dtype)
        return keras.ops.stack(
            [
                empty if size == 0 else keras.ops.max(x)
                for x, size in zip(tensors, sizes, strict=True)
            ]
        )
    numbers = [_number_of_parts(size) for size in sizes]
    parts = [
        keras.ops.max(keras.ops.reshape(x, (number, -1)), axis=1, initial=0)
        for x, number in zip(tensors, numbers, strict=True)
    ]
    missing = [max(numbers) - number for number in numbers]
    filled = [keras.ops.pad(part, [[0, m]]) for part, m in zip(parts, missing, strict=True)]
    return keras.ops.max(keras.ops.stack(filled), axis=1)


def _number_of_parts(size: int) -> int:
    """The largest possible number of equal parts of an axis."""
    return max(number for number in range(1, _MOST_PARTS + 1) if size % number == 0)


def divide_by_power_of_two(x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor`, correctly rounded, for a power of two whose inverse is a float32 number.

    A gradient is read several times: to be scaled, for its amax, and for samples. On a CPU, XLA
    recomputes chains of cheap operations for each reader. It counts multiplications as cheap and
    divisions as expensive, so a division makes a step up to 14 % faster (see benchmarks/NOTES.md).
    On other devices, where division may be inexact, this multiplies by the inverse.
    """
    if devices.on_gpu():
        return keras.ops.multiply(x, 1 / divisor)
    return keras.ops.divide(x, divisor)
