"""`forward_range`: finds the parts of a model that overflow in the forward pass."""

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_adaptive_ls.backend.arguments import is_number
from tf_adaptive_ls.backend.batches import batches_of
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.observe.checks import check_built
from tf_adaptive_ls.observe.forward_range.own_runs import OwnRuns
from tf_adaptive_ls.observe.forward_range.result import ForwardRange
from tf_adaptive_ls.training.call_tensors import is_inexact

# float16 has this many binades above 1.
_MOST_ROOM = 16


def forward_range(
    model: keras.Model, batches: Any, room: float = 2, *, training: bool = True
) -> ForwardRange:
    """Finds the parts of a model that overflow in the forward pass.

    A loss scale only helps gradients. An activation above 65504 is infinite in float16, whatever
    the loss scale, or the result is silently wrong: `x * rsqrt(mean(x**2))` is zero once the square
    overflows.

    The model runs in float32. Each part, a layer at any depth or an operation between layers, then
    runs again by itself in its own dtype, on its float32 inputs; results of layers inside of it are
    taken from float32. So each overflow is found where it happens, and none hides another. A part
    is flagged with

        entry    if it casts inputs to a dtype that they are too large for,
        output   if its outputs are too large,
        inside   if its result is not finite, or more than 10 % wrong,

    at the values as they are, or at values `2**room` times as large. The model does not change:
    neither weights nor statistics nor seeds.

    ```python
    print(als.forward_range(model, [(x[:32], y[:32])]))
    ```

    Args:
        model: A built `keras.Model`, wrapped or not, compiled or not.
        batches: Data as for `fit`: arrays `(x, y)`, or an iterable of batches. A few batches are
            enough, but overflows on other data are not seen.
        room: Number of binades by which values must be able to grow, from 0 to 16.
        training: Whether layers run as in training.

    Returns:
        A `ForwardRange`, which prints as a table.

    Raises:
        ValueError: If an argument is not as described, if there is no batch, or if the outputs of
            the model are not finite in float32 either.
    """
    check_built(model, "forward_range")
    return ranges_of(model, batches, room, training)


def ranges_of(
    model: keras.Model, batches: Any, room: float, training: bool, only: str | None = None
) -> ForwardRange:
    """The `forward_range` of the model of `runs`, or of the part that it is limited to."""
    if not is_number(room) or not 0 <= room <= _MOST_ROOM:
        raise ValueError(
            f"Expected `room` to be a number of binades from 0 to {_MOST_ROOM}. "
            f"Received: room={room!r}."
        )
    runs = OwnRuns(model, room, only)
    number = 0
    for x in _inputs(batches):
        number += 1
        outputs = runs.read_batch(x, training)
        _check_finite(outputs, runs, number)
    if not number:
        raise ValueError(
            f"Expected at least one batch. Received: {batches!r:.200} (of type "
            f"{type(batches).__name__}), which has none."
        )
    parts = runs.ranges()
    parts = [part for part in parts if only in (None, part.name)]
    return ForwardRange(tuple(parts), room, runs.finite_as_built)


def _inputs(batches: Any) -> Iterator[Tensor]:
    for batch in batches_of(batches):
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        yield tree.map_structure(ops.convert_to_tensor, x)


def _check_finite(outputs: Any, runs: OwnRuns, number: int) -> None:
    floats = [x for x in tree.flatten(outputs) if is_inexact(x)]
    if all(np.isfinite(ops.convert_to_numpy(ops.cast(x, "float32"))).all() for x in floats):
        return
    name = runs.first_nonfinite or "an operation that is not a part"
    raise ValueError(
        "Expected a model whose outputs are finite in float32. Received: one that returns Inf or "
        f"NaN for batch {number}, first produced by '{name}'. Look there for a division by zero, "
        "the logarithm or root of a value that can be zero or negative, or an explicit cast to "
        '"float16", which dtype policies do not change.'
    )
