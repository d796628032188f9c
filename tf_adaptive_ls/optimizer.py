"""`AdaptiveLossScaleOptimizer`: a loss scale, and one more for every layer."""

import math
import warnings

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls import backend, scale_state, spectrum
from tf_adaptive_ls.gradient_tap import power_of_two
from tf_adaptive_ls.observation import observe
from tf_adaptive_ls.scale_rules import NOTHING_SEEN, QuantileRule, ScaleRule
from tf_adaptive_ls.scale_state import (
    FORMAT,
    LOG2_SCALE,
    MAX_LOG2_SCALE,
    MAX_MEMORY_SIZE,
    MEASURE,
    MEMORY,
    OVERFLOWS,
    SAMPLE_LOG2_SCALE,
    Row,
)

# Keras's own default, for models without `LossScaled` layers.
_KERAS_GROWTH_STEPS = 2000
_NEVER = 0  # a step counter that counts from 1 never gets there


@keras.saving.register_keras_serializable("tf_adaptive_ls")
class AdaptiveLossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """A `LossScaleOptimizer` that also chooses the scales of `LossScaled` layers.

    On every step, with S the loss scale, r the log2 scale of a layer, and
    `gradients` those of S * loss:

        if all weight gradients are finite:
            apply gradients / S with the inner optimizer
            change of each r    = rule(what the layer produced)
            change of log2(S)   = rule(what arrived anywhere at S in float16)
            if that was nothing but zeros: raise S to `initial_scale`
            r = r + change of r - change of log2(S)
        else:
            skip the step
            lower r of each layer that made finite gradients non-finite, unless
                those that arrived at a later layer were not finite already
            if there is no such layer, or nothing was ever sampled: lower S
        sample the next step if it is the `update_every`-th, if this one was skipped,
            or if a scale moved further than a sample can be trusted

    The rule is told the largest gradient of every step, and on some a sample of all.
    A change of S by the rule is taken back from every r, so that it moves no layer.
    Scales stay whole powers of two, S and every 2**r within 2**-60 … 2**60.

    Use it in `compile`, or in a custom loop through `scale_loss` and `apply`:

    ```python
    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(loss_fn(y, model(x, training=True)))
    variables = model.trainable_variables
    optimizer.apply(tape.gradient(loss, variables), variables)
    ```

    For a model without `LossScaled` layers it is Keras's `LossScaleOptimizer`.

    Args:
        inner_optimizer: The `keras.optimizers.Optimizer` that updates the weights,
            or its name. Clipping, weight decay, averaging and accumulation are its
            business, and see unscaled gradients of weights alone.
        initial_scale: Float, a power of two. The first S.
        rule: A `ScaleRule`, defaults to `QuantileRule()`.
        update_every: Int >= 1. Steps from one sample to the next once the scales
            have settled. Spectra change slowly, sampling is not free; sampling on
            every step is not better (`./dev benchmark convergence --variations`),
            on every hundredth only is worse.
        name: String.

    Raises:
        ValueError: If an argument is not as said, or if `inner_optimizer` scales
            losses itself.

    Reference: Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision
    Training", 2019 (arXiv 1910.12385).
    """

    def __init__(
        self, inner_optimizer, initial_scale=2.0**15, rule=None, update_every=10, name=None
    ):
        inner_optimizer = _checked_inner_optimizer(inner_optimizer)
        _check_initial_scale(initial_scale)
        rule = QuantileRule() if rule is None else rule
        if not isinstance(rule, ScaleRule):
            raise ValueError(
                "Expected `rule` to be a ScaleRule. "
                f"Received: rule={rule!r} (of type {type(rule).__name__}). "
                "Use for example QuantileRule(headroom=4)."
            )
        if not 0 <= rule.memory_size <= MAX_MEMORY_SIZE:
            raise ValueError(
                f"Expected `rule` to remember at most {MAX_MEMORY_SIZE} numbers per layer. "
                f"Received: rule={rule!r}, with memory_size={rule.memory_size}."
            )
        if not isinstance(update_every, int) or isinstance(update_every, bool) or update_every < 1:
            raise ValueError(
                "Expected `update_every` to be a whole number of steps, at least 1. "
                f"Received: update_every={update_every!r}."
            )
        super().__init__(inner_optimizer, initial_scale=float(initial_scale), name=name)
        self.rule = rule
        self.update_every = update_every

    @property
    def loss_scale(self):
        """S, the scale of the loss: a float, readable between steps."""
        return float(self.dynamic_scale.numpy()) if self.built else self.initial_scale

    @property
    def steps(self):
        """How many steps were taken or skipped so far: an int, readable between steps."""
        return int(self._steps.numpy()) if self.built else 0

    @property
    def skipped_steps(self):
        """How many steps were skipped so far: an int, readable between steps."""
        return int(self._skipped_steps.numpy()) if self.built else 0

    @property
    def last_step_skipped(self):
        """Whether the last step was skipped: a bool, readable between steps."""
        return self.skipped_in_a_row > 0

    @property
    def skipped_in_a_row(self):
        """How many steps up to the last were skipped: an int, readable between steps."""
        return int(self._skipped_in_a_row.numpy()) if self.built else 0

    def build(self, var_list):
        states = [v for v in var_list if _is_state(v)]
        _warn_if_useless(states)
        super().build([v for v in var_list if not _is_state(v)])
        self.dynamic_growth_steps = _NEVER if states else _KERAS_GROWTH_STEPS
        self._steps = self._add_counter("steps")
        self._skipped_steps = self._add_counter("skipped_steps")
        self._skipped_in_a_row = self._add_counter("skipped_in_a_row")
        self._steps_to_measurement = self._add_counter("steps_to_measurement")
        self._memory = self.add_variable(
            shape=(self.rule.memory_size,),
            dtype="float32",
            initializer=keras.initializers.Constant(NOTHING_SEEN),
            aggregation="none",
            name="loss_scale_memory",
        )
        # Past Keras, which would take the variables for the optimizer's own.
        object.__setattr__(self, "_model_variables", list(var_list))

    def _add_counter(self, name):
        return self.add_variable(
            shape=(), dtype="int32", initializer="zeros", aggregation="none", name=name
        )

    def apply(self, grads, trainable_variables=None):
        """Updates weights and scales from the gradients of the scaled loss.

        Args:
            grads: List of gradients, one per variable.
            trainable_variables: List of variables, those of the `LossScaled`
                layers among them: all of `model.trainable_variables`. Defaults to
                those that the optimizer was built with.

        Raises:
            ValueError: If no variables are given to an optimizer not built yet.
        """
        if trainable_variables is None:
            if not self.built:
                raise ValueError(
                    "Expected the variables of the model with the first gradients. "
                    "Received: trainable_variables=None. Pass them, or call "
                    "`optimizer.build(model.trainable_variables)` before."
                )
            trainable_variables = self._model_variables
        trainable_variables = list(trainable_variables)
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(trainable_variables)

        weights, reports = _split(grads, trainable_variables)
        gradients, variables = _unzipped(weights)
        if not reports:
            finite = self.check_finite(gradients)
            super().apply(gradients, variables)
            self._count_step(finite)
            return
        seen, states = self._observe(weights, reports)
        log2_scale = _log2(self.dynamic_scale)
        backend.run_if(seen.finite, self._apply_inner, gradients, variables)
        self._count_step(seen.finite)
        self._update_scales(seen, states, [state for _, state in reports], log2_scale)

    def _apply_inner(self, gradients, variables):
        self.inner_optimizer.apply(self._unscaled(gradients), variables)

    def _unscaled(self, gradients):
        return [None if g is None else ops.divide(g, self.dynamic_scale) for g in gradients]

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        """`apply` without side effects, see `keras.optimizers.Optimizer`."""
        if not self.built:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        own = list(zip(self.variables, optimizer_variables, strict=True))
        model = list(zip(self._model_variables, trainable_variables, strict=True))
        with keras.StatelessScope([*model, *own]) as scope:
            weights, reports = _split(grads, self._model_variables)
            gradients, variables = _unzipped(weights)
            if reports:
                seen, states = self._observe(weights, reports)
                finite = seen.finite
            else:
                finite = self.check_finite(gradients)
            log2_scale = _log2(self.dynamic_scale)
            values = [scope.get_current_value(v) for v in variables]
            inner_variables = self.inner_optimizer.variables
            inner_values = [scope.get_current_value(v) for v in inner_variables]
            values, inner_values = ops.cond(
                finite,
                lambda: self.inner_optimizer.stateless_apply(
                    inner_values, self._unscaled(gradients), values
                ),
                lambda: (values, inner_values),
            )
            for variable, value in zip(
                [*variables, *inner_variables], [*values, *inner_values], strict=True
            ):
                variable.assign(value)
            self._count_step(finite)
            if reports:
                self._update_scales(seen, states, [state for _, state in reports], log2_scale)
        return (
            [scope.get_current_value(v) for v in self._model_variables],
            [scope.get_current_value(v) for v in self.variables],
        )

    def _count_step(self, finite):
        skipped = ops.logical_not(finite)
        self._steps.assign_add(1)
        self._skipped_steps.assign_add(ops.cast(skipped, "int32"))
        in_a_row = self._skipped_in_a_row.value + 1
        self._skipped_in_a_row.assign(ops.where(skipped, in_a_row, ops.zeros_like(in_a_row)))

    def _observe(self, weights, reports):
        """What the step tells, and the states that it began with, stacked."""
        states = scale_state.stacked([state for _, state in reports])
        layers = [state.loss_scaled for _, state in reports]
        seen = observe(weights, [report for report, _ in reports], layers, states)
        return seen.summed_over_replicas(), states

    def _update_scales(self, seen, states, variables, log2_scale):
        """Moves all scales by what was `seen`.

        Args:
            seen: An `Observation`.
            states: What the states were in the step, `[layers, rows, bins]`.
            variables: List of the states' variables.
            log2_scale: log2(S) of the step, a scalar.
        """
        finite, skipped = seen.finite, ops.logical_not(seen.finite)
        r = states[:, Row.HEADER, LOG2_SCALE]
        asked = states[:, Row.HEADER, MEASURE] > 0
        measured = ops.logical_and(asked, finite)

        called_at = [state.loss_scaled.called_at for state in variables]
        turn = np.argsort(np.argsort(called_at)).astype("float32")
        last_broken_arrival = ops.max(ops.where(seen.arrived_broken, turn, -1.0))
        at_fault = ops.logical_and(seen.produced_broken, turn > last_broken_arrival)
        # Before the first measurement all scales are one, S.
        ever_measured = ops.any(states[:, Row.PRODUCED_PEAK] > 0)
        at_fault = ops.logical_and(at_fault, ever_measured)
        s_at_fault = ops.logical_and(skipped, ops.logical_not(ops.any(at_fault)))
        backoff = float(self.rule.backoff(FORMAT))

        # Each layer moves by what it produced, S, in the last row, by what arrived at it.
        peaks_at_s = ops.sum(seen[Row.ARRIVED_PEAK], axis=0, keepdims=True)
        samples_at_s = ops.sum(seen[Row.ARRIVED], axis=0, keepdims=True)
        memory = states[:, Row.HEADER, MEMORY : MEMORY + self.rule.memory_size]
        memory = ops.concatenate([memory, self._memory.value[None]])
        changes, new_memory = self.rule(
            ops.concatenate([seen[Row.PRODUCED], samples_at_s]),
            ops.concatenate([seen[Row.PRODUCED_PEAK], peaks_at_s]),
            memory,
            FORMAT,
        )
        change, change_of_s = changes[:-1], changes[-1]
        unseen = spectrum.nonzero_total(peaks_at_s[0]) == 0
        restart = ops.maximum(math.log2(self.initial_scale) - log2_scale, 0.0)
        restart = ops.where(ops.any(measured), restart, 0.0)
        change_of_s = ops.where(unseen, restart, change_of_s)

        change = ops.where(at_fault, -backoff, ops.where(finite, change, 0.0))
        change_of_s = ops.where(s_at_fault, -backoff, ops.where(finite, change_of_s, 0.0))
        new_log2_scale = _bounded(log2_scale + change_of_s)
        change_of_s = new_log2_scale - log2_scale
        taken_back = ops.where(finite, change_of_s, 0.0)
        new_r = _bounded(r + change - taken_back)
        moves = ops.concatenate([new_r - r, np.zeros(1, "float32")]) + change_of_s
        memory = ops.where(finite, new_memory, memory) + moves[:, None]

        # A spectrum that moves so far was cut off at an end of the format. Without
        # a sample, a scale moves only because its gradients are about to overflow.
        moved = ops.maximum(ops.max(ops.abs(change)), ops.abs(change_of_s))
        too_far = moved > ops.where(ops.any(asked), backoff, 0.0)
        wait = ops.where(
            ops.any(asked), self.update_every - 1, self._steps_to_measurement.value - 1
        )
        wait = ops.where(ops.logical_or(skipped, too_far), 0, ops.maximum(wait, 0))

        sampled_at = states[:, Row.HEADER, SAMPLE_LOG2_SCALE]
        header = scale_state.header(
            new_r,
            measure=ops.where(ops.equal(wait, 0), 1.0, -1.0),
            sample_log2_scale=ops.where(measured, r + log2_scale, sampled_at),
            overflows=states[:, Row.HEADER, OVERFLOWS] + ops.cast(at_fault, "float32"),
            memory=memory[:-1],
        )
        spectra = ops.where(measured[:, None, None], seen.spectra, states[:, 1 : len(Row)])
        states = ops.unstack(scale_state.with_header(header, spectra), len(variables))
        for variable, state in zip(variables, states, strict=True):
            variable.assign(state)
        self.dynamic_scale.assign(power_of_two(new_log2_scale))
        self._memory.assign(memory[-1])
        self._steps_to_measurement.assign(wait)

    def finalize_variable_values(self, var_list):
        super().finalize_variable_values([v for v in var_list if not _is_state(v)])

    def get_config(self):
        return {
            "name": self.name,
            "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
            "initial_scale": self.initial_scale,
            "rule": keras.saving.serialize_keras_object(self.rule),
            "update_every": self.update_every,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        for name in ("inner_optimizer", "rule"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


def _is_state(variable):
    return hasattr(variable, "loss_scaled")


def _split(grads, variables):
    """Pairs `(gradient, variable)` of weights, and `(report, state)` of layers that ran."""
    pairs = list(zip(grads, variables, strict=True))
    return (
        [(g, v) for g, v in pairs if not _is_state(v)],
        [(g, v) for g, v in pairs if _is_state(v) and g is not None],
    )


def _unzipped(weights):
    return [gradient for gradient, _ in weights], [variable for _, variable in weights]


def _log2(scale):
    return ops.round(ops.log2(ops.convert_to_tensor(scale)))


def _bounded(log2_scale):
    return ops.clip(log2_scale, -float(MAX_LOG2_SCALE), float(MAX_LOG2_SCALE))


def _checked_inner_optimizer(inner_optimizer):
    inner_optimizer = keras.optimizers.get(inner_optimizer)
    if isinstance(inner_optimizer, keras.optimizers.LossScaleOptimizer):
        raise ValueError(
            "Expected an `inner_optimizer` that does not scale the loss. Received: a "
            f"{type(inner_optimizer).__name__}. Pass the optimizer inside it: "
            "`inner_optimizer.inner_optimizer`."
        )
    if getattr(inner_optimizer, "loss_scale_factor", None) is not None:
        raise ValueError(
            "Expected an `inner_optimizer` that does not scale the loss. Received: "
            f"one with loss_scale_factor={inner_optimizer.loss_scale_factor}. Leave "
            "that out; the first loss scale is `initial_scale`."
        )
    return inner_optimizer


def _check_initial_scale(scale):
    usable = isinstance(scale, (int, float, np.number)) and not isinstance(scale, bool)
    if usable and math.isfinite(scale) and scale > 0:
        mantissa, exponent = math.frexp(scale)
        if mantissa == 0.5 and abs(exponent - 1) <= MAX_LOG2_SCALE:
            return
    raise ValueError(
        f"Expected `initial_scale` to be a power of two from 2**-{MAX_LOG2_SCALE} to "
        f"2**{MAX_LOG2_SCALE}. Received: initial_scale={scale!r}. The default is 2.0**15."
    )


def _warn_if_useless(states):
    if not states:
        warnings.warn(
            "AdaptiveLossScaleOptimizer was given a model without trainable LossScaled "
            "layers: it works like keras.optimizers.LossScaleOptimizer. Wrap the model "
            "with `wrap_model`, or its layers with `LossScaled`.",
            stacklevel=3,
        )
    elif not any(state.loss_scaled.is_limited for state in states):
        warnings.warn(
            "Loss scales do nothing for this model: none of its LossScaled layers "
            f"computes in {FORMAT.name}. Set the dtype policy before you build it: "
            f'keras.config.set_dtype_policy("mixed_{FORMAT.name}").',
            stacklevel=3,
        )
