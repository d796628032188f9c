"""The loss scalings that benchmarks compare."""

import dataclasses
from collections.abc import Callable

import keras

import tf_adaptive_ls as als
from benchmarks import rules

FLOAT32 = "float32"
KERAS = "Keras, dynamic"
OURS = "adaptive (ours)"


@dataclasses.dataclass(frozen=True)
class Strategy:
    """How a model is trained.

    Args:
        name: Short name for tables.
        optimizer: `inner optimizer -> optimizer`.
        wrapped: Whether the model is wrapped.
        policy: The dtype policy to build it under.
    """

    name: str
    optimizer: Callable
    wrapped: bool = False
    policy: str = "mixed_float16"


def fixed(scale):
    """A constant loss scale; overflows are not detected."""

    def optimizer(inner):
        inner.loss_scale_factor = scale
        return inner

    return Strategy(f"fixed {scale:g}", optimizer)


def layerwise(name, rule, **kwargs):
    """A scale per layer, by `rule`."""

    def optimizer(inner):
        return als.AdaptiveLossScaleOptimizer(inner, rule=rule, **kwargs)

    return Strategy(name, optimizer, wrapped=True)


REFERENCE = Strategy(FLOAT32, lambda inner: inner, policy="float32")

STRATEGIES = (
    Strategy("no scaling", lambda inner: inner),
    fixed(2**7),
    fixed(2**10),
    Strategy(KERAS, keras.optimizers.LossScaleOptimizer),
    layerwise("Zhao et al.", als.GaussianRule()),
    layerwise("LogMax", rules.LogMaxRule()),
    layerwise("amax history", rules.AmaxHistoryRule()),
    layerwise(OURS, als.QuantileRule()),
)

# Ours with one setting changed, to choose defaults.
VARIATIONS = (
    layerwise("no memory", als.QuantileRule(forget=1000.0)),
    layerwise("forget 0.1", als.QuantileRule(forget=0.1)),
    layerwise(f"{OURS}: 0.01", als.QuantileRule()),
    layerwise("forget 0.001", als.QuantileRule(forget=0.001)),
    layerwise("headroom 1", als.QuantileRule(headroom=1)),
    layerwise("headroom 3", als.QuantileRule(headroom=3)),
    layerwise("headroom 7", als.QuantileRule(headroom=7)),
    layerwise("underflow 1e-1", als.QuantileRule(underflow=1e-1)),
    layerwise("underflow 1e-2", als.QuantileRule(underflow=1e-2)),
    layerwise("every step", als.QuantileRule(), sample_every=1),
    layerwise("every 100 steps", als.QuantileRule(), sample_every=100),
)
