"""The ways to scale float8 gradients that `float8` compares."""

import dataclasses
import math
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

import tf_adaptive_ls as als
from tf_adaptive_ls.backend import autodiff, trainer
from tf_adaptive_ls.numerics import scale_update, spectrum
from tf_adaptive_ls.numerics.report import SIZE, Report
from tf_adaptive_ls.numerics.rounding import fitting_factor, rounded
from tf_adaptive_ls.numerics.tiny_unit import TOP
from tf_adaptive_ls.training.float8.products import in_float8, products_in

NO_SCALING, BEST_FIXED, OURS = "no scaling", "best fixed scale", "ours"
BLOCKS = "ours, blocks of 32"
CURRENT, HISTORY = "per tensor, current", "per tensor, history"
# log2 of the scales from which the best one is chosen afterwards.
FIXED = (5, 10, 15, 20)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a model is trained.

    Args:
        name: Short name for tables.
        model: `plain model -> model`.
        optimizer: `inner optimizer -> optimizer`.
        policy: The dtype policy to build the plain model under.
        callback: `() -> keras.callbacks.Callback` that moves the scale, or `None`.
        log2_scales: Scales to try one after the other, instead of any that moves.
    """

    name: str
    model: Callable = lambda plain: plain
    optimizer: Callable = keras.optimizers.LossScaleOptimizer
    policy: str = "mixed_float16"
    callback: Callable | None = None
    log2_scales: tuple = ()


def ways(backward):
    """All ways for gradients in one format. Inputs and kernels are e4m3 in all of them."""
    float8 = als.Float8(backward=backward)

    in_blocks = als.Float8(backward=backward, block_size=32)

    def wrapped(plain):
        return als.wrap_model(plain, float8=float8)

    def wrapped_in_blocks(plain):
        return als.wrap_model(plain, float8=in_blocks)

    def one_scale(plain):
        # Without a plan, because plans need our optimizer.
        model = wrapped(plain)
        return keras.Model(model.inputs, model.outputs)

    def per_tensor(history):
        return lambda plain: _replaced(plain, lambda each: PerTensor(each, float8, history))

    def fixed(inner):
        return als.AdaptiveLossScaleOptimizer(inner, initial_scale=1.0, rule=als.FixedRule())

    return (
        Way(NO_SCALING, wrapped, fixed, log2_scales=(0,)),
        Way(BEST_FIXED, wrapped, fixed, log2_scales=FIXED),
        Way("dynamic scale", one_scale),
        Way("rising minimum", one_scale, callback=RisingMinimum),
        Way("LogMax", one_scale, callback=LogMax),
        Way(HISTORY, per_tensor(1024)),
        Way(CURRENT, per_tensor(None)),
        Way(OURS, wrapped, als.AdaptiveLossScaleOptimizer),
        Way(BLOCKS, wrapped_in_blocks, als.AdaptiveLossScaleOptimizer),
    )


def variations(backward):
    """Ours with other settings, and with the default."""

    def way(name, margin=scale_update.SATURATION_MARGIN, rounding="nearest", **settings):
        float8 = als.Float8(backward=backward, rounding=rounding)

        def optimizer(inner):
            # Not for users: it applies until the next one.
            scale_update.SATURATION_MARGIN = margin
            return als.AdaptiveLossScaleOptimizer(inner, **settings)

        return Way(name, lambda plain: als.wrap_model(plain, float8=float8), optimizer)

    return (
        way("default: margin 3, a sample every 10"),
        *(way(f"margin {margin}", margin) for margin in (0, 1, 5)),
        *(way(f"a sample every {n}", sample_every=n) for n in (1, 100)),
        way("stochastic rounding", rounding="stochastic"),
    )


def everywhere():
    """e5m2 also in the forward pass and in all layers, as in Cambier et al. 2020 (S2FP8)."""
    float8 = als.Float8("float8_e5m2", "float8_e5m2", layer_filter=lambda layer: True)

    def wrapped(plain):
        return als.wrap_model(plain, float8=float8)

    def fixed(inner):
        return als.AdaptiveLossScaleOptimizer(inner, initial_scale=1.0, rule=als.FixedRule())

    return (
        Way(NO_SCALING, wrapped, fixed, "float32", log2_scales=(0,)),
        Way("a scale of 128", wrapped, fixed, "float32", log2_scales=(7,)),
        Way(OURS, wrapped, als.AdaptiveLossScaleOptimizer, "float32"),
    )


WIDE = (
    Way("float32", optimizer=lambda inner: inner, policy="float32"),
    Way("float16, ours", als.wrap_model, als.AdaptiveLossScaleOptimizer),
)


def of_keras(plain):
    """Keras's own float8 for Dense and EinsumDense, without the first and last layer."""
    for part in _products(plain):
        part.quantize("float8")
    return plain


