"""What all layers of a model show at one moment."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """What all layers of a model show at one moment.

    Attributes:
        step: How many steps the optimizer had taken or skipped.
        skipped_steps: How many of them were skipped.
        skipped_in_a_row: How many of them were skipped up to this one.
        log2_loss_scale: log2(S).
        layers: A `LayerSnapshot` per layer.
    """

    step: int
    skipped_steps: int
    skipped_in_a_row: int
    log2_loss_scale: int
    layers: list

    @classmethod
    def of(cls, layers, optimizer):
        """Reads all `LossScaled` layers and the optimizer."""
        return cls(
            optimizer.steps,
            optimizer.skipped_steps,
            optimizer.skipped_in_a_row,
            round(math.log2(optimizer.loss_scale)),
            optimizer.layer_snapshots(layers),
        )

    @property
    def worst_underflow(self):
        """The largest share of gradients that any layer loses to underflow."""
        spectra = [layer.spectrum for layer in self.layers]
        shares = [spectrum.underflow_share for spectrum in spectra if spectrum.nonzero]
        return max(shares, default=0.0)

    @property
    def worst_flushed(self):
        """The same of gradients that are rounded to float8; `None` if none are."""
        rounding = [layer for layer in self.layers if layer.operands is not None]
        if not rounding:
            return None
        shares = (layer.flushed_share for layer in rounding if layer.operands.nonzero)
        return max(shares, default=0.0)
