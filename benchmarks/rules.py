"""The scale rules of other libraries, applied to each layer."""

import dataclasses

import keras
from keras import ops

import tf_adaptive_ls as als


def _largest(samples, peaks, float_format):
    """The binade of the largest gradient, and whether there is any."""
    top = ops.maximum(
        als.top_exponent(samples, float_format), als.top_exponent(peaks, float_format)
    )
    return top, top >= float_format.min_exponent


@keras.saving.register_keras_serializable("tf_adaptive_ls_benchmarks")
@dataclasses.dataclass(frozen=True)
class AmaxHistoryRule(als.ScaleRule):
    """Transformer Engine's delayed scaling: `largest value / amax / 2**margin`.

    amax is the largest magnitude of the last `history` steps: 1024 in Transformer Engine, 38 in all
    results so far.
    """

    margin: int = 0
    history: int = 38

    @property
    def memory_size(self):
        return self.history

    def __call__(self, samples, peaks, memory, float_format):
        top, seen = _largest(samples, peaks, float_format)
        amax = ops.where(seen, top, als.NOTHING_SEEN)
        memory = ops.concatenate([memory[:, 1:], amax[:, None]], axis=1)
        change = float_format.max_exponent - self.margin - ops.max(memory, axis=1)
        return ops.where(seen, ops.floor(change), 0.0), memory


@keras.saving.register_keras_serializable("tf_adaptive_ls_benchmarks")
@dataclasses.dataclass(frozen=True)
class LogMaxRule(als.ScaleRule):
    """OpenSeq2Seq's LogMax: `2**(16 - (mean + 3.09 deviations))` of log2(max|g|).

    Both are moving averages. The deviation is from the moving mean, and does not depend on the
    scale.
    """

    mean_decay: float = 0.99
    deviation_decay: float = 0.999
    deviations: float = 3.09

    @property
    def memory_size(self):
        return 2  # the mean; the mean plus one deviation

    def __call__(self, samples, peaks, memory, float_format):
        top, seen = _largest(samples, peaks, float_format)
        x = top + 0.5  # the middle of the binade
        known = memory[:, 0] > als.NOTHING_SEEN / 2
        mean = ops.where(known, self.mean_decay * memory[:, 0] + (1 - self.mean_decay) * x, x)
        variance = ops.where(known, ops.square(memory[:, 1] - memory[:, 0]), 0.0)
        variance += (1 - self.deviation_decay) * (ops.square(x - mean) - variance)
        upper = mean + ops.sqrt(variance)
        change = ops.floor(
            float_format.max_exponent + 1 - (mean + self.deviations * ops.sqrt(variance))
        )
        new = ops.stack([mean, upper], axis=1)
        return ops.where(seen, change, 0.0), ops.where(seen[:, None], new, memory)
