"""Adaptive loss scaling for Keras: every layer finds its own float16 loss scale."""

from tf_adaptive_ls.float_format import FloatFormat
from tf_adaptive_ls.loss_scaled import LossScaled, neutral_scales
from tf_adaptive_ls.nonfinite import Explanation, TensorReading, explain_nonfinite
from tf_adaptive_ls.optimizer import AdaptiveLossScaleOptimizer
from tf_adaptive_ls.scale_rules import FixedRule, GaussianRule, QuantileRule, ScaleRule
from tf_adaptive_ls.scale_table import ScaleRow, ScaleTable, scale_table
from tf_adaptive_ls.spectrum import Spectrum
from tf_adaptive_ls.wrapping import strip_model, wrap_model

__all__ = [
    "AdaptiveLossScaleOptimizer",
    "Explanation",
    "FixedRule",
    "FloatFormat",
    "GaussianRule",
    "LossScaled",
    "QuantileRule",
    "ScaleRow",
    "ScaleRule",
    "ScaleTable",
    "Spectrum",
    "TensorReading",
    "explain_nonfinite",
    "neutral_scales",
    "scale_table",
    "strip_model",
    "wrap_model",
]
