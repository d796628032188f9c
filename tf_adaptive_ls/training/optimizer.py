"""`AdaptiveLossScaleOptimizer`: the loss scale, and the scales of all layers."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import arrays, autodiff, devices, functions, keras_internals
from tf_adaptive_ls.backend.arguments import MAX_LOG2_SCALE, is_scale_value, is_whole
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.backend.wide_updates import is_of_16_bits, update_in_float32
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT
from tf_adaptive_ls.numerics.rounding import NOISE_BITS_OF_16, rounded_to_16_bits
from tf_adaptive_ls.numerics.scale_rules import QuantileRule, ScaleRule
from tf_adaptive_ls.numerics.scale_state import LayerStates, has_statistics
from tf_adaptive_ls.training.layer_scaling import LayerScaling, is_of_scaling
from tf_adaptive_ls.training.readings import LayerSnapshot
from tf_adaptive_ls.training.saved_config import checked_config, with_version
from tf_adaptive_ls.training.scale_keeper import ScaleKeeper, Signals, is_overwritten, is_scale

# The largest power of two in float16.
INITIAL_SCALE = 2.0**15

# Keras's default, for models without scaled layers, or with frozen scales only.
_KERAS_GROWTH_STEPS = 2000


@keras.saving.register_keras_serializable("tf_adaptive_ls")
class AdaptiveLossScaleOptimizer(keras.optimizers.LossScaleOptimizer):
    """A `LossScaleOptimizer` that also chooses the loss scale of each scaled layer.

    With S the loss scale, r the log2 scale of a layer, and `gradients` the gradients of
    S * loss, each step does the following:

        if all weight gradients are finite:
            apply gradients / S with the inner optimizer
            change of each r    = rule(gradients that the layer produced)
            change of log2(S)   = rule(float16 gradients that arrived anywhere at scale S, and
                gradients of float16 weights)
            if these were all zero: raise S to `initial_scale`
            r = r + change of r - change of log2(S)
        else:
            skip the step
            lower r of each layer that made finite gradients non-finite, unless the
                gradients that arrived at a later layer were non-finite already
            if there is no such layer, or nothing was ever sampled, or lowering r did not help:
                lower S; if no layer saw the overflow, remember not to raise S as far again
        sample the next step if it is the `sample_every`-th, if this one was skipped,
            or if a scale moved further than a sample can be trusted

    The rule sees the largest gradient of every step, and on some steps a sample of all
    gradients. If several steps are skipped in a row, the rule remembers the state before the
    first of them, so that scales recover quickly when the overflow had another cause.
    A change of S is removed from every r, so that it does not change the scale of any layer.
    Scales are powers of two; S and every 2**r stay within 2**-60 … 2**60.

    Use it in `compile`, or in a custom training loop with `scale_loss` and `apply`:

    ```python
    with tf.GradientTape() as tape:
        loss = optimizer.scale_loss(loss_fn(y, model(x, training=True)))
    variables = model.trainable_variables
    optimizer.apply(tape.gradient(loss, variables), variables)
    ```

    For a model without scaled layers, it works like Keras's `LossScaleOptimizer`.

    Args:
        inner_optimizer: A `keras.optimizers.Optimizer`, or its name. It updates the weights.
            Its clipping, weight decay, averaging and accumulation work on unscaled
            gradients.
        initial_scale: Float, a power of two. The first S.
        rule: A `ScaleRule`. Defaults to `QuantileRule()`.
        sample_every: Int >= 1. Number of steps between two samples once the scales have
            settled. Sampling on every step is not better (`./dev benchmark convergence
            --variations`); sampling only on every hundredth step is worse.
        stochastic_rounding: Bool, for weights of 16 bits, as under Keras's policies "float16"
            and "bfloat16". The inner optimizer then computes in float32, and new weights are
            rounded to one of their two neighbors, to the nearer one more often, so that the
            mean is exact. Without it, updates smaller than half of the last bit are lost.
            The inner optimizer must not be built yet; all its variables are float32. Random
            bits depend on a saved seed, on the number of steps taken, and on the weight.
        name: String.

    Raises:
        ValueError: If an argument is not as described, or if `inner_optimizer` scales
            losses itself.

    Reference: Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision
    Training", 2019 (arXiv 1910.12385).
    """

    def __init__(
        self,
        inner_optimizer: keras.optimizers.Optimizer | str,
        initial_scale: float = INITIAL_SCALE,
        rule: ScaleRule | None = None,
        sample_every: int = 10,
        stochastic_rounding: bool = False,
        name: str | None = None,
    ) -> None:
        inner_optimizer = _checked_inner_optimizer(inner_optimizer)
        _check_initial_scale(initial_scale)
        rule = QuantileRule() if rule is None else rule
        if not isinstance(rule, ScaleRule):
            raise ValueError(
                "Expected `rule` to be a ScaleRule. "
                f"Received: rule={rule!r} (of type {type(rule).__name__}). "
                "Use for example QuantileRule(headroom=4)."
            )
        if not is_whole(rule.memory_size):
            raise ValueError(
                "Expected `rule.memory_size` to be a whole number, at least 0. "
                f"Received: rule={rule!r}, with memory_size={rule.memory_size!r}."
            )
        if not is_whole(sample_every, 1):
            raise ValueError(
                "Expected `sample_every` to be a whole number of steps, at least 1. "
                f"Received: sample_every={sample_every!r}."
            )
        if not isinstance(stochastic_rounding, bool):
            raise ValueError(
                "Expected `stochastic_rounding` to be True or False. "
                f"Received: stochastic_rounding={stochastic_rounding!r}."
            )
        if stochastic_rounding:
            _check_not_built(inner_optimizer)
        super().__init__(inner_optimizer, initial_scale=float(initial_scale), name=name)
        self.stochastic_rounding = stochastic_rounding
        self._rounding_seed: keras.Variable | None = None
        if stochastic_rounding:
            update_in_float32(inner_optimizer, self._rounded)
        self.rule = rule
        self.sample_every = sample_every
        # S, if a function that uses it was traced before the optimizer had variables.
        object.__setattr__(self, "_first_scale", None)
        self._any_loss_scaled = False

    @property
    def loss_scale(self) -> float:
        """The loss scale S, a float. Read it between steps."""
        return float(self.dynamic_scale.numpy()) if self.built else self.initial_scale

    @property
    def scaled_layers(self) -> list[LayerScaling]:
        """The scaled layers of the model. Empty before the optimizer is built."""
        return list(self._keeper.layers) if self.built else []

    @property
    def steps(self) -> int:
        """Number of steps so far, including skipped ones. Read it between steps."""
        return int(self._steps.numpy()) if self.built else 0

    @property
    def skipped_steps(self) -> int:
        """Number of skipped steps so far. Read it between steps."""
        return int(self._skipped_steps.numpy()) if self.built else 0

    @property
    def last_step_skipped(self) -> bool:
        """Whether the last step was skipped. Read it between steps."""
        return self.skipped_in_a_row > 0

    @property
    def skipped_in_a_row(self) -> int:
        """Number of steps skipped in a row up to now. Read it between steps."""
        return int(self._keeper.skipped_in_a_row.numpy()) if self.built else 0

    def build(self, var_list: list[keras.Variable]) -> None:
        layers = [v.loss_scaled for v in var_list if is_scale(v)]
        if not self.stochastic_rounding:  # stochastic rounding is useful without scaled layers, too
            _warn_if_useless(layers)
        if layers:
            _check_strategy()
        float_formats = {layer.float_format for layer in layers}
        operand_formats = {layer.operand_format for layer in layers} - {None}
        for float_format in float_formats | operand_formats:
            self.rule.check(float_format)
        weights = [v for v in var_list if not is_of_scaling(v)]
        if self.stochastic_rounding:
            _check_can_be_rounded(weights)
        super().build(weights)
        self.dynamic_growth_steps = _KERAS_GROWTH_STEPS
        self._steps = self._add_state("steps", np.int32(0))
        self._skipped_steps = self._add_state("skipped_steps", np.int32(0))
        if self.stochastic_rounding:
            with functions.outside_of_traces():
                seed = ops.convert_to_numpy(keras.random.SeedGenerator().state).astype("uint32")
            # A variable of the inner optimizer, because during its step Keras only tracks those.
            self._rounding_seed = _added(self.inner_optimizer, "rounding_seed", seed)
        keeper = ScaleKeeper(
            layers,
            self.dynamic_scale,
            self.rule,
            self.initial_scale,
            self.sample_every,
            self._add_state,
        )
        # Bypasses Keras's attribute tracking, which would count the list as variables of the
        # optimizer.
        object.__setattr__(self, "_model_variables", list(var_list))
        object.__setattr__(self, "_keeper", keeper)
        self.link_layers()

    def build_once(self, var_list: list[keras.Variable]) -> None:
        """Calls `build` unless the optimizer is built, in the name scope of the first `apply`."""
        if not self.built:
            with keras.name_scope(self.name, caller=self):
                self.build(var_list)

    def _add_state(self, name: str, value: Tensor) -> keras.Variable:
        return _added(self, name, value)

    def link_layers(self) -> None:
        """Makes the layers take their `snapshot` from this optimizer."""
        for layer in self._keeper.layers:
            layer.link_optimizer(self)

    def layer_snapshots(self, layers: Sequence[LayerScaling]) -> list[LayerSnapshot]:
        """The `LayerSnapshot` of each layer; an empty one if the optimizer does not know it."""
        known = self._keeper.known_of_layers() if self.built else {}

        def snapshot(layer: LayerScaling) -> LayerSnapshot:
            if id(layer) not in known or not has_statistics(layer.loss_scale.numpy()):
                return LayerSnapshot.without_statistics(layer.log2_scale, layer.float_format)
            state = LayerStates(layer.log2_scale, **known[id(layer)])
            return LayerSnapshot.of(state, layer.float_format, layer.operand_format)

        return [snapshot(layer) for layer in layers]

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Multiplies a loss by S. Compute gradients of the result.

        Args:
            loss: Scalar tensor.

        Returns:
            A scalar tensor.

        Raises:
            ValueError: In a function that JAX compiles, if S would become a constant.
        """
        self._any_loss_scaled = True
        scale = self.dynamic_scale if self.built else self._scale_before_built()
        if functions.would_be_constant(getattr(scale, "value", scale)):
            raise ValueError(
                "Expected the loss scale to be among what a compiled function of JAX is given. "
                "Received: `scale_loss` in such a function, with an optimizer that is "
                + ("not part of it" if self.built else "not built yet")
                + ": every later step would use the loss scale of the first. Build the optimizer, "
                "pass `[v.value for v in optimizer.variables]` to the function, and scale the loss "
                "inside `with keras.StatelessScope(zip(optimizer.variables, values)):`."
            )
        return ops.multiply(loss, scale)

    def _scale_before_built(self) -> float | keras.Variable:
        if self._first_scale is None and functions.is_traced_alone():
            with functions.outside_of_traces(), keras.name_scope(self.name, caller=self):
                # Bypasses attribute tracking: the variable takes the place of `dynamic_scale`
                # later.
                first = keras.Variable(
                    self.initial_scale, trainable=False, aggregation="none", name="dynamic_scale"
                )
            object.__setattr__(self, "_first_scale", first)
        return self.initial_scale if self._first_scale is None else self._first_scale

    def add_variable(self, shape: Sequence[int], *args: Any, **kwargs: Any) -> keras.Variable:
        if kwargs.get("name") == "dynamic_scale" and self._first_scale is not None:
            keras_internals.track_variable(self, self._first_scale)
            return self._first_scale
        return super().add_variable(shape, *args, **kwargs)

    def apply(
        self,
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[keras.Variable] | None = None,
    ) -> None:
        """Updates weights and scales from the gradients of the scaled loss.

        Args:
            grads: List of gradients, one per variable.
            trainable_variables: List of all `model.trainable_variables`, which include the
                variables of the scales. Defaults to the variables that the optimizer was built
                with.

        Raises:
            ValueError: If the optimizer is not built and no variables are given.
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
        self.build_once(trainable_variables)
        self._step(grads, trainable_variables, without_effects=functions.only_values())

    def stateless_apply(
        self,
        optimizer_variables: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        trainable_variables: Sequence[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`apply` without side effects, see `keras.optimizers.Optimizer`."""
        if not self.built:
            return super().stateless_apply(optimizer_variables, grads, trainable_variables)
        own = list(zip(self.variables, optimizer_variables, strict=True))
        model = list(zip(self._model_variables, trainable_variables, strict=True))
        with keras.StatelessScope([*model, *own]) as scope:
            self._step(grads, self._model_variables, without_effects=True)
        return (
            [scope.get_current_value(v) for v in self._model_variables],
            [scope.get_current_value(v) for v in self.variables],
        )

    def _step(
        self, grads: Sequence[Tensor], variables: list[keras.Variable], without_effects: bool
    ) -> None:
        """Takes one step.

        Args:
            grads: List of gradients, one per variable.
            variables: List of the variables.
            without_effects: Whether the branches of a conditional must return new values instead of
                assigning them.
        """
        self._warn_if_nothing_scaled()
        signals = Signals.of(grads, variables)
        self._check_known(signals.reporters)
        pairs = [*signals.weights, *signals.overwrites]
        gradients, variables = [gradient for gradient, _ in pairs], [v for _, v in pairs]
        if not signals.reports:
            self._step_without_layers(gradients, variables, without_effects)
            return
        finite, new_states = self._keeper.after(signals)
        if without_effects:
            self._take_step(finite, gradients, variables)
        else:
            devices.run_if(finite, self._apply_inner, gradients, variables)
            self._count_skipped(finite)
        self._steps.assign_add(1)
        self._keeper.keep(*new_states)

    def _take_step(
        self, finite: Tensor, gradients: list[Tensor], variables: list[keras.Variable]
    ) -> None:
        """Applies gradients if they are finite, and otherwise counts a skipped step."""
        touched = [*variables, *self.inner_optimizer.variables, self.dynamic_scale]
        skipped = self._skipped_steps
        # Both branches compute something. If one is empty, XLA does not turn the conditional into
        # selects on a GPU: the host then waits for the condition, and every weight is copied.
        new_values = ops.cond(
            finite,
            lambda: [
                *_values_after(lambda: self._apply_inner(gradients, variables), touched),
                skipped.value,
            ],
            lambda: [*_values(touched), skipped.value + 1],
        )
        _assign([*touched, skipped], new_values)

    def _step_without_layers(
        self, gradients: list[Tensor], variables: list[keras.Variable], without_effects: bool
    ) -> None:
        """Takes the step of Keras's `LossScaleOptimizer`."""
        finite = self.check_finite(gradients)
        if without_effects:
            new_values = super().stateless_apply(
                _values(self.variables), gradients, _values(variables)
            )
            _assign([*variables, *self.variables], itertools.chain(*new_values))
        else:
            super().apply(gradients, variables)
        limits = 2.0**-MAX_LOG2_SCALE, 2.0**MAX_LOG2_SCALE
        self.dynamic_scale.assign(ops.clip(self.dynamic_scale.value, *limits))
        self._count_skipped(finite)
        self._steps.assign_add(1)
        in_a_row = self._keeper.skipped_in_a_row
        in_a_row.assign(ops.where(finite, 0 * in_a_row.value, in_a_row.value + 1))

    def _check_known(self, layers: list[Any]) -> None:
        known = set(map(id, self._keeper.layers))
        unknown = {layer.name for layer in layers if id(layer) not in known}
        if unknown:
            raise ValueError(
                "Expected gradients of the variables that the optimizer was built with. "
                f"Received: those of other LossScaled layers too: {sorted(unknown)}. "
                "Compile the model, or make the optimizer, anew."
            )

    def _warn_if_nothing_scaled(self) -> None:
        if not self._any_loss_scaled:
            self._any_loss_scaled = True  # warn only once
            warnings.warn(
                "AdaptiveLossScaleOptimizer received gradients, but `scale_loss` was never called. "
                "It divides gradients by the loss scale, so weights hardly move. Compute gradients "
                "of `optimizer.scale_loss(loss)`.",
                stacklevel=4,
            )

    def _apply_inner(self, gradients: list[Tensor], variables: list[keras.Variable]) -> None:
        scale = self.dynamic_scale
        unscaled = [
            gradient
            if gradient is None or is_overwritten(variable)
            else ops.divide(gradient, scale)
            for gradient, variable in zip(gradients, variables, strict=True)
        ]
        self.inner_optimizer.apply(unscaled, variables)
        autodiff.leave_gradients_to_graph()

    def _rounded(self, x: Tensor, dtype: str, place: int, step: Tensor) -> Tensor:
        """Rounds an updated weight, with random bits that depend on the step and the weight."""
        assert self._rounding_seed is not None
        first, second = ops.unstack(ops.convert_to_tensor(self._rounding_seed))
        seed = ops.stack([first + ops.cast(step, "uint32"), second + ops.cast(place, "uint32")])
        noise = arrays.random_bits(seed, ops.shape(x), NOISE_BITS_OF_16)
        return rounded_to_16_bits(x, dtype, noise)

    def _count_skipped(self, finite: Tensor) -> None:
        self._skipped_steps.assign_add(ops.cast(ops.logical_not(finite), "int32"))

    def finalize_variable_values(self, var_list: list[keras.Variable]) -> None:
        super().finalize_variable_values([v for v in var_list if not is_of_scaling(v)])

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables(self._with_added(store))
        if not self.built:
            return  # Keras warns in this case
        scale = float(self.dynamic_scale.numpy())
        damaged = [v.path for v in self._keeper.damaged()]
        if not is_scale_value(scale) or damaged:
            raise ValueError(
                "Expected a power of two as the loss scale, and finite state of all "
                f"layers. Received: a loss scale of {scale}"
                + (f" and others in {', '.join(damaged)}" if damaged else "")
                + ". The file is damaged: take another copy of it."
            )

    def _with_added(self, store: Any) -> Any:
        """`store`, extended by the variables that version 0.2 did not save."""
        if not self.built:
            return store
        added = [id(v) for v in self._keeper.new_in_version_0_3]
        if len(store.keys()) != len(self.variables) - len(added):
            return store
        saved = (store[str(i)] for i in range(len(store.keys())))
        values = [v.numpy() if id(v) in added else next(saved) for v in self.variables]
        return {str(i): value for i, value in enumerate(values)}

    def get_config(self) -> dict[str, Any]:
        return with_version(
            {
                "name": self.name,
                "inner_optimizer": keras.saving.serialize_keras_object(self.inner_optimizer),
                "initial_scale": self.initial_scale,
                "rule": keras.saving.serialize_keras_object(self.rule),
                "sample_every": self.sample_every,
                "stochastic_rounding": self.stochastic_rounding,
            }
        )

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "AdaptiveLossScaleOptimizer":
        config = checked_config(
            config,
            "AdaptiveLossScaleOptimizer",
            ["inner_optimizer", "rule"],
            ["name", "initial_scale", "sample_every", "stochastic_rounding"],
        )
        for name in ("inner_optimizer", "rule"):
            config[name] = keras.saving.deserialize_keras_object(
                config[name], custom_objects=custom_objects
            )
        return cls(**config)


