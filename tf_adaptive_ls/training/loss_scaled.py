"""`LossScaled`: one layer, and the scale that its backward pass works at."""

import contextlib
import contextvars
import dataclasses
import functools
import itertools
import numbers
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from tf_adaptive_ls.numerics import backend, report, scale_state
from tf_adaptive_ls.numerics.evidence import Ownership
from tf_adaptive_ls.numerics.float_format import COUNTING_FORMAT, FloatFormat, narrowest
from tf_adaptive_ls.numerics.scale_state import MAX_LOG2_SCALE
from tf_adaptive_ls.numerics.scale_update import Flow
from tf_adaptive_ls.numerics.spectrum import Spectrum
from tf_adaptive_ls.training import keras_internals, scale_plan
from tf_adaptive_ls.training.border import Border
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.float8 import Float8
from tf_adaptive_ls.training.held_call import call_held, check_gradients, runs_again
from tf_adaptive_ls.training.held_variables import ReadElsewhere, scaled_weights_of
from tf_adaptive_ls.training.keras_internals import (
    is_plain_keras_layer,
    may_be_trained,
    parts_of,
)
from tf_adaptive_ls.training.products import in_float8, products_in
from tf_adaptive_ls.training.saved_config import opened, stamped

_clock = itertools.count()
_neutral = contextvars.ContextVar("neutral_scales", default=False)


@contextlib.contextmanager
def neutral_scales() -> Iterator[None]:
    """Makes every `LossScaled` layer that is called inside it transparent.

    Such a call is exactly a call of the layer itself: gradients pass at the scale
    of the surroundings, nothing is measured, and derivatives of any order are
    right. Use it around forward passes whose gradients are differentiated again:

    ```python
    with tf.GradientTape() as tape:
        tape.watch(x)
        with als.neutral_scales():
            score = critic(x)
    penalty = (tf.norm(tape.gradient(score, x)) - 1) ** 2
    ```

    In compiled code it counts when the code is traced.
    """
    token = _neutral.set(True)
    try:
        yield
    finally:
        _neutral.reset(token)


@dataclasses.dataclass(frozen=True)
class Call:
    """The last call of a `LossScaled` layer, in eager code or while it was traced.

    Attributes:
        at: When it was. It tells which of two layers a gradient comes to first.
        passes_from: The layers that gradients come from which this one passes on at the
            scale they come at, see `scale_plan`.
        passes_with: The layers that pass gradients on at the same scale, itself included.
    """

    at: int = -1
    passes_from: tuple = ()
    passes_with: tuple = ()


