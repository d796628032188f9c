"""`Snapshot`: the scales and gradients of all layers of a model at one step."""

import dataclasses
import math
from typing import Any

from tf_adaptive_ls.training.readings import LayerSnapshot


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshot:
    """The scales and gradients of all layers of a model at one step.

    Attributes:
        step: Number of steps so far, including skipped ones.
        skipped_steps: Number of skipped steps so far.
        skipped_in_a_row: Number of steps skipped in a row up to this one.
        log2_loss_scale: log2(S).
        layers: List of a `LayerSnapshot` per layer.
    """

    step: int
    skipped_steps: int
    skipped_in_a_row: int
    log2_loss_scale: int
    layers: list[LayerSnapshot]

    @classmethod
    def of(cls, layers: list[Any], optimizer: Any) -> "Snapshot":
        """Reads the optimizer and its scaled layers."""
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
        """The largest share that any layer rounds to zero in float8. `None` without float8."""
        if all(layer.operands is None for layer in self.layers):
            return None
        # NaN for a layer that has no such gradients.
        shares = (layer.flushed_share for layer in self.layers)
        return max((share for share in shares if not math.isnan(share)), default=0.0)
