"""`LayerSnapshot`: the state of a layer's scale and gradients, for people."""

import dataclasses

import numpy as np

from tf_adaptive_ls.numerics import spectrum
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat
from tf_adaptive_ls.numerics.scale_state import LayerStates
from tf_adaptive_ls.numerics.spectrum import Spectrum


@dataclasses.dataclass(frozen=True, eq=False)
class LayerSnapshot:
    """The state of one scaled layer, between steps.

    Attributes:
        log2_scale: The int r.
        log2_sampled_at: log2 of the scale S * 2**r at which `spectrum` was sampled.
        overflows: Number of steps on which the layer made finite gradients non-finite.
        spectrum: `Spectrum` of the last sample of its input and weight gradients.
        peaks: `Spectrum` of the largest value of each of these gradients on that step. `None` if
            not known.
        operands: `Spectrum` of the last sample of gradients before quantization to float8, in the
            binades of float16. `None` if the layer does not use float8.
        operand_format: The `FloatFormat` that these gradients are quantized to.
        saturations: Number of steps on which one of them saturated.
    """

    log2_scale: int
    log2_sampled_at: int
    overflows: int
    spectrum: Spectrum
    peaks: Spectrum | None
    operands: Spectrum | None = None
    operand_format: FloatFormat | None = None
    saturations: int = 0

    @classmethod
    def of(
        cls,
        state: LayerStates,
        float_format: FloatFormat,
        operand_format: FloatFormat | None = None,
    ) -> "LayerSnapshot":
        """Reads the `LayerStates` of one layer, of NumPy arrays."""
        spectra = spectrum.rebinned(np.array(state.spectra), COUNTING_FORMAT, float_format)
        spectra = [Spectrum(each, float_format) for each in spectra]
        snapshot = cls(
            int(state.log2_scales), int(state.log2_sampled_at), int(state.overflows), *spectra
        )
        if operand_format is None or state.saturations is None:
            return snapshot
        return dataclasses.replace(
            snapshot,
            operands=Spectrum(np.array(state.rounded_spectra), COUNTING_FORMAT),
            operand_format=operand_format,
            saturations=int(state.saturations),
        )

    @classmethod
    def without_statistics(cls, log2_scale: int, float_format: FloatFormat) -> "LayerSnapshot":
        """The snapshot of a layer of which only r is known."""
        counts = np.zeros(spectrum.num_bins(float_format), "float32")
        nothing = Spectrum(counts, float_format)
        return cls(log2_scale, 0, 0, nothing, nothing)

    @property
    def flushed_share(self) -> float:
        """Share of the gradients that become zero in float8. NaN if none were seen.

        These are the gradients below half of the smallest float8 number, for rounding to nearest.
        """
        if self.operands is None or self.operand_format is None or not self.operands.nonzero:
            return float("nan")
        below = np.array(COUNTING_FORMAT.exponents) < self.operand_format.min_exponent - 1
        lost = self.operands.counts[1 : spectrum.NONFINITE][below]
        return float(np.sum(lost) / self.operands.nonzero)

    @property
    def binades(self) -> tuple[int, int] | None:
        """Lowest and highest binade of the gradients without any scale. `None` if all are zero."""
        if self.spectrum.binades is None:
            return None
        low, high = self.spectrum.binades
        return low - self.log2_sampled_at, high - self.log2_sampled_at