@keras.saving.register_keras_serializable("tf_adaptive_ls")
class LossScaled(keras.layers.Wrapper):
    """Runs the backward pass of a layer at a loss scale of its own.

    With S the scale of the surroundings (the optimizer's loss scale, or that of
    an enclosing wrapper) the layer works at S * 2**r. Everything that crosses
    its `Border` is shifted there, and nothing else is touched. Forward, a call is
    a call of `layer`: same signature, outputs, masks and updates, bit for bit.

    `AdaptiveLossScaleOptimizer` chooses r from what the backward pass saw; under
    any other optimizer it becomes and stays 0, and nothing is known of gradients.

    Args:
        layer: The `keras.layers.Layer` to scale. It keeps its weights, and lends
            the wrapper its name.
        name: String, defaults to `layer.name`.
        trainable: Boolean, whether the scale can be chosen. Whether weights are trained is the
            layer's own.
        float8: A `Float8`, with which all matrix products and convolutions of the layer
            are computed from numbers of 8 bits; its `layer_filter` says nothing here.

    Raises:
        ValueError: If `layer` is not a layer, is a `LossScaled` layer, or is inside
            one already; if `float8` is not a `Float8`, or there is nothing to use it for.

    A layer made in a `keras.RematScope` is run once more in the backward pass, with all
    that is inside it, instead of keeping its intermediate results.

    Reference: Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision
    Training", 2019 (arXiv 1910.12385).
    """

    # The layer is, and its border has to stay where it is.
    _remat_mode = keras_internals.NEVER_REMATERIALISED

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        name: str | None = None,
        trainable: bool = True,
        float8: Float8 | None = None,
    ):
        _check_can_be_wrapped(layer)
        if float8 is not None:
            _check_float8(float8, layer)
            float8 = dataclasses.replace(float8, layer_filter=None)

        # Keras learns from the signature of `call` which arguments are tensors,
        # masks or flags: it has to be the layer's.
        @functools.wraps(layer.call)
        def call(*args, **kwargs):
            return self._scaled_call(*args, **kwargs)

        object.__setattr__(self, "call", call)
        # One dtype for computing and for weights, so that nothing is cast on the
        # way to the layer, which casts for itself.
        super().__init__(
            layer,
            name=layer.name if name is None else name,
            trainable=trainable,
            dtype=layer.variable_dtype,
            autocast=False,
        )
        self.supports_masking = True
        self.supports_jit = layer.supports_jit
        keras_internals.allow_any_positional_arguments(self)
        self.loss_scale = self._add_weight_of_scaling("loss_scale", (2,), scale_state.initial_scale)
        self.loss_scale_report = self._add_weight_of_scaling(
            "loss_scale_report", (report.SIZE,), "zeros"
        )
        self.float8 = float8
        self.float8_report = self.float8_seed = None
        if float8 is not None:
            self.float8_report = self._add_weight_of_scaling(
                "float8_report", (report.OPERAND_SIZE,), "zeros"
            )
            if float8.rounding == "stochastic":
                self.float8_seed = self._add_seed()
        # How it reads weights if that keeps it from working at a scale of its own.
        self._read_elsewhere: str | None = None
        self._gradients_checked = False
        # Why its file was refused.
        self._refused: ValueError | None = None
        # Whether it was ever called so that its scale does not act on the gradients of weights.
        self.called_at_s = False
        # The one that knows about it.
        self._optimizer: weakref.ref[Any] | None = None
        self.last_call = Call()
        layer._loss_scaled = _Owner(self)
        self.built = layer.built

    @property
    def trainable(self) -> bool:
        """Whether `layer` is trainable. Setting it sets that of `layer`, and of the scale."""
        return self.layer.trainable if hasattr(self, "layer") else self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)

    def _add_weight_of_scaling(self, name, shape, initializer):
        # Trainable, since nothing else reaches a stateless optimizer on JAX.
        weight = self.add_weight(
            shape=shape,
            initializer=initializer,
            dtype="float32",
            autocast=False,
            overwrite_with_gradient=True,
            name=name,
        )
        weight.loss_scaled = self
        # Whether the layer is frozen now or not: that may change without the wrapper knowing.
        weight.trainable = self._trainable
        return weight

    def _add_seed(self):
        # Keras does not save a `SeedGenerator`, and a resumed run would go on otherwise.
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

    def _computes_in(self):
        return narrowest(part.compute_dtype for part in keras_internals.parts_of(self.layer))

    @property
    def operand_format(self) -> FloatFormat | None:
        """The `FloatFormat` of 8 bits that gradients are rounded to inside it, or `None`."""
        return None if self.float8 is None else self.float8.backward_format

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
    def snapshot(self) -> scale_state.LayerSnapshot:
        """All that is known of its gradients, a `scale_state.LayerSnapshot`, between steps."""
        optimizer = self._optimizer() if self._optimizer else None
        if optimizer is None:
            return scale_state.LayerSnapshot.of_unknown(self.log2_scale, self.float_format)
        return optimizer.layer_snapshots([self])[0]

    def shows(self, optimizer: Any) -> None:
        """From now on `snapshot` is what `optimizer` knows of the layer."""
        self._optimizer = weakref.ref(optimizer)

    def _scaled_call(self, *args, **kwargs):
        if _neutral.get():
            self.called_at_s = True
            with scale_plan.running(None):
                return self.layer(*args, **kwargs)
        if self._read_elsewhere is None:
            try:
                return self._call_at_own_scale(args, kwargs)
            except ReadElsewhere as reads:
                self._read_elsewhere, self.called_at_s = reads.how, True
                warnings.warn(
                    f"LossScaled layer '{self.name}' works at the scale of its surroundings: it "
                    f"{reads.how}, and could not be given them at a scale of its own.",
                    stacklevel=2,
                )
        border = Border(self, at_own_scale=False, reports=False)
        args, kwargs, _ = border.tap_inputs(args, kwargs, [])
        with scale_plan.running(None), self._computing(border)():
            outputs = self.layer(*args, **kwargs)
        return border.tap_outputs(outputs)

    def _call_at_own_scale(self, args, kwargs):
        border = Border(self, reports=self._is_to_report(args, kwargs))
        if not runs_again():
            self.last_call = Call(next(_clock), border.passes_from, border.passes_with)
        weights = scaled_weights_of(self.layer)
        args, kwargs, weights = border.tap_inputs(args, kwargs, weights)
        self._check_gradients(weights, args, kwargs)
        outputs, losses = call_held(
            self.layer, weights, args, kwargs, self._computing(border), border.receivers_inside
        )
        for loss in losses:
            self.add_loss(border.tap_loss(loss))
        return border.tap_outputs(outputs)

    def _is_to_report(self, args, kwargs):
        """Whether its gradients matter. If it is frozen, they may to what comes before it."""
        if not self.loss_scale.trainable:
            return False
        if self.layer.trainable_variables or not may_be_trained(self.layer):
            return True
        if not scale_plan.may_be_passed(self):
            return False
        receivers = self.loss_scale.value, self.loss_scale_report.value
        return backend.is_differentiated(CallTensors((args, kwargs)).tensors, receivers)

    def _check_gradients(self, weights, args, kwargs):
        """Once, and where gradients are wanted."""
        values = [value for _, value in weights]
        if (
            not self._gradients_checked
            and backend.gradients_end_at_variables()
            and backend.is_differentiated(values)
            and not all(map(is_plain_keras_layer, parts_of(self.layer)))
        ):
            self._gradients_checked = True
            check_gradients(self.layer, weights, args, kwargs)

    def _computing(self, border):
        """Function that makes the context in which the layer runs."""
        if self.float8 is None:
            return contextlib.nullcontext
        # Only now it is built, and it may have been quantised since.
        _check_float8(self.float8, self.layer)
        parts = _own_products(self.layer)
        return functools.partial(in_float8, parts, self.float8, border.tap_operand)

    # From here on the wrapper is its layer, as far as Keras can see.

    def _maybe_build(self, call_spec):
        if not self.layer.built:
            keras_internals.build_for_call(self.layer, call_spec)
        self.built = True

    def _open_name_scope(self):
        # The layer opens its own: paths of weights read as without a wrapper.
        return contextlib.nullcontext()

    def build(self, *args: Any, **kwargs: Any) -> None:
        if not self.layer.built:
            self.layer.build(*args, **kwargs)
        self.built = True

    def get_build_config(self) -> dict[str, Any] | None:
        return self.layer.get_build_config()

    def build_from_config(self, config: dict[str, Any]) -> None:
        if not self.layer.built:
            self.layer.build_from_config(config)
        self.built = True

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        plain = keras.layers.Layer
        kind = type(self.layer)
        if (
            kind.compute_output_shape is plain.compute_output_shape
            and kind.compute_output_spec is plain.compute_output_spec
        ):
            # Only a call tells, and only `__call__` knows the layer's dtypes.
            return keras.Operation.compute_output_spec(self, *args, **kwargs)
        return self.layer.compute_output_spec(*args, **kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        if not self.layer.supports_masking:
            return None
        return self.layer.compute_mask(inputs, previous_mask)

    def count_params(self) -> int:
        return self.layer.count_params()

    def quantize(self, *args: Any, **kwargs: Any) -> Any:
        if self.float8 is not None:
            raise ValueError(
                f"Expected layer '{self.name}' to be quantised once. Received: `quantize` for a "
                "LossScaled layer that computes in float8 already. `strip_model` it before, or "
                "leave `float8` out."
            )
        return self.layer.quantize(*args, **kwargs)

    def load_own_variables(self, store: Any) -> None:
        if self._refused is not None and not store.keys():
            raise self._refused  # Keras tries once more, by another way, and shows only the last
        super().load_own_variables(self._without_reports(store))
        scale = self.loss_scale.numpy()
        self._refused = None
        if not np.isfinite(scale).all():
            self.loss_scale.assign(scale_state.initial_scale())
            self._refused = ValueError(
                f"Expected finite numbers as the scale of LossScaled layer '{self.name}'. "
                f"Received: {scale.tolist()}. What was saved is not finite: load what was saved "
                "before, and look at its weights, too."
            )
            raise self._refused
        self.loss_scale.assign(scale_state.restored(scale))

    def _without_reports(self, store):
        """`store`, with reports as they are: nobody reads the last one, whatever its length."""
        reports = {"1": self.loss_scale_report, "2": self.float8_report}
        own = {key: v.numpy() for key, v in reports.items() if v is not None and key in store}
        return {key: store[key] for key in list(store.keys())} | own

    def get_config(self) -> dict[str, Any]:
        config = {
            "name": self.name,
            "trainable": self.loss_scale.trainable,
            "layer": keras.saving.serialize_keras_object(self.layer),
        }
        if self.float8 is not None:
            config["float8"] = keras.saving.serialize_keras_object(self.float8)
        return stamped(config)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "LossScaled":
        config = opened(config, "LossScaled layer", ["layer"], ["name", "trainable", "float8"])
        for name in ("layer", "float8"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return cls(**config)


def ownership_of(layers, weights):
    """The `Ownership` of a list of `LossScaled` layers and one of variables."""
    place_of_layer = {id(layer): place for place, layer in enumerate(layers)}
    place_of_weight = {id(weight): place for place, weight in enumerate(weights)}

    def places(items, place_of):
        return [place_of[id(item)] for item in items if id(item) in place_of]

    return Ownership.of(
        [places(layer.layer.trainable_variables, place_of_weight) for layer in layers],
        [places(keras_internals.parts_of(layer.layer), place_of_layer) for layer in layers],
        len(weights),
    )


def flow_of(layers):
    """The `Flow` of gradients between `LossScaled` layers when they were last called."""
    place_of = {id(layer): place for place, layer in enumerate(layers)}

    def relation(others_of):
        related = np.zeros((len(layers), len(layers)), bool)
        for place, layer in enumerate(layers):
            related[place, [place_of[id(o)] for o in others_of(layer) if id(o) in place_of]] = True
        return related

    passes_from = relation(lambda layer: layer.last_call.passes_from)
    passes_with = relation(lambda layer: set(layer.last_call.passes_with) - {layer})
    call_order = np.array([layer.last_call.at for layer in layers])
    return Flow(call_order, passes_from, np.logical_or(passes_from, passes_with))


def wrapper_of(layer):
    """The `LossScaled` layer around `layer`, or `None`."""
    owner = layer.__dict__.get("_loss_scaled")
    return owner and owner.wrapper


def layer_of(variable):
    """The `LossScaled` layer that keeps its scale or its report in `variable`, or `None`."""
    return getattr(variable, "loss_scaled", None)


def is_of_scaling(variable):
    """Whether `variable` is not a weight of a model, but of what scales it."""
    return layer_of(variable) is not None


def release(layer):
    """Makes `layer` forget its wrapper, so that another may wrap it."""
    layer.__dict__.pop("_loss_scaled")


class _Owner:
    """Leads from a layer to its wrapper, without Keras taking that for a sublayer."""

    def __init__(self, wrapper):
        self.wrapper = wrapper


def _own_products(layer):
    """The products in a layer, less those in `LossScaled` layers inside it."""
    inside = {
        id(part)
        for scaled in keras_internals.parts_of(layer)
        if isinstance(scaled, LossScaled)
        for part in keras_internals.parts_of(scaled)
    }
    return [part for part in products_in(layer) if id(part) not in inside]


def _check_float8(float8, layer):
    if not isinstance(float8, Float8):
        raise ValueError(
            f"Expected `float8` to be a Float8. Received: float8={float8!r} (of type "
            f"{type(float8).__name__}). Use for example Float8()."
        )
    if layer.built and not _own_products(layer):
        raise ValueError(
            "Expected a layer with a matrix product or a convolution that can be computed in "
            f"float8: a Dense, EinsumDense or convolution layer, or one with such inside. "
            f"Received: layer '{layer.name}' (of type {type(layer).__name__}), which has none, or "
            "only with a `call` of its own. Leave `float8` out."
        )
    _check_not_quantized(_own_products(layer))


def _check_not_quantized(parts):
    quantized = [part.name for part in parts if part.quantization_mode is not None]
    if quantized:
        raise ValueError(
            "Expected layers that compute in float8 not to be quantised by Keras, too. Received: "
            f"{', '.join(quantized)}. Do not call `quantize`, or leave `float8` out."
        )


def _check_can_be_wrapped(layer):
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            f"Expected a keras.layers.Layer to wrap. Received: {layer!r} (of type "
            f"{type(layer).__name__}). Create the layer first: "
            "LossScaled(keras.layers.Dense(8))."
        )
    if isinstance(layer, LossScaled):
        raise ValueError(
            "Expected a layer that is not scaled yet. Received: the LossScaled layer "
            f"'{layer.name}'. Use it as it is."
        )
    if wrapper_of(layer) is not None:
        raise ValueError(
            "Expected a layer that is not scaled yet. Received: layer "
            f"'{layer.name}', which a LossScaled layer already wraps. Call that "
            "wrapper, also where the layer is shared."
        )
