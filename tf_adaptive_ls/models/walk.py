"""`Walk`: goes through any model, and gives each layer with weights a companion."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import keras

from tf_adaptive_ls.backend import keras_internals, routes
from tf_adaptive_ls.backend.keras_internals import is_all_config, may_be_trained, own_weights
from tf_adaptive_ls.models.planned_call import PlannedCall, planned_call_of
from tf_adaptive_ls.training.companion import attach, companion_of, detach
from tf_adaptive_ls.training.float8.settings import Float8
from tf_adaptive_ls.training.layer_scaling import LayerScaling
from tf_adaptive_ls.training.loss_scaled import wrapper_of
from tf_adaptive_ls.training.saved_inputs import save_inputs, saves_inputs


@dataclasses.dataclass(frozen=True)
class Choice:
    """How to scale a model.

    Attributes:
        wants: Function `(layer, path) -> bool`: whether to scale the layer.
        float8_of: Function `(layer, path) -> Float8 | None`: its float8 settings.
        plans: Whether gradients travel between layers at the scales of the layers.
        saved_activations: The format in which layers save their inputs for the backward pass.
    """

    wants: Callable[[keras.layers.Layer, str], bool] = lambda layer, path: True
    float8_of: Callable[[keras.layers.Layer, str], Float8 | None] = lambda layer, path: None
    plans: bool = True
    saved_activations: str | None = None


class Walk:
    """Goes through a model, and again whenever a part of it that is called has new layers.

    The walk enters models, and user-defined layers that are made of layers or have no weights:
    layers inside of them are scaled one by one, and their calls run under plans. Every other layer
    is scaled as a whole.

    Args:
        choice: The `Choice`.
        exchange: Function `(model, walk, path) -> undo` that is called with every model.
    """

    def __init__(self, choice: Choice, exchange: Callable[..., Any]) -> None:
        self._choice, self._exchange = choice, exchange
        self._left_out: list[str] = []
        self._float8: dict[str, Float8] = {}
        self._undo: list[Callable[[], Any]] = []

    def visit(self, layer: keras.layers.Layer, path: str = "", is_root: bool = False) -> None:
        """Scales a layer, or the layers inside of it."""
        if isinstance(layer, LayerScaling) or wrapper_of(layer) or companion_of(layer):
            return
        if is_root or is_walked(layer):
            self._walk_into(layer, path)
        elif (may_be_trained(layer) or not layer.built) and not is_all_config(layer):
            self._scale(layer, path)
        elif self._choice.saved_activations is not None and saves_inputs(layer):
            self._save(layer)

    def undo(self) -> None:
        """Undoes all changes of the walk."""
        while self._undo:
            self._undo.pop()()

    def config(self, path: str) -> dict[str, Any]:
        """What to save with the model at `path`: a dict."""
        prefix = f"{path}/" if path else ""

        def below(paths: Iterable[str]) -> list[str]:
            return [each.removeprefix(prefix) for each in paths if each.startswith(prefix)]

        float8 = {name: self._float8[prefix + name].get_config() for name in below(self._float8)}
        config: dict[str, Any] = {"left_out": below(self._left_out), "float8": float8}
        if not self._choice.plans:
            config["plan"] = False
        if self._choice.saved_activations is not None:
            config["saved_activations"] = self._choice.saved_activations
        return {name: value for name, value in config.items() if value or name == "plan"}

    def _scale(self, layer: keras.layers.Layer, path: str) -> None:
        if not self._choice.wants(layer, path):
            self._left_out.append(path)
            return
        float8 = self._choice.float8_of(layer, path)
        if float8 is not None:
            self._float8[path] = float8
        companion = attach(layer, float8, self._choice.saved_activations)
        if not layer.built:
            companion.on_built(lambda: self._is_now_walked(layer, path))
        self._undo.append(lambda: detach(layer) if companion_of(layer) else None)

    def _save(self, layer: keras.layers.Layer) -> None:
        if routes.route_of(layer, "call") is None:
            self._undo.append(save_inputs(layer))

    def _is_now_walked(self, layer: keras.layers.Layer, path: str) -> bool:
        """Enters a layer if it got sublayers when it was built. Returns whether."""
        if not is_walked(layer):
            return False
        detach(layer)
        self._float8.pop(path, None)
        self._walk_into(layer, path)
        return True

    def _walk_into(self, layer: keras.layers.Layer, path: str) -> None:
        prefix = f"{path}/" if path else ""
        if isinstance(layer, keras.Model):
            undo = self._exchange(layer, self, path)
            if undo is not None:
                self._undo.append(undo)
        planned = planned_call_of(layer)
        if planned is None:
            planned = PlannedCall(layer)
            self._undo.append(planned.undo)

        def find() -> None:
            for part in layers_inside(layer):
                self.visit(part, prefix + part.name)

        planned.uses(find, self._choice.plans)
        planned.find_layers()


def layers_inside(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers inside of a layer, one level deep."""
    if isinstance(layer, keras.Sequential):
        return layer.layers
    return keras_internals.layers_in(layer)


def is_walked(layer: keras.layers.Layer) -> bool:
    """Whether a layer is a model, or user-defined and made of layers or without weights."""
    if isinstance(layer, keras.Model):
        return True
    if keras_internals.computes_as_keras_does(layer):
        return False
    if keras_internals.may_be_rematerialized(layer):
        return False  # in a rematerialized layer, borders inside would have to run again, too
    inside = [part for part in layers_inside(layer) if not isinstance(part, LayerScaling)]
    if own_weights(layer) or not layer.built:
        return any(may_be_trained(part) or not part.built for part in inside)
    return True
