"""`LayerScaling`: the scale variables of one layer, and calls at its scale."""

import dataclasses
import itertools
import numbers
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.backend import autodiff, keras_internals
from tf_adaptive_ls.backend.arguments import MAX_LOG2_SCALE
from tf_adaptive_ls.backend.keras_internals import (
    is_plain_keras_layer,
    may_be_trained,
    parts_of,
)
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics import packing, report, scale_state
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat, narrowest
from tf_adaptive_ls.numerics.spectrum import Spectrum
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.border import Border
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.float8.call import Float8Call, next_seed
from tf_adaptive_ls.training.float8.products import in_float8, products_in
from tf_adaptive_ls.training.float8.settings import Float8, check_is_float8
from tf_adaptive_ls.training.functional_call import (
    Surroundings,
    check_gradients,
    functional_call,
    is_second_run,
)
from tf_adaptive_ls.training.given_variables import ReadElsewhere, scaled_weights_of
from tf_adaptive_ls.training.neutral_scales import are_scales_neutral
from tf_adaptive_ls.training.readings import LayerSnapshot

_clock = itertools.count()


@dataclasses.dataclass(frozen=True)
class Call:
    """The last call of a scaled layer, eager or traced.

    Attributes:
        at: Int that orders calls. Gradients reach the later one of two calls first.
        passes_from: If the layer passes gradients on at the scale at which they arrive, the layers
            that they come from; see `scale_plan`.
        passes_with: The layers that pass gradients on at the same scale, including this layer.
    """

    at: int = -1
    passes_from: tuple[Any, ...] = ()
    passes_with: tuple[Any, ...] = ()


