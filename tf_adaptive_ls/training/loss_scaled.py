"""`LossScaled`: a layer around another layer, with a loss scale for it."""

import functools
from typing import Any

import keras

from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.training.float8.settings import Float8
from tf_adaptive_ls.training.layer_scaling import (
    LayerScaling,
    check_float8,
    check_saved_activations,
)
from tf_adaptive_ls.training.noted_calls import note_call
from tf_adaptive_ls.training.saved_config import checked_config, with_version

_OPTIONAL = ("name", "trainable", "float8", "saved_activations")


@keras.saving.register_keras_serializable("tf_adaptive_ls")
class LossScaled(LayerScaling, keras_internals.StandIn):
    """A layer that runs the backward pass of another layer at its own loss scale.

    With S the scale outside (the loss scale of the optimizer, or the scale of an enclosing
    `LossScaled`), the layer works at S * 2**r. All tensors that cross the `Border` of the layer are
    multiplied by a power of two there. In the forward pass, a call of this layer is a call of
    `layer`: same signature, outputs, masks and updates, bit for bit.

    `AdaptiveLossScaleOptimizer` chooses r from the gradients. Under any other optimizer, r is 0.

    ```python
    layer = als.LossScaled(keras.layers.Dense(8))
    y = layer(x)
    ```

    Args:
        layer: The `keras.layers.Layer` to scale. It keeps its weights. Attributes that `LossScaled`
            does not have are those of `layer`.
        name: String. Defaults to `layer.name`.
        trainable: Boolean. Whether the scale can change. Whether weights are trained is up to
            `layer`.
        float8: A `Float8`, to compute all matmuls and convolutions of the layer from float8
            operands. Its `layer_filter` has no effect here.
        saved_activations: "float8_e5m2" to save only the inputs of the layer for the backward pass,
            in 8 bits, and to run the layer again there. The forward pass does not change. `None`
            saves what Keras saves.

    Raises:
        ValueError: If `layer` is not a layer, is a `LossScaled` layer, or is already inside of one;
            if `float8` is not a `Float8`, or the layer has no matmuls or convolutions.

    A layer that is created in a `keras.RematScope` is run again in the backward pass, with
    everything inside of it, instead of saving its intermediate results.

    Reference: Zhao, Vogel, Ahmed, "Adaptive Loss Scaling for Mixed Precision
    Training", 2019 (arXiv 1910.12385).
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        *,
        name: str | None = None,
        trainable: bool = True,
        float8: Float8 | None = None,
        saved_activations: str | None = None,
    ) -> None:
        _check_can_be_wrapped(layer)
        check_saved_activations(saved_activations)
        if float8 is not None:
            check_float8(float8, layer)

        # Keras reads from the signature of `call` which arguments are tensors, masks or flags.
        @functools.wraps(layer.call)
        def call(*args: Tensor, **kwargs: Any) -> Any:
            return self._scaled_call(self.layer, args, kwargs)

        object.__setattr__(self, "call", call)
        # The same dtype for computing and for weights: the wrapper casts nothing, and the layer
        # casts for itself.
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
        self.saved_activations = saved_activations
        self._start_scaling(float8)
        layer._loss_scaled = _Owner(self)
        self.built = layer.built

    @property
    def casts_inputs(self) -> bool:
        """Whether `layer` casts its inputs to the dtype that it computes in."""
        return self.layer.autocast

    @property
    def trainable(self) -> bool:
        """Whether `layer` is trainable. Setting it sets that of `layer`, and of the scale."""
        return self.layer.trainable if hasattr(self, "layer") else self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.Layer.trainable.fset(self, value)

    def __getattr__(self, name: str) -> Any:
        # Only attributes that the wrapper lacks. A weight that is read here is read outside of the
        # border, at scale S.
        layer = vars(self).get("layer")
        if layer is None or name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(layer, name)

    # From here on, the wrapper acts as its layer for Keras.

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
            # The output can be found only by calling the layer, and only `__call__` knows its
            # dtypes.
            return keras.Operation.compute_output_spec(self, *args, **kwargs)
        return self.layer.compute_output_spec(*args, **kwargs)

    def symbolic_call(self, *args: Any, **kwargs: Any) -> Any:
        return note_call(self, super().symbolic_call, args, kwargs)

    def compute_mask(self, inputs: Any, previous_mask: Any) -> Any:
        if not self.layer.supports_masking:
            return None
        return self.layer.compute_mask(inputs, previous_mask)

    def count_params(self) -> int:
        return self.layer.count_params()

    def get_config(self) -> dict[str, Any]:
        config = {
            "name": self.name,
            "trainable": self.loss_scale.trainable,
            "layer": keras.saving.serialize_keras_object(self.layer),
        }
        if self.float8 is not None:
            config["float8"] = keras.saving.serialize_keras_object(self.float8)
        if self.saved_activations is not None:
            config["saved_activations"] = self.saved_activations
        return with_version(config)

    @classmethod
    def from_config(
        cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None
    ) -> "LossScaled":
        config = checked_config(config, "LossScaled layer", ["layer"], _OPTIONAL)
        for name in ("layer", "float8"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(
                    config[name], custom_objects=custom_objects
                )
        return cls(**config)


def wrapper_of(layer: keras.layers.Layer) -> Any:
    """The `LossScaled` layer around `layer`, or `None`."""
    owner = layer.__dict__.get("_loss_scaled")
    return owner and owner.wrapper


def release(layer: keras.layers.Layer) -> None:
    """Makes `layer` forget its wrapper, so that another layer can wrap it."""
    layer.__dict__.pop("_loss_scaled")


class _Owner:
    """Holds the wrapper of a layer, hidden from Keras's attribute tracking."""

    def __init__(self, wrapper: LayerScaling) -> None:
        self.wrapper = wrapper


def _check_can_be_wrapped(layer: keras.layers.Layer) -> None:
    if not isinstance(layer, keras.layers.Layer):
        raise ValueError(
            f"Expected a keras.layers.Layer to wrap. Received: {layer!r} (of type "
            f"{type(layer).__name__}). Create the layer first: "
            "LossScaled(keras.layers.Dense(8))."
        )
    if isinstance(layer, LayerScaling):
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
