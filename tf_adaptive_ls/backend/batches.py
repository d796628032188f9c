"""Iterates over the batches of any data that `fit` accepts."""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import tree

from tf_adaptive_ls.backend.arguments import check_whole


def batches_of(data: Any, batch_size: int = 32) -> Iterator[Any]:
    """Iterates over the batches of data.

    Args:
        data: `(x, y)` or `(x, y, sample_weight)`, with arrays or structures of arrays; a
            `keras.utils.PyDataset`; or an iterable of batches, such as a list, a generator or a
            `tf.data.Dataset`.
        batch_size: Int. The number of examples per batch of arrays.

    Raises:
        ValueError: If an argument is not as described.
    """
    check_whole("batch_size", batch_size, " of examples")
    if isinstance(data, keras.utils.PyDataset):
        return (data[i] for i in range(len(data)))
    if _is_of_arrays(data):
        return _slices(data, _number_of_examples(data), batch_size)
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes, np.ndarray, dict)):
        return iter(data)
    raise ValueError(
        "Expected data as for `fit`: arrays `(x, y)` or `(x, y, sample_weight)`, or an iterable of "
        f"such batches. Received: {data!r:.200} (of type {type(data).__name__})."
    )


def check_repeatable(data: Any) -> None:
    """Raises a `ValueError` if `data` can be iterated over only once."""
    if isinstance(data, Iterator):
        raise ValueError(
            "Expected `data` to be batches `(x, y)` that can be iterated over repeatedly, "
            f"such as a list. Received: data={data!r} (of type {type(data).__name__})."
        )


def fingerprint(batch: Any) -> int:
    """A number for a batch. The sum over all batches identifies a set of examples.

    The sum does not depend on the order of the examples or on the batch size.
    """
    columns: list[list[bytes]] = []
    for leaf in tree.flatten(batch):
        if leaf is not None:
            columns.append([_bytes_of(row) for row in np.asarray(leaf)])
    return sum(zlib.crc32(b"".join(row)) for row in zip(*columns, strict=True))


def _bytes_of(row: Any) -> bytes:
    row = np.asarray(row)
    return repr(row.tolist()).encode() if row.dtype == object else row.tobytes()


def _is_of_arrays(data: Any) -> bool:
    """Whether `data` is a tuple of arrays, and not a tuple of batches."""
    return isinstance(data, tuple) and 2 <= len(data) <= 3 and not isinstance(data[0], tuple)


def _number_of_examples(data: tuple[Any, ...]) -> int:
    leaves = [leaf for leaf in tree.flatten(data) if leaf is not None]
    sizes = {np.shape(leaf)[0] if np.ndim(leaf) else -1 for leaf in leaves}
    if len(sizes) != 1 or -1 in sizes:
        shapes = [tuple(np.shape(leaf)) for leaf in leaves]
        raise ValueError(
            "Expected arrays with the same number of examples. Received: arrays of shapes "
            f"{shapes}."
        )
    return sizes.pop()


def _slices(data: tuple[Any, ...], size: int, batch_size: int) -> Iterator[tuple[Any, ...]]:
    for start in range(0, size, batch_size):
        yield tree.map_structure(
            lambda leaf, start=start: None if leaf is None else leaf[start : start + batch_size],
            data,
        )
