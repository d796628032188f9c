"""`OptimizerWatch`: the state of a `LossScaleMonitor` for one optimizer."""

import collections
import warnings
from typing import Any

import keras

from tf_adaptive_ls.observe.named_layers import scaled_layers
from tf_adaptive_ls.observe.record.snapshot import Snapshot

_RECENT = 6

# Warn if more than this share of at least this many steps were skipped.
_SKIPS_SEEN_OVER = 300
_MANY_SKIPS = 0.05


class OptimizerWatch:
    """What a monitor has seen of one optimizer.

    Args:
        model: The model that is trained.
        optimizer: The `AdaptiveLossScaleOptimizer`.
        name: Its name. Empty if there is only one optimizer.
        every: Number of steps between two records.
        stuck_after: Number of skipped steps in a row after which training is stuck. `None` for
            never.

    Attributes:
        layers: Pairs of a name and a `LayerScaling`, of the layers that it scales.
        first_step: The step at which the watch began.
        figures: Dict of the figures for the logs.
        stuck: Whether training is stuck.
    """

    def __init__(
        self, model: keras.Model, optimizer: Any, name: str, every: int, stuck_after: int | None
    ) -> None:
        self._optimizer, self._prefix = optimizer, f"{name}_" if name else ""
        self._every, self._stuck_after = every, stuck_after
        self.layers = scaled_layers(model)
        if name:
            own = set(map(id, optimizer.scaled_layers))
            self.layers = [(path, layer) for path, layer in self.layers if id(layer) in own]
        self.stuck = False
        self._recent: collections.deque[Any] = collections.deque(maxlen=_RECENT)
        snapshot = self._take_snapshot()
        self.first_step = self._last_recorded = snapshot.step
        self._skips_since, self._skips_told = snapshot, False
        self._overflows = [layer_snapshot.overflows for layer_snapshot in snapshot.layers]

    def _take_snapshot(self) -> Snapshot:
        snapshot = Snapshot.of([layer for _, layer in self.layers], self._optimizer)
        figures = {
            "loss_scale": 2.0**snapshot.log2_loss_scale,
            "skipped_steps": snapshot.skipped_steps,
            "underflow": snapshot.worst_underflow,
        }
        if snapshot.worst_flushed is not None:
            figures["float8_flushed"] = snapshot.worst_flushed
        self.figures = {f"{self._prefix}{name}": value for name, value in figures.items()}
        return snapshot

    def look(self, end: bool = False) -> Snapshot | None:
        """Reads the scales and checks for stuck training. A `Snapshot` if it is time to record."""
        snapshot = self._take_snapshot()
        self._recent.append(snapshot)
        stuck_after = self._stuck_after
        self.stuck = stuck_after is not None and snapshot.skipped_in_a_row >= stuck_after
        self._look_at_skips(snapshot)
        new = snapshot.step - self._last_recorded
        if new >= self._every or (new > 0 and (end or self.stuck)):
            self._last_recorded = snapshot.step
            return snapshot
        return None

    def _look_at_skips(self, snapshot: Snapshot) -> None:
        """Warns once if many steps are skipped, though not many in a row."""
        steps = snapshot.step - self._skips_since.step
        if steps < _SKIPS_SEEN_OVER or self._skips_told:
            return
        skipped = snapshot.skipped_steps - self._skips_since.skipped_steps
        self._skips_since = snapshot
        if skipped > _MANY_SKIPS * steps:
            self._skips_told = True
            warnings.warn(
                f"{skipped} of the last {steps} steps were skipped, since their gradients were not "
                f"finite.{self._blamed()} Call `scale_table(model)` to see how near to overflow "
                "layers are; layers without a loss scale of their own are not in it.",
                stacklevel=2,
            )

    def complaint(self) -> str:
        """A sentence: training is stuck, since when, and at what scales."""
        last = self._recent[-1]
        since = last.step - last.skipped_in_a_row
        scales = ", ".join(f"2^{m.log2_loss_scale} at {m.step}" for m in self._recent)
        text = (
            f"Training is stuck: the last {last.skipped_in_a_row} steps were skipped, all since "
            f"step {since}, since their gradients were not finite. Weights are as they were "
            f"then. Loss scale S: {scales}."
        )
        return text + self._blamed()

    def _blamed(self) -> str:
        """A sentence about the layer that overflowed most, or an empty string."""
        blamed = [
            f"'{name}' ({layer_snapshot.overflows - before})"
            for (name, _), layer_snapshot, before in zip(
                self.layers, self._recent[-1].layers, self._overflows, strict=True
            )
            if layer_snapshot.overflows > before
        ]
        return f" Layers blamed in this run: {', '.join(blamed)}." if blamed else ""