# Its scales become NaN for small gradients under mixed_float16.
KERAS_FLOAT8 = Way("Keras's float8", of_keras, lambda inner: inner, policy="mixed_bfloat16")


def only_dense(plain):
    """Whether Keras's float8 covers all matmuls of a model."""
    return all(isinstance(part, (layers.Dense, layers.EinsumDense)) for part in _products(plain))


def _products(plain):
    return [part for layer in _chosen(plain) for part in products_in(layer)]


def _chosen(plain):
    """The layers with matmuls except the first and the last, in the order of the graph."""
    return [layer for layer in plain.layers if products_in(layer)][1:-1]


def _replaced(plain, replace):
    chosen = {id(layer) for layer in _chosen(plain)}
    return keras.models.clone_model(
        plain, clone_function=lambda each: replace(each) if id(each) in chosen else each
    )


class PerTensor(layers.Wrapper):
    """A layer whose gradients are quantized to float8 with their own scales.

    Args:
        layer: The layer.
        float8: The `Float8`.
        history: `None` to scale each gradient by its current amax. Otherwise the number of past
            steps whose largest amax is used, as in Transformer Engine's delayed scaling.
    """

    def __init__(self, layer, float8, history):
        super().__init__(layer, name=layer.name, dtype=layer.dtype_policy)
        self.float8, self._history = float8, history
        self._products = products_in(layer)
        self._seen = [self._add_history() for _ in self._products]

    def _add_history(self):
        # Stored as Keras's own float8 does.
        return self.add_weight(
            shape=(self._history or 1,),
            initializer="zeros",
            dtype="float32",
            autocast=False,
            overwrite_with_gradient=True,
        )

    def call(self, *args, **kwargs):
        with in_float8(self._products, self):
            return self.layer(*args, **kwargs)

    def tap(self, tensor, place, cast):
        """As in `Float8Call`."""
        float_format = self.float8.backward_format

        def identity(_, tensor, seen):
            def backward(*gradients):
                (gradient,) = gradients
                now = spectrum.peaks([gradient])
                peak = ops.max(seen) if self._history else now[0]
                factor = fitting_factor(peak, float_format)
                now = ops.where(ops.isfinite(now), now, 0.0)
                return rounded(gradient, float_format, factor=factor), ops.append(seen[1:], now)

            return ops.convert_to_tensor(tensor), backward

        return autodiff.custom_gradient(identity)(tensor, self._seen[place].value)


def rising_minimums(steps):
    """8K after 40/340 of the steps, 32K after 150/340: Mellempudi et al. 2019, GNMT."""
    return ((round(steps * 40 / 340), 2.0**13), (round(steps * 150 / 340), 2.0**15))


class RisingMinimum(keras.callbacks.Callback):
    """Mellempudi et al. 2019, section 3.1: a dynamic loss scale with a rising minimum.

    The minimum is 1 at first, 8K after 40/340 of training, and 32K after 150/340, as for their
    GNMT.
    """

    def __init__(self, steps=None):
        super().__init__()
        self.steps, self.step = steps, 0

    def on_train_batch_end(self, batch, logs=None):
        trainer.sync_state(self.model)
        self.step += 1
        reached = (scale for first, scale in rising_minimums(self.steps) if self.step > first)
        minimum = max(reached, default=1.0)
        scale = self.model.optimizer.dynamic_scale
        scale.assign(max(float(scale.numpy()), minimum))


class LogMax(keras.callbacks.Callback):
    """OpenSeq2Seq's LogMax for a single loss scale. It is given the largest quantized gradient."""

    def __init__(self, steps=None):
        super().__init__()
        self.mean = self.square = None

    def on_train_batch_end(self, batch, logs=None):
        trainer.sync_state(self.model)
        scale = self.model.optimizer.dynamic_scale
        scaled = [each.loss_scaling for each in self.model.layers if each.weights]
        scaled = [each for each in scaled if each.float8]
        none = np.zeros(SIZE, "float32")
        reports = (Report.unpacked(none, each.float8_report.numpy()) for each in scaled)
        largest = max(float(report.rounded.largest) for report in reports)
        top = scaled[0].operand_format.max_exponent + 1
        log2_scale = math.log2(float(scale.numpy()))
        if 0 < largest < TOP:
            x = math.log2(largest) - log2_scale
            if self.mean is None:
                self.mean, self.square = x, x * x
            self.mean += 0.01 * (x - self.mean)
            self.square += 0.001 * (x * x - self.square)
            deviation = math.sqrt(max(self.square - self.mean**2, 0.0))
            log2_scale = math.floor(top - (self.mean + 3.09 * deviation))
        scale.assign(2.0 ** min(max(log2_scale, -30), 60))