def _added(
    optimizer: keras.optimizers.Optimizer, name: str, value: np.ndarray | np.generic
) -> keras.Variable:
    """Adds a variable to an optimizer."""
    return optimizer.add_variable(
        shape=value.shape,
        dtype=value.dtype.name,
        initializer=lambda shape, dtype: ops.convert_to_tensor(value, dtype),
        aggregation="none",
        name=name,
    )


def _values(variables: Any) -> Any:
    return [variable.value for variable in variables]


def _assign(variables: Any, values: Any) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _values_after(function: Callable[..., Any], variables: Any) -> Any:
    """The values that `variables`, all that `function` assigns, would have after it."""
    with keras.StatelessScope([(variable, variable.value) for variable in variables]) as scope:
        function()
    return [scope.get_current_value(variable) for variable in variables]


def _checked_inner_optimizer(inner_optimizer: Any) -> Any:
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


def _check_not_built(inner_optimizer: Any) -> None:
    if getattr(inner_optimizer, "built", False):
        raise ValueError(
            "Expected an `inner_optimizer` that is not built yet, so that all that it keeps is in "
            "float32. Received: stochastic_rounding=True with a "
            f"{type(inner_optimizer).__name__} that is built. Make a new one."
        )


def _check_can_be_rounded(weights: list[keras.Variable]) -> None:
    of_8_bits = [v.path for v in weights if str(v.dtype).startswith("float8")]
    if of_8_bits:
        raise ValueError(
            "Expected weights of 16 or 32 bits with stochastic_rounding=True. Received: "
            f"{', '.join(of_8_bits)}, of 8 bits, which no single step would fit. Keep weights in "
            "float16 and compute in float8: `wrap_model(model, float8=Float8())` of a model of "
            'policy "float16".'
        )
    if not any(map(is_of_16_bits, weights)):
        warnings.warn(
            "stochastic_rounding=True does nothing for this model: none of its weights has 16 "
            'bits. Set the policy "float16" or "bfloat16" before you build it; under '
            '"mixed_float16" weights are float32.',
            stacklevel=4,
        )


