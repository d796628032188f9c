"""Low-precision training for Keras: every layer finds its own loss scale.

Arrows between the wings only point downward: `observe` reads what `training` does, which is made
of `numerics`; under all of them is `backend`. `deploy` and `halp` stand beside training.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tf_adaptive_ls.deploy.quantization import quantize_weights
from tf_adaptive_ls.deploy.report import QuantizationReport, QuantizedKernel
from tf_adaptive_ls.halp.bit_centered import BitCentered
from tf_adaptive_ls.halp.recenter import Recenter
from tf_adaptive_ls.models.plain_copy import plain_copy
from tf_adaptive_ls.models.wrapping import strip_model, wrap_model
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.numerics.scale_rules import (
    NOTHING_SEEN,
    FixedRule,
    GaussianRule,
    QuantileRule,
    RisingMinimumRule,
    ScaleRule,
)
from tf_adaptive_ls.numerics.spectrum import (
    Spectrum,
    nonzero_total,
    quantile_exponent,
    top_exponent,
)
from tf_adaptive_ls.observe.calibration import Calibration, LayerRange, calibrate
from tf_adaptive_ls.observe.forward_range.ranges import forward_range
from tf_adaptive_ls.observe.forward_range.result import ForwardRange, PartRange
from tf_adaptive_ls.observe.forward_range.widening import Widening, widen
from tf_adaptive_ls.observe.loss_change.allocation import Allocation, loss_change
from tf_adaptive_ls.observe.loss_change.monitor import LossChangeMonitor
from tf_adaptive_ls.observe.monitor import LossScaleMonitor, StuckTrainingError
from tf_adaptive_ls.observe.narrow_reductions import NarrowReduction
from tf_adaptive_ls.observe.nonfinite import Explanation, TensorReading, explain_nonfinite
from tf_adaptive_ls.observe.record.float8 import Float8Record
from tf_adaptive_ls.observe.record.forward_rooms import ForwardRooms
from tf_adaptive_ls.observe.record.loss_changes import LossChanges
from tf_adaptive_ls.observe.record.run import Run, load_run, snapshot_run
from tf_adaptive_ls.observe.scale_table import ScaleRow, ScaleTable, scale_table
from tf_adaptive_ls.training.float8.settings import Float8
from tf_adaptive_ls.training.loss_scaled import LossScaled
from tf_adaptive_ls.training.neutral_scales import neutral_scales
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.training.readings import LayerSnapshot

__version__ = "0.2.0"

__all__ = [
    "NOTHING_SEEN",
    "AdaptiveLossScaleOptimizer",
    "Allocation",
    "BitCentered",
    "Calibration",
    "Explanation",
    "FixedRule",
    "Float8",
    "Float8Record",
    "FloatFormat",
    "ForwardRange",
    "ForwardRooms",
    "GaussianRule",
    "LayerRange",
    "LayerSnapshot",
    "LossChangeMonitor",
    "LossChanges",
    "LossScaleMonitor",
    "LossScaled",
    "NarrowReduction",
    "PartRange",
    "QuantileRule",
    "QuantizationReport",
    "QuantizedKernel",
    "Recenter",
    "RisingMinimumRule",
    "Run",
    "ScaleRow",
    "ScaleRule",
    "ScaleTable",
    "Spectrum",
    "StuckTrainingError",
    "TensorReading",
    "Widening",
    "calibrate",
    "explain_nonfinite",
    "forward_range",
    "load_run",
    "loss_change",
    "neutral_scales",
    "nonzero_total",
    "plain_copy",
    "quantile_exponent",
    "quantize_weights",
    "scale_table",
    "snapshot_run",
    "strip_model",
    "top_exponent",
    "widen",
    "wrap_model",
]


if TYPE_CHECKING:
    from tf_adaptive_ls.observe import plots as plots


def __getattr__(name: str) -> Any:
    # Imported on first use, because it needs matplotlib.
    if name == "plots":
        return importlib.import_module("tf_adaptive_ls.observe.plots")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
