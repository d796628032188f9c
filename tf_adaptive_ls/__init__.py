"""Adaptive loss scaling for Keras: every layer finds its own float16 loss scale."""

from tf_adaptive_ls.calibration import Calibration, LayerRange, calibrate
from tf_adaptive_ls.float_format import FloatFormat
from tf_adaptive_ls.loss_scaled import LossScaled, neutral_scales
from tf_adaptive_ls.monitor import LossScaleMonitor, StuckTrainingError
from tf_adaptive_ls.nonfinite import Explanation, TensorReading, explain_nonfinite
from tf_adaptive_ls.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.run_record import Run, load_run, run_of
from tf_adaptive_ls.scale_rules import FixedRule, GaussianRule, QuantileRule, ScaleRule
from tf_adaptive_ls.scale_table import ScaleRow, ScaleTable, scale_table
from tf_adaptive_ls.spectrum import Spectrum
from tf_adaptive_ls.wrapping import strip_model, wrap_model

__all__ = [
    "AdaptiveLossScaleOptimizer",
    "Calibration",
    "Explanation",
    "FixedRule",
    "FloatFormat",
    "GaussianRule",
    "LayerRange",
    "LossScaleMonitor",
    "LossScaled",
    "QuantileRule",
    "Run",
    "ScaleRow",
    "ScaleRule",
    "ScaleTable",
    "Spectrum",
    "StuckTrainingError",
    "TensorReading",
    "calibrate",
    "explain_nonfinite",
    "load_run",
    "neutral_scales",
    "run_of",
    "scale_table",
    "strip_model",
    "wrap_model",
]