def _check_initial_scale(scale: Any) -> None:
    if not is_scale_value(scale):
        raise ValueError(
            f"Expected `initial_scale` to be a power of two from 2**-{MAX_LOG2_SCALE} to "
            f"2**{MAX_LOG2_SCALE}. Received: initial_scale={scale!r}. The default is 2.0**15."
        )


def _check_strategy() -> None:
    unsupported = devices.unsupported_strategy()
    if unsupported is not None:
        raise ValueError(
            "Expected `tf.distribute.MirroredStrategy`, or none, for a model with LossScaled "
            f"layers. Received: {unsupported}. Train on several devices with "
            "MirroredStrategy, on several machines with `keras.distribution` on JAX."
        )


def _warn_if_useless(layers: list[Any]) -> None:
    if not layers:
        warnings.warn(
            "AdaptiveLossScaleOptimizer was given a model without trainable LossScaled "
            "layers: it works like keras.optimizers.LossScaleOptimizer. Wrap the model "
            "with `wrap_model`, or its layers with `LossScaled`.",
            stacklevel=3,
        )
    elif not any(layer.is_narrow or layer.float8 for layer in layers):
        warnings.warn(
            "Loss scales do nothing for this model: none of its LossScaled layers "
            "computes in a format with less range than float32. Set the dtype policy before "
            f'you build it: keras.config.set_dtype_policy("mixed_{COUNTING_FORMAT.name}").',
            stacklevel=3,
        )
