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
    # Written bit by bit, since `2 ** k` need not be exact on an accelerator.
    biased = keras.ops.cast(exponent, "int32") + (_FLOAT32.maxexp - 1)
    return bitcast(keras.ops.left_shift(biased, _FLOAT32.nmant), "float32")


def is_sparse(x: Tensor) -> bool:
    """Whether a gradient is one of a few rows, as of an embedding: a `tf.IndexedSlices`."""
    return hasattr(x, "indices")


def dense(x: Tensor) -> Tensor:
    """A gradient with all its rows, also those that are zero."""
    if not is_sparse(x):
        return x
    import tensorflow as tf

    return tf.convert_to_tensor(x)


def has_known_rank(x: Tensor) -> bool:
    """Whether it is known how many axes a tensor has; in a graph of TensorFlow it need not be."""
    return x.shape is not None and getattr(x.shape, "rank", 0) is not None


def dense_parts(x: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The dense tensors that a value is made of, and how to make one like it of others.

    A ragged or sparse tensor has several.

    Args:
        x: Any value without structure of its own, as `keras.tree` sees it.

    Returns:
        A list of tensors and other values, and a function from such a list to a value like `x`.

    Raises:
        ValueError: If `x` holds tensors in a way in which they cannot be replaced.
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
    """What a tensor was computed from by a softmax or sigmoid, and that function; or `None`.

    In a graph of TensorFlow, where Keras's crossentropies look for that. As from `dense_parts`.
    """
    if not autodiff.builds_graph():
        return None
    import tensorflow as tf

    functions = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}
    if not isinstance(x, tf.Tensor) or x.op.type not in functions:
        return None
    return list(x.op.inputs), lambda parts: functions[x.op.type](*parts)


def is_inexact_dtype(dtype: str) -> bool:
    """Whether a dtype, of a tensor, is one of floating-point or complex numbers."""
    name = keras.backend.standardize_dtype(dtype)
    return keras.backend.is_float_dtype(name) or name.startswith("complex")


def real_numbers(x: Tensor) -> Tensor:
    """All numbers of a dense or sparse gradient as real ones: complex ones as two."""
    x = x.values if is_sparse(x) else x
    if not keras.backend.standardize_dtype(x.dtype).startswith("complex"):
        return x
    return keras.ops.stack([keras.ops.real(x), keras.ops.imag(x)], axis=-1)


def complex_number(real: Tensor, imaginary: Tensor) -> Tensor:
    """The complex tensor of two of the same floating-point dtype."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.complex(real, imaginary)
    import tensorflow as tf

    return tf.complex(real, imaginary)


def bitcast(x: Tensor, dtype: str) -> Tensor:
    """The bits of `x`, read as another dtype of the same size.

    Keras 3.15's `ops.view` refuses tensors of unknown size on TensorFlow.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.bitcast_convert_type(x, dtype)
    import tensorflow as tf

    return tf.bitcast(x, dtype)


def random_bits(seed: Tensor, shape: Any, number: int) -> Tensor:
    """Random whole numbers in `[0, 2**number)`, int32, the same for the same seed.

    Keras's own random numbers take no seed that is a tensor.

    Args:
        seed: Uint32 tensor `[2]`, as a `keras.random.SeedGenerator` gives it.
        shape: Of the result.
        number: An int below 32.
    """
    if keras.backend.backend() == "jax":
        import jax

        bits = jax.random.bits(jax.random.wrap_key_data(seed), shape, "uint32")
        return keras.ops.cast(keras.ops.right_shift(bits, np.uint32(32 - number)), "int32")
    import tensorflow as tf

    seed = tf.bitcast(tf.cast(seed, "uint32"), "int32")
    if number == 31:  # no int32 is above these
        bits = tf.random.stateless_uniform(shape, seed, None, None, "int32")
        return tf.bitwise.bitwise_and(bits, np.int32(2**31 - 1))
    return tf.random.stateless_uniform(shape, seed, 0, 2**number, "int32")


# As many as one block of a GPU reduces at once.
_MOST_PARTS = 1024


def largest_of_each(tensors: Sequence[Tensor]) -> Tensor:
    """The largest of each of several tensors of numbers from 0, `[len(tensors)]`; 0 of none.

    A GPU finds that of a large tensor in two kernels, one that leaves a part to every block, and
    one for the parts. Of several tensors the latter is one for all.
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
    """The largest number of parts of equal size that something can be cut into."""
    return max(number for number in range(1, _MOST_PARTS + 1) if size % number == 0)


def divide_by_power_of_two(x: Tensor, divisor: Tensor) -> Tensor:
    """`x / divisor`, exactly rounded, for a power of two that float32 holds the inverse of.

    A gradient has several readers: its shift, its peak, its sample. XLA on a CPU computes
    a chain of cheap operations anew for each of them, and counts multiplications as
    cheap, but divisions not: dividing makes a step up to 14 % faster (see
    benchmarks/NOTES.md). Elsewhere a division need not be exact, so it is a product.
    """
    if devices.on_gpu():
        return keras.ops.multiply(x, 1 / divisor)
    return keras.ops.divide(x, divisor)
