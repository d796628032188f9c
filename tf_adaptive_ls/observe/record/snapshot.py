"""The readings of all layers of a model at one moment."""

import dataclasses
import math
from typing import Any

from tf_adaptive_ls.training.readings import LayerSnapshot


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
    layers: list[LayerSnapshot]

    @classmethod
    def of(cls, layers: list[Any], optimizer: Any) -> "Snapshot":
        """Reads all `LossScaled` layers and the optimizer."""
        return cls(
            optimizer.steps,
            optimizer.skipped_steps,
            optimizer.skipped_in_a_row,
            round(math.log2(optimizer.loss_scale)),
            optimizer.layer_snapshots(layers),
        )

    @property
    def worst_underflow(self) -> float:
        """The largest share of gradients that any layer loses to underflow."""
        spectra = [layer.spectrum for layer in self.layers]
        shares = [spectrum.underflow_share for spectrum in spectra if spectrum.nonzero]
        return max(shares, default=0.0)

    @property
    def worst_flushed(self) -> float | None:
        """The same of gradients that are rounded to float8; `None` if none are."""
        if all(layer.operands is None for layer in self.layers):
            return None
        # Of a layer without any it is no number.
        shares = (layer.flushed_share for layer in self.layers)
        return max((share for share in shares if not math.isnan(share)), default=0.0)
