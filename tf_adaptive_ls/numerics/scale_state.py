"""The state of all scales between two steps.

The scale of each layer is one of its weights: the pair `(r, 1)` in a `tiny_unit`. Their quotient is
r, whatever both are multiplied by; averages of weights give a fraction, which is rounded. An
optimizer that does not know scales overwrites this weight with its "gradient", which is zero;
(0, 0) therefore means "r = 0, no statistics". All other state is stacked, in the optimizer.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from tf_adaptive_ls.backend.arguments import MAX_LOG2_SCALE
from tf_adaptive_ls.backend.arrays import power_of_two
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT
from tf_adaptive_ls.numerics.scale_rules import NOTHING_SEEN
from tf_adaptive_ls.numerics.tiny_unit import UNIT

NUM_SPECTRA = 2  # of the sample and of the peaks


class LayerStates(NamedTuple):
    """The state of all layers; float32 tensors.

    Attributes:
        log2_scales: r of each layer, `[layers]`.
        memory: The memory of the rule, `[layers, n]`: exponents of unscaled gradients, which stay
            right when scales change.
        overflows: Number of steps on which each layer made finite gradients non-finite, `[layers]`.
        spectra: Spectra of the last sample of produced gradients, and of their peaks,
            `[layers, 2, bins]`, in `COUNTING_FORMAT`.
        log2_sampled_at: log2 of the scale S * 2**r at that sample, `[layers]`.
        saturations: Number of steps on which a gradient saturated in the narrower format that a
            layer rounds to, `[layers]`; `None` if no layer does.
        rounded_spectra: Spectra of the last sample of these gradients, `[layers, bins]`.
    """

    log2_scales: Tensor
    memory: Tensor
    overflows: Tensor
    spectra: Tensor
    log2_sampled_at: Tensor
    saturations: Tensor | None = None
    rounded_spectra: Tensor | None = None


class LossState(NamedTuple):
    """The state of the loss scale S; tensors.

    Attributes:
        log2_scale: log2(S), a float32 scalar.
        memory: The memory of the rule for gradients that arrive at S, for each format of the
            layers, float32 `[formats, n]`.
        steps_to_sample: Number of steps until the next sample, an int32 scalar.
        ceiling: log2 of the largest S allowed, a float32 scalar. It remembers overflows that no
            report explains, such as those of layers without a scale.
        blamed: Number of the last skipped steps in a row on which each layer, and last S, was at
            fault, float32 `[layers + 1]`.
        skipped_in_a_row: Number of skipped steps in a row up to now, an int32 scalar.
    """

    log2_scale: Tensor
    memory: Tensor
    steps_to_sample: Tensor
    ceiling: Tensor
    blamed: Tensor
    skipped_in_a_row: Tensor


def packed_scale(log2_scale: Tensor) -> Tensor:
    """The value of a layer's scale weight, `[…, 2]`, for r `[…]`."""
    return ops.stack([log2_scale * UNIT, ops.full_like(log2_scale, UNIT)], axis=-1)


def packed_scales(log2_scales: Tensor, number: int) -> list[Tensor]:
    """The values of the scale weights of several layers, one by one.

    The last operation is a product, not a slice: XLA fuses products into one kernel.
    """
    pairs = ops.stack([log2_scales, ops.ones_like(log2_scales)], axis=-1)
    return [pair * UNIT for pair in ops.unstack(pairs, number)]


def log2_scale_of(packed: Tensor) -> Tensor:
    """The integers r of scale weights `[…, 2]`, `[…]`; 0 if a weight is not a valid scale."""
    amount, unit = packed[..., 0], packed[..., 1]
    r = ops.round(amount / ops.where(unit > 0, unit, 1.0))
    return ops.where(ops.abs(r) <= MAX_LOG2_SCALE, r, 0.0)  # false for NaN


def factor_of(packed: Tensor) -> Tensor:
    """2**r of scale weights `[…, 2]`, `[…]`."""
    return power_of_two(log2_scale_of(packed))


def has_statistics(packed: np.ndarray) -> bool:
    """Whether a scale weight `[2]` was written by code that knows scales."""
    return bool(packed[1] > 0)


def restored(saved: np.ndarray) -> np.ndarray:
    """The scale weight `[2]` from a file, in the current unit; NumPy arrays.

    Up to version 0.2, the pair was `(r, 2**r)`.
    """
    r, factor = map(float, saved)
    if r.is_integer() and abs(r) <= MAX_LOG2_SCALE and factor == 2.0**r:
        saved = np.array([r, 1.0], "float32") * UNIT
    if not has_statistics(saved):
        return np.zeros(2, "float32")
    return np.array(packed_scale(log2_scale_of(saved)))


def initial_scale(shape: Any = (2,), dtype: str = "float32") -> Tensor:
    """A scale of 1: an initializer."""
    return ops.convert_to_tensor(np.array([0, UNIT], dtype))


def initial_loss_state(
    log2_scale: int, num_formats: int, num_layers: int, memory_size: int
) -> LossState:
    """`LossState` before the first step, of NumPy arrays."""
    return LossState(
        np.float32(log2_scale),
        np.full((num_formats, memory_size), NOTHING_SEEN, "float32"),
        np.int32(0),
        np.float32(MAX_LOG2_SCALE),
        np.zeros(num_layers + 1, "float32"),
        np.int32(0),
    )


def initial_layer_states(
    num_layers: int, memory_size: int, any_rounded: bool = False
) -> LayerStates:
    """`LayerStates` before the first step, of NumPy arrays; r is 0."""
    bins = spectrum.num_bins(COUNTING_FORMAT)
    states = LayerStates(
        np.zeros(num_layers, "float32"),
        np.full((num_layers, memory_size), NOTHING_SEEN, "float32"),
        np.zeros(num_layers, "float32"),
        np.zeros((num_layers, NUM_SPECTRA, bins), "float32"),
        np.zeros(num_layers, "float32"),
    )
    if not any_rounded:
        return states
    return states._replace(
        saturations=np.zeros(num_layers, "float32"),
        rounded_spectra=np.zeros((num_layers, bins), "float32"),
    )
