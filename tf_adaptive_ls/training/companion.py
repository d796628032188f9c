"""`Companion`: scales a layer from an attribute of the layer."""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any

import keras

from tf_adaptive_ls.backend import keras_internals, routes
from tf_adaptive_ls.training.float8.settings import Float8
from tf_adaptive_ls.training.layer_scaling import LayerScaling
from tf_adaptive_ls.training.noted_calls import note_call
from tf_adaptive_ls.training.ways import way_of_computing

ATTRIBUTE = "loss_scaling"

# The `id` of each companion whose layer is running in the current context.
_running: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    "layers_that_run", default=frozenset()
)


class Companion(LayerScaling):
    """Scales a layer, as an attribute of that layer.

    The layer keeps its class, name, weights and place in the model. Its `call` is routed through
    the companion, which runs it at a loss scale of its own. The variables of the scaling come after
    those of the layer in `variables` and `trainable_variables`; they are not among its `weights`.

    Args:
        layer: The layer. If it is not built yet, the variables are made when it is built.
        float8: A `Float8`, or `None`.
        saved_activations: The format in which inputs are saved for the backward pass, or `None`.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        float8: Float8 | None = None,
        saved_activations: str | None = None,
    ) -> None:
        # Bypasses Keras's attribute tracking: it would find the layer inside its companion inside
        # the layer, without end.
        object.__setattr__(self, "_scaled", _Box(layer))
        super().__init__(name=layer.name, dtype="float32", autocast=False)
        self._casts_inputs = layer.autocast
        self._float8_to_be = float8
        self.saved_activations = saved_activations
        self._is_left = None
        self.built = True

    @property
    def layer(self) -> keras.layers.Layer:
        return self._scaled.content

    @property
    def casts_inputs(self) -> bool:
        """Whether the layer casts its inputs. The companion has turned off its `autocast`."""
        return self._casts_inputs

    def __dir__(self) -> list[str]:
        # Keras saves the attributes that it finds here, and would recurse without end.
        return [name for name in super().__dir__() if name != "layer"]

    @property
    def trainable(self) -> bool:
        """True even if the layer is frozen, because gradients may still pass through it."""
        return True

    @trainable.setter
    def trainable(self, value: bool) -> None:
        pass

    @property
    def weights(self) -> list[keras.Variable]:
        """Empty: the variables of the scaling are not weights of the model."""
        return []

    def load_own_variables(self, store: Any) -> None:
        # A store without keys is the file of a plain model.
        if self.has_started and (store.keys() or self._refused is not None):
            super().load_own_variables(store)

    def on_built(self, is_left: Callable[[], bool]) -> None:
        """Sets a callback for the built layer. It may detach the layer; it returns whether."""
        object.__setattr__(self, "_is_left", is_left)

    def start(self) -> None:
        """Makes the variables unless they exist, and joins the layer."""
        if not self.has_started and not (self._is_left and self._is_left()):
            self._start_scaling(self._float8_to_be)
            keras_internals.move_variables_to(self, self.layer)
            self.join()

    @property
    def has_started(self) -> bool:
        return hasattr(self, "loss_scale")

    def join(self) -> None:
        """Becomes part of the layer."""
        if self.has_started:
            keras_internals.add_part(self.layer, ATTRIBUTE, self)

    def leave(self) -> None:
        """Stops being part of the layer, but goes on to run it."""
        keras_internals.take_out(self.layer, ATTRIBUTE, self)

    def route_calls(self) -> None:
        """Routes calls of the layer through this companion."""
        led: dict[str, Callable[..., Any]] = {
            "call": self.run,
            "quantized_call": self.run,
            "symbolic_call": functools.partial(note_call, self),
            "quantize": self.quantize_layer,
            "rematerialized_call": lambda original, args, kwargs: args[0],
        }
        self._routes = [routes.Route(self.layer, name, run) for name, run in led.items()]

    def end_routes(self) -> None:
        """Undoes `route_calls`."""
        for route in self._routes:
            route.end()

    def quantize_layer(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Replaces the `quantize` method of the layer, `original`."""
        self.check_may_be_quantized()
        return original(*args, **kwargs)

    def run(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Replaces the `call` method of the layer, `original`."""
        plain_call = self._plain_call(original)
        if not self.has_started:
            if not keras_internals.may_be_trained(self.layer):
                detach(self.layer)
                return plain_call(*args, **kwargs)
            self.start()
            if not self.has_started:
                return self._plain_call(self.layer.call)(*args, **kwargs)
        if keras_internals.is_symbolic() or id(self) in _running.get():
            return plain_call(*args, **kwargs)
        with keras_internals.no_autocast():  # with autocast, weights would be scaled in float16
            return self._scaled_call(plain_call, args, kwargs)

    def _plain_call(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The call without a border. It casts inputs as `__call__` would have done."""
        layer = self.layer
        scope = keras_internals.autocast_scope_of_call(layer, self.casts_inputs)
        casts = self.casts_inputs and not (
            scope is None and layer.compute_dtype != layer.variable_dtype
        )  # otherwise, `call` was called directly

        def plain_call(*args: Any, **kwargs: Any) -> Any:
            call = keras_internals.rematerialized_unless_routed(
                layer, way_of_computing(layer, original), args, kwargs
            )
            token = _running.set(_running.get() | {id(self)})
            try:
                with contextlib.nullcontext() if scope is None else scope():
                    if casts:
                        args, kwargs = keras_internals.cast_inputs(layer, (args, kwargs))
                    return call(*args, **kwargs)
            finally:
                _running.reset(token)

        return plain_call


class _Box:
    """Hides its content from Keras's attribute tracking."""

    def __init__(self, content: keras.layers.Layer) -> None:
        self.content = content


def companion_of(layer: keras.layers.Layer) -> Companion | None:
    """The `Companion` of a layer, or `None`."""
    return vars(layer).get(_COMPANION)


def scaling_of(layer: keras.layers.Layer) -> LayerScaling | None:
    """The `LayerScaling` of a layer: the layer itself, its companion, or `None`."""
    if isinstance(layer, LayerScaling):
        return layer
    companion = companion_of(layer)
    return companion if companion is not None and companion.has_started else None


# The attribute is set before the companion becomes part of the layer.
_COMPANION = "_companion_of_layer"


def attach(
    layer: keras.layers.Layer,
    float8: Float8 | None = None,
    saved_activations: str | None = None,
) -> Companion:
    """Gives a layer a `Companion`, which starts once the layer is built.

    Raises:
        ValueError: If the companion would collide with an attribute of the layer. The layer is
            unchanged.
    """
    _check(layer)
    companion = Companion(layer, float8, saved_activations)
    object.__setattr__(layer, _COMPANION, companion)
    layer.autocast = False
    companion.route_calls()
    try:
        if layer.built and keras_internals.may_be_trained(layer):
            companion.start()
    except Exception:
        detach(layer)
        raise
    return companion


def detach(layer: keras.layers.Layer) -> None:
    """Undoes `attach`."""
    companion = companion_of(layer)
    assert companion is not None
    companion.end_routes()
    layer.autocast = companion.casts_inputs
    companion.leave()
    del vars(layer)[_COMPANION]


def _check(layer: keras.layers.Layer) -> None:
    if hasattr(layer, ATTRIBUTE):
        raise ValueError(
            f"Expected layers without an attribute `{ATTRIBUTE}`, where the scaling of a layer is "
            f"kept. Received: layer '{layer.name}' (of type {type(layer).__name__}), which has "
            "one. Give that another name, or leave the layer out by `layer_filter`."
        )
