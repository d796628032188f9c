"""`ScaleKeeper`: the variables that hold the state of all scales, and their update."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from tf_adaptive_ls.backend import devices
from tf_adaptive_ls.backend.arrays import power_of_two
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import report, spectrum
from tf_adaptive_ls.numerics.evidence import Evidence, evidence_of
from tf_adaptive_ls.numerics.layer_facts import LayerFacts
from tf_adaptive_ls.numerics.scale_rules import ScaleRule
from tf_adaptive_ls.numerics.scale_state import (
    LayerStates,
    LossState,
    initial_layer_states,
    initial_loss_state,
    log2_scale_of,
    packed_scales,
)
from tf_adaptive_ls.numerics.scale_update import is_sampled, update
from tf_adaptive_ls.training.facts_of_layers import facts_of
from tf_adaptive_ls.training.layer_scaling import LayerScaling, is_of_scaling


class Signals(NamedTuple):
    """The gradients that an optimizer receives, sorted by what they are.

    Attributes:
        weights: List of pairs of a gradient, or `None`, and its weight.
        overwrites: List of pairs of a new value and the variable that it overwrites, such as the
            factors of Keras's float8 layers. These "gradients" bear no loss scale.
        reports: Dict of the reports of layers. The keys are pairs of the `id` of a layer and
            whether the report is `loss_scale_report`; the other one is `float8_report`.
        reporters: List of the layers that have reported.
    """

    weights: list[tuple[Tensor | None, keras.Variable]]
    overwrites: list[tuple[Tensor | None, keras.Variable]]
    reports: dict[tuple[int, bool], Tensor]
    reporters: list[LayerScaling]

    @classmethod
    def of(cls, grads: Sequence[Tensor], variables: list[keras.Variable]) -> "Signals":
        """Sorts `grads`, one per variable."""
        weights: list[tuple[Tensor | None, keras.Variable]] = []
        overwrites: list[tuple[Tensor | None, keras.Variable]] = []
        reports: dict[tuple[int, bool], Tensor] = {}
        reporters: dict[int, LayerScaling] = {}
        for gradient, variable in zip(grads, variables, strict=True):
            if not is_of_scaling(variable):
                pairs = overwrites if is_overwritten(variable) else weights
                pairs.append((gradient, variable))
            elif gradient is not None and not is_scale(variable):
                layer = variable.loss_scaled
                reporters[id(layer)] = layer
                reports[id(layer), variable is layer.loss_scale_report] = gradient
        return cls(weights, overwrites, reports, list(reporters.values()))

    def stacked(self, layers: list[Any], of_all: bool, size: int) -> Tensor:
        """Reports of `layers`, `[layers, size]`: `loss_scale_report` or `float8_report`."""
        silent = np.zeros(size, "float32")  # the report of a layer that did not run
        reports = [self.reports.get((id(layer), of_all), silent) for layer in layers]
        return devices.computed_once(ops.stack(reports))


class ScaleKeeper:
    """The state of all scales, in variables of the optimizer, and its update.

    Args:
        layers: List of `LayerScaling`.
        loss_scale: The variable of S.
        rule: The `ScaleRule`.
        initial_scale: The value that S returns to when all gradients at scale S were zero.
        sample_every: Number of steps between two samples.
        add_variable: Function `(name, value)` that makes a variable of the optimizer.
    """

    def __init__(
        self,
        layers: list[Any],
        loss_scale: keras.Variable,
        rule: ScaleRule,
        initial_scale: float,
        sample_every: int,
        add_variable: Callable[..., Any],
    ) -> None:
        self.layers = layers
        self._rule, self._sample_every = rule, sample_every
        self._restart = math.log2(initial_scale)
        self._loss_scale = loss_scale
        float_formats = {layer.float_format for layer in layers}
        any_rounded = any(layer.operand_format for layer in layers)
        of_layers = initial_layer_states(len(layers), rule.memory_size, any_rounded)
        of_loss = initial_loss_state(0, len(float_formats), len(layers), rule.memory_size)
        # In the order in which files list them. The scales are in other variables: S, and one per
        # layer.
        self._of_loss = {
            "skipped_in_a_row": add_variable("skipped_in_a_row", of_loss.skipped_in_a_row),
            "steps_to_sample": add_variable("steps_to_sample", of_loss.steps_to_sample),
        }
        self._of_layers = {
            name: add_variable(name, value)
            for name, value in of_layers._asdict().items()
            if name != "log2_scales" and value is not None
        }
        self._of_loss |= {
            "memory": add_variable("loss_memory", of_loss.memory),
            "ceiling": add_variable("loss_ceiling", of_loss.ceiling),
            "blamed": add_variable("blamed", of_loss.blamed),
        }

    @property
    def skipped_in_a_row(self) -> keras.Variable:
        """The variable that counts how many steps in a row were skipped."""
        return self._of_loss["skipped_in_a_row"]

    @property
    def new_in_version_0_3(self) -> list[keras.Variable]:
        """The variables that files of earlier versions lack."""
        return [self._of_loss["ceiling"], self._of_loss["blamed"]]

    def damaged(self) -> list[keras.Variable]:
        """The variables that are not finite."""
        variables = [*self._of_layers.values(), *self._of_loss.values()]
        return [v for v in variables if not np.all(np.isfinite(v.numpy()))]

    def known_of_layers(self) -> dict[int, dict[str, np.ndarray]]:
        """By `id` of layer, the fields of its `LayerStates` but the scale, NumPy arrays."""
        known = {name: np.array(v.numpy()) for name, v in self._of_layers.items()}
        return {
            id(layer): {name: values[place] for name, values in known.items()}
            for place, layer in enumerate(self.layers)
        }

    def after(self, signals: Signals) -> tuple[Tensor, tuple[LayerStates, LossState]]:
        """Computes the new state from the gradients of a step.

        Args:
            signals: The `Signals` of this replica.

        Returns:
            Boolean scalar, whether the gradients of weights are finite on all replicas; and a pair
            of the new `LayerStates` and `LossState`, for `keep`.
        """
        layer_states, loss_state = self._states()
        weights = [(gradient, v) for gradient, v in signals.weights if gradient is not None]
        facts = facts_of(self.layers, [v for _, v in weights])
        evidence = self._evidence(signals, weights, facts, layer_states, loss_state)
        states = update(
            layer_states,
            loss_state,
            evidence,
            facts,
            rule=self._rule,
            restart=self._restart,
            sample_every=self._sample_every,
        )
        return evidence.finite, states

    def _states(self) -> tuple[LayerStates, LossState]:
        scales = [layer.loss_scale.value for layer in self.layers]
        # otherwise, each scale is copied before it is written
        scales = devices.computed_once(ops.stack(scales))
        return (
            LayerStates(log2_scale_of(scales), **_values(self._of_layers)),
            LossState(
                ops.round(ops.log2(ops.convert_to_tensor(self._loss_scale))),
                **_values(self._of_loss),
            ),
        )

    def _evidence(
        self,
        signals: Signals,
        weights: list[tuple[Tensor, keras.Variable]],
        facts: LayerFacts,
        layer_states: LayerStates,
        loss_state: LossState,
    ) -> Evidence:
        """The `Evidence` of a step, summed over all replicas."""
        reports = signals.stacked(self.layers, True, report.SIZE)
        of_rounded = None
        if facts.any_rounded:
            of_rounded = signals.stacked(self.layers, False, report.SIZE_OF_ROUNDED)
        evidence = evidence_of(
            report.Report.unpacked(reports, of_rounded),
            [gradient for gradient, _ in weights],
            facts,
            layer_states.log2_scales,
            is_sampled(loss_state),
        )
        others = [gradient for gradient, _ in signals.overwrites if gradient is not None]
        if others:
            broken = ops.any(ops.isinf(spectrum.peaks(others)))
            broken = ops.maximum(evidence.weights_broken, ops.cast(broken, "float32"))
            evidence = evidence._replace(weights_broken=broken)
        total, num_replicas = devices.sum_over_replicas(evidence.packed())
        return Evidence.unpacked(total, len(self.layers), num_replicas)

    def keep(self, layer_states: LayerStates, loss_state: LossState) -> None:
        """Writes a `LayerStates` and a `LossState` to the variables."""
        scales = packed_scales(layer_states.log2_scales, len(self.layers))
        for layer, scale in zip(self.layers, scales, strict=True):
            layer.loss_scale.assign(scale)
        self._loss_scale.assign(power_of_two(loss_state.log2_scale))
        for state, variables in ((layer_states, self._of_layers), (loss_state, self._of_loss)):
            for name, variable in variables.items():
                variable.assign(ops.cast(getattr(state, name), variable.dtype))


def _values(variables: dict[str, keras.Variable]) -> dict[str, Tensor]:
    return {name: variable.value for name, variable in variables.items()}


def is_scale(variable: keras.Variable) -> bool:
    """Whether `variable` holds the scale of a layer."""
    return is_of_scaling(variable) and variable is variable.loss_scaled.loss_scale


def is_overwritten(variable: keras.Variable) -> bool:
    """Whether the "gradient" of a variable is its new value."""
    # a `tf.Variable` has no such attribute
    return getattr(variable, "overwrite_with_gradient", False)