class LayerScaling(keras.layers.Layer):
    """The loss scale of one layer. `LossScaled` is one around the layer, `Companion` one beside it.

    Let S be the scale of the surroundings: the loss scale of the optimizer, or the scale of an
    enclosing scaled layer. The layer works at S * 2**r. All tensors that cross the `Border` of the
    layer are scaled there, and nothing else changes.

    `AdaptiveLossScaleOptimizer` chooses r from the reports of the backward pass. Any other
    optimizer sets r to 0, and no statistics are known.
    """

    # The layer that is scaled.
    layer: keras.layers.Layer

    @property
    def casts_inputs(self) -> bool:
        """Whether the layer casts its inputs to its compute dtype."""
        raise NotImplementedError

    float8: Float8 | None = None
    # The format in which inputs are saved for the backward pass. `None` to save what Keras saves.
    saved_activations: str | None = None
    # The error with which the layer's file was refused.
    _refused: ValueError | None = None

    def _start_scaling(self, float8: Float8 | None) -> None:
        """Makes the variables and the other state of the scaling."""
        self.loss_scale = self._add_weight_of_scaling("loss_scale", (2,), scale_state.initial_scale)
        self.loss_scale_report = self._add_weight_of_scaling(
            "loss_scale_report", (report.SIZE,), "zeros"
        )
        self.float8 = None if float8 is None else dataclasses.replace(float8, layer_filter=None)
        self.float8_report = self.float8_seed = None
        if self.operand_format is not None:
            self.float8_report = self._add_weight_of_scaling(
                "float8_report", (report.SIZE_OF_ROUNDED,), "zeros"
            )
        if float8 is not None and float8.rounding == "stochastic":
            self.float8_seed = self._add_seed()
        # Set if the layer cannot work at its own scale: how it reads its weights, see
        # `ReadElsewhere`.
        self._read_elsewhere: str | None = None
        self._gradients_checked = False
        # Whether the layer was ever called in a way that leaves the gradients of its weights
        # unscaled.
        self.called_at_s = False
        # The optimizer that knows the statistics of the layer.
        self._optimizer: weakref.ref[Any] | None = None
        self.last_call = Call()

    def _add_weight_of_scaling(
        self, name: str, shape: Any, initializer: Callable[..., Any] | str
    ) -> keras.Variable:
        # Trainable, because on JAX a stateless optimizer only receives trainable variables.
        weight = self.add_weight(
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
            overwrite_with_gradient=True,
            name=name,
        )
        weight.loss_scaled = self
        # Also for a frozen layer: it may be unfrozen later without the wrapper being told.
        weight.trainable = self._trainable
        return weight

    def _add_seed(self) -> keras.Variable:
        # Keras does not save a `SeedGenerator`, and a resumed run must draw the same numbers.
        first = keras.ops.convert_to_numpy(keras.random.SeedGenerator().state)
        return self.add_weight(
            shape=(2,),
            initializer=lambda shape, dtype: keras.ops.convert_to_tensor(first, dtype),
            dtype="uint32",
            trainable=False,
            name="float8_seed",
        )

    @property
    def log2_scale(self) -> int:
        """The int r: the layer works at 2**r times the scale of its surroundings.

        Assignable between steps, from -60 to 60. It changes no gradient but for
        rounding in float16.
        """
        return int(scale_state.log2_scale_of(self.loss_scale.numpy()))

    @log2_scale.setter
    def log2_scale(self, value: int) -> None:
        if not isinstance(value, numbers.Integral) or abs(value) > MAX_LOG2_SCALE:
            raise ValueError(
                "Expected `log2_scale` to be a whole number from "
                f"{-MAX_LOG2_SCALE} to {MAX_LOG2_SCALE}. Received: "
                f"log2_scale={value!r} for layer '{self.name}'. It is an exponent: "
                "3 stands for a scale of 8."
            )
        self.loss_scale.assign(scale_state.packed_scale(np.float32(value)))

    @property
    def is_narrow(self) -> bool:
        """Whether any part of the layer computes in a format that its scale matters to."""
        return self._computes_in().is_narrow

    @property
    def float_format(self) -> FloatFormat:
        """The `FloatFormat` that its scale keeps gradients inside.

        It is the narrowest that any part of the layer computes in. For a layer without a
        narrow one, whose input may still have one, it is float16.
        """
        return self._computes_in() if self.is_narrow else COUNTING_FORMAT

    def _computes_in(self) -> FloatFormat:
        return narrowest(part.compute_dtype for part in keras_internals.parts_of(self.layer))

    @property
    def operand_format(self) -> FloatFormat | None:
        """The `FloatFormat` of 8 bits that gradients are rounded to at its scale, or `None`."""
        return None if self.float8 is None else self.float8.scaled_format

    @property
    def spectrum(self) -> Spectrum:
        """`Spectrum` of the gradients last sampled, at the scale of that step."""
        return self.snapshot.spectrum

    @property
    def overflows(self) -> int:
        """On how many steps the layer made finite gradients non-finite: an int.

        Counted by the `AdaptiveLossScaleOptimizer` that trains it, from its first step.
        """
        return self.snapshot.overflows

    @property
    def snapshot(self) -> LayerSnapshot:
        """All that is known of its gradients, a `LayerSnapshot`, between steps."""
        (snapshot,) = snapshots_of([self])
        return snapshot

    def linked_optimizer(self) -> Any:
        """The optimizer that knows the statistics of the layer, or `None`."""
        # Not a property, because Keras would try to save its value.
        return None if self._optimizer is None else self._optimizer()

    def link_optimizer(self, optimizer: Any) -> None:
        """Takes `snapshot` from `optimizer` from now on."""
        self._optimizer = weakref.ref(optimizer)

    def _scaled_call(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Calls `run(*args, **kwargs)`, a call of the layer, at the layer's scale."""
        if are_scales_neutral():
            self.called_at_s = True
            with scale_plan.running(None):
                return run(*args, **kwargs)
        if not is_second_run():
            scale_plan.note_call(self)
        if self._read_elsewhere is None:
            try:
                return self._call_at_own_scale(run, args, kwargs)
            except ReadElsewhere as reads:
                self._read_elsewhere, self.called_at_s = reads.how, True
                warnings.warn(
                    f"LossScaled layer '{self.name}' works at the scale of its surroundings: it "
                    f"{reads.how}, and could not be given them at a scale of its own.",
                    stacklevel=2,
                )
        border = Border(self, at_own_scale=False, reports=False)
        args, kwargs, _ = border.tap_inputs(args, kwargs, [])
        around = self._around(self._next_float8_call(reports=False))
        with scale_plan.running(None), around.context(around.receivers):
            outputs = run(*args, **kwargs)
        return border.tap_outputs(outputs)

    def _call_at_own_scale(
        self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reports = self._is_to_report(args, kwargs)
        border = Border(self, reports=reports)
        float8_call = self._next_float8_call(reports)
        if not is_second_run():
            self.last_call = Call(next(_clock), border.passes_from, border.passes_with)
        weights = scaled_weights_of(self.layer)
        args, kwargs, weights = border.tap_inputs(args, kwargs, weights)
        self._check_gradients(run, weights, args, kwargs)
        outputs, losses = functional_call(
            self.layer,
            run,
            weights,
            args,
            kwargs,
            self._around(float8_call),
            saves_8_bits=self.saved_activations is not None,
        )
        for loss in losses:
            self.add_loss(border.tap_loss(loss))
        return border.tap_outputs(outputs)

    def _is_to_report(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a report is useful: gradients reach a weight, or something before the layer."""
        if not self.loss_scale.trainable:
            return False
        if scaled_weights_of(self.layer) or not may_be_trained(self.layer):
            return True
        if not scale_plan.may_be_passed(self):
            return False
        receivers = self.loss_scale.value, self.loss_scale_report.value
        return autodiff.is_differentiated(CallTensors((args, kwargs)).tensors, receivers)

    def _check_gradients(
        self,
        run: Callable[..., Any],
        weights: list[tuple[keras.Variable, Tensor]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Runs `check_gradients` on the first call that is differentiated."""
        values = [value for _, value in weights]
        if (
            not self._gradients_checked
            and autodiff.gradients_end_at_variables()
            and autodiff.is_differentiated(values)
            and not all(map(is_plain_keras_layer, parts_of(self.layer)))
        ):
            self._gradients_checked = True
            check_gradients(self.layer, run, weights, args, kwargs)

    def _next_float8_call(self, reports: bool) -> Float8Call | None:
        """The `Float8Call` of a call. `None` if the layer does not use float8."""
        if self.float8 is None:
            return None
        # Checked here, because the layer may have been built or quantized since it was wrapped.
        check_float8(self.float8, self.layer)
        receiver = None
        if self.float8_report is not None:
            receiver = self.float8_report.value
            receiver = receiver if reports else keras.ops.zeros_like(receiver)
        seed = next_seed(self.float8_seed)
        return Float8Call(self.float8, len(own_products(self.layer)), receiver, seed)

    def _around(self, float8_call: Float8Call | None) -> Surroundings:
        """The `Surroundings` in which the layer runs."""
        if float8_call is None:
            return Surroundings()

        def context(receivers: tuple[Tensor, ...]) -> Any:
            return in_float8(own_products(self.layer), float8_call.with_receivers(receivers))

        return Surroundings(context, float8_call.receivers)

    # From here on, the wrapper acts as its layer for Keras.

    def quantize(self, *args: Any, **kwargs: Any) -> Any:
        self.check_may_be_quantized()
        return self.layer.quantize(*args, **kwargs)

    def check_may_be_quantized(self) -> None:
        """Raises a `ValueError` if the layer computes in float8 already."""
        if self.float8 is not None:
            raise ValueError(
                f"Expected layer '{self.name}' to be quantized once. Received: `quantize` for a "
                "LossScaled layer that computes in float8 already. `strip_model` it before, or "
                "leave `float8` out."
            )

    def load_own_variables(self, store: Any) -> None:
        if self._refused is not None and not store.keys():
            # Keras tries a second way to load, and shows the error of the last one
            raise self._refused
        super().load_own_variables(self._without_reports(store))
        scale = self.loss_scale.numpy()
        self._refused = None
        if not np.isfinite(scale).all():
            self.loss_scale.assign(scale_state.initial_scale())
            self._refused = ValueError(
                f"Expected finite numbers as the scale of LossScaled layer '{self.name}'. "
                f"Received: {scale.tolist()}. The saved state is not finite: load an earlier "
                "checkpoint, and check its weights, too."
            )
            raise self._refused
        self.loss_scale.assign(scale_state.restored(scale))

    def _without_reports(self, store: Any) -> dict[str, np.ndarray]:
        """`store`, with the current reports in place of the saved ones, which nothing reads."""
        reports = {"1": self.loss_scale_report, "2": self.float8_report}
        own = {key: v.numpy() for key, v in reports.items() if v is not None and key in store}
        return {key: store[key] for key in list(store.keys())} | own


def snapshots_of(layers: Sequence[LayerScaling]) -> list[LayerSnapshot]:
    """The `LayerSnapshot` of each layer. The state of each optimizer is read once."""
    of_optimizers: dict[int, list[LayerScaling]] = {}
    for layer in layers:
        of_optimizers.setdefault(id(layer.linked_optimizer()), []).append(layer)
    found: dict[int, LayerSnapshot] = {}
    for group in of_optimizers.values():
        optimizer = group[0].linked_optimizer()
        if optimizer is None:
            snapshots = [
                LayerSnapshot.without_statistics(each.log2_scale, each.float_format)
                for each in group
            ]
        else:
            snapshots = optimizer.layer_snapshots(group)
        found |= zip(map(id, group), snapshots, strict=True)
    return [found[id(layer)] for layer in layers]


def layer_of(variable: keras.Variable) -> LayerScaling | None:
    """The `LayerScaling` whose scale or report is in `variable`, or `None`."""
    return getattr(variable, "loss_scaled", None)


def is_of_scaling(variable: keras.Variable) -> bool:
    """Whether `variable` belongs to a `LayerScaling`, and is not a weight of the model."""
    return layer_of(variable) is not None


def own_products(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers with a matmul inside of `layer`, except those inside of other scaled layers."""
    inside = {
        id(part)
        for scaled in keras_internals.parts_of(layer)
        if isinstance(scaled, LayerScaling) and scaled.layer is not layer
        for part in keras_internals.parts_of(scaled.layer)
    }
    return [part for part in products_in(layer) if id(part) not in inside]


def check_saved_activations(saved_activations: Any) -> None:
    is_format = isinstance(saved_activations, str) and saved_activations == packing.FORMAT
    if saved_activations is not None and not is_format:
        raise ValueError(
            f"Expected `saved_activations` to be '{packing.FORMAT}', which has the range of "
            f"float16, or None. Received: saved_activations={saved_activations!r}."
        )


def check_float8(float8: Any, layer: keras.layers.Layer) -> None:
    check_is_float8(float8)
    if layer.built and not own_products(layer):
        raise ValueError(
            "Expected a layer with a matrix product or a convolution that can be computed in "
            f"float8: a Dense, EinsumDense or convolution layer, or one with such inside. "
            f"Received: layer '{layer.name}' (of type {type(layer).__name__}), which has none, or "
            "only with a `call` of its own. Leave `float8` out."
        )
    _check_not_quantized(own_products(layer))


def _check_not_quantized(parts: list[keras.layers.Layer]) -> None:
    quantized = [part.name for part in parts if part.quantization_mode is not None]
    if quantized:
        raise ValueError(
            "Expected layers that compute in float8 not to be quantized by Keras, too. Received: "
            f"{', '.join(quantized)}. Do not call `quantize`, or leave `float8` out."
        )
