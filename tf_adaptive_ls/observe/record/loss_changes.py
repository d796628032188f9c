"""The part of a record that a `LossChangeMonitor` writes."""

import dataclasses
import math
from typing import Any

import numpy as np

from tf_adaptive_ls.observe.loss_change.allocation import Allocation


@dataclasses.dataclass(frozen=True, eq=False)
class LossChanges:
    """The change of the loss during a run, divided among layers.

    Arrays of N paths from one point of training to another, and L layers. All figures are in units
    of the loss; a negative share has lowered the loss. See `Allocation`.

    Attributes:
        layers: List of L strings, as in `scale_table`.
        since, steps: `[N]`, number of steps at the start and at the end of each path. With
            optimizers other than `AdaptiveLossScaleOptimizer`, as they count steps.
        loss_before, loss_after: `[N]`, the loss at both ends.
        error: `[N]`, |change of the loss - sum of all shares|.
        statistics: `[N]`, the share of moving statistics.
        helping: `[N]`, the share of weights that have lowered the loss.
        allocated: `[N, L]`, the share of each layer.
        standard_errors: `[N, L]`, their standard errors; NaN if there was only one batch.
        as_trained: `[N, L]`, the share of each layer from gradients in the precision of training;
            NaN if these were not asked for.
    """

    layers: list[str]
    since: np.ndarray
    steps: np.ndarray
    loss_before: np.ndarray
    loss_after: np.ndarray
    error: np.ndarray
    statistics: np.ndarray
    helping: np.ndarray
    allocated: np.ndarray
    standard_errors: np.ndarray
    as_trained: np.ndarray


def entry_of_loss_change(
    step: int, since: int, epoch: int, allocation: Allocation, as_trained: Allocation | None
) -> dict[str, Any]:
    """A dict for JSON. The arguments are those of `RunWriter.add_loss_change`."""
    layers = {
        name: [
            _number(value),
            _number(allocation.standard_errors[name]),
            None if as_trained is None else _number(as_trained.layers[name]),
        ]
        for name, value in allocation.layers.items()
    }
    return {
        "loss_change": step,
        "since": since,
        "epoch": epoch,
        "loss_before": _number(allocation.loss_before),
        "loss_after": _number(allocation.loss_after),
        "error": _number(allocation.error),
        "statistics": _number(allocation.statistics),
        "helping": _number(allocation.helping),
        "intervals": allocation.intervals,
        "layers": layers,
    }


def loss_changes_of(lines: list[dict[str, Any]]) -> LossChanges | None:
    """The `LossChanges` of a list of entries. `None` if the list is empty."""
    if not lines:
        return None
    # A layer that was unfrozen in between appears in later entries only.
    layers = list(dict.fromkeys(name for line in lines for name in line["layers"]))
    per_layer = np.array(
        [[line["layers"].get(name, [0.0, 0.0, 0.0]) for name in layers] for line in lines],
        "float64",
    ).reshape(len(lines), len(layers), 3)
    names = ("since", "loss_before", "loss_after", "error", "statistics", "helping")
    arrays = {name: np.array([line[name] for line in lines], "float64") for name in names}
    return LossChanges(
        layers=layers,
        steps=np.array([line["loss_change"] for line in lines]),
        since=arrays.pop("since").astype(int),
        allocated=per_layer[..., 0],
        standard_errors=per_layer[..., 1],
        as_trained=per_layer[..., 2],
        **arrays,
    )


def _number(value: float | np.ndarray) -> float | None:
    """A number for JSON with nine digits, so that sums keep six. `null` if it is not finite."""
    return float(f"{value:.9g}") if math.isfinite(value) else None
