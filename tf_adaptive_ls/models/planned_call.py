"""Calls a model, or a layer made of layers, under the scale plan of its trace."""

import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_adaptive_ls.backend import autodiff, keras_internals, routes
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.models import tracing
from tf_adaptive_ls.models.planning import plan_of
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.companion import companion_of
from tf_adaptive_ls.training.neutral_scales import are_scales_neutral
from tf_adaptive_ls.training.scale_plan import ScalePlan

_ATTRIBUTE = "_planned_call_of_layer"
_METHODS = ("call", "symbolic_call", "add_loss")


class PlannedCall:
    """Runs the calls of a model, or of a layer that is made of layers, under a `ScalePlan`.

    If the plan of an enclosing model includes the call, that plan is used. There is one plan for
    every signature: the shapes and dtypes of tensors, and all other arguments, such as `training`.

    Args:
        layer: The model or layer.
    """

    def __init__(self, layer: keras.layers.Layer) -> None:
        self._layer = layer
        self._find: Callable[[], Any] = lambda: None
        self._has_plans = True
        self._known_layers: tuple[int, ...] | None = None
        self._has_run = False
        self._plans: dict[Any, Any] = {}
        object.__setattr__(layer, _ATTRIBUTE, self)
        self._routes = [routes.Route(layer, name, getattr(self, f"_{name}")) for name in _METHODS]

    def uses(self, find: Callable[..., Any], has_plans: bool) -> None:
        """Sets the function that finds new layers inside, and whether to use plans."""
        self._find, self._has_plans = find, has_plans
        self._known_layers = None
        self._plans.clear()

    def undo(self) -> None:
        for route in self._routes:
            route.end()
        del vars(self._layer)[_ATTRIBUTE]

    def find_layers(self) -> None:
        """Finds new layers inside, if the list of layers has changed."""
        layers = tuple(map(id, keras_internals.layers_in(self._layer)))
        if layers != self._known_layers:
            self._known_layers = layers
            self._find()

    def reasons(self) -> dict[str, str]:
        """Why gradients return to scale S: dict of reasons by layer name."""
        found: dict[str, str] = {}
        for _, reasons in self._plans.values():
            found |= reasons
        return found

    def _call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        if tracing.current() is not None:
            return original(*args, **kwargs)
        self.find_layers()
        if scale_plan.is_covered(self._layer):
            return original(*args, **kwargs)
        plan = self._plan_of(original, args, kwargs)
        from_inputs = plan is not None and autodiff.is_differentiated(
            CallTensors((args, kwargs)).tensors
        )
        with scale_plan.running(plan, from_inputs):
            outputs = original(*args, **kwargs)
            self._has_run = True
            if not scale_plan.was_in_order():
                raise RuntimeError(
                    f"Expected model '{self._layer.name}' (of type {type(self._layer).__name__}) "
                    "to call its layers as it did when it was traced on symbolic tensors. "
                    "Received: other calls, or calls in another order, for which gradients would "
                    "be wrong. Let the calls depend only on arguments, shapes and attributes, or "
                    "use `wrap_model(model, plan=False)`."
                )
        return outputs

    def _plan_of(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ScalePlan | None:
        if not self._has_plans or are_scales_neutral() or keras_internals.is_symbolic():
            return None
        parts = keras_internals.parts_of(self._layer)
        if not self._has_run and not all(part.built for part in parts if part is not self._layer):
            return None  # the first call builds the layers
        key = _signature(args, kwargs), _state_of(parts)
        if key not in self._plans:
            self._plans[key] = self._traced(original, args, kwargs, parts)
        return self._plans[key][0]

    def _traced(
        self,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parts: list[keras.layers.Layer],
    ) -> tuple[ScalePlan | None, dict[str, str]]:
        """The plan, or `None`, and the dict of reasons by layer name."""
        try:
            graph, opaque = tracing.trace(self._layer, original, args, kwargs, _scaling_or_itself)
        except tracing.NotTraceable as error:
            return None, {self._layer.name: str(error)}
        models = [
            (part, keras_internals.graph_of(part))
            for part in parts
            if planned_call_of(part) is not None and id(part) not in opaque
        ]
        reasons = {part.name: opaque[id(part)] for part in parts if id(part) in opaque}
        return plan_of(graph, models), reasons

    def _symbolic_call(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        trace = tracing.current()
        if trace is None:
            return original(*args, **kwargs)
        call = routes.behind(self._layer.call)
        return trace.call_inside(self._layer, call, original, args, kwargs)

    def _add_loss(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        trace = tracing.current()
        losses = tree.flatten((args, kwargs))
        if trace is not None and any(isinstance(each, keras.KerasTensor) for each in losses):
            trace.ends.extend(losses)
        else:
            original(*args, **kwargs)


def planned_call_of(layer: keras.layers.Layer) -> Any:
    """The `PlannedCall` of a layer, or `None`."""
    return vars(layer).get(_ATTRIBUTE)


def reasons_for_no_plan(model: keras.layers.Layer) -> dict[str, str]:
    """Where gradients return to scale S between layers: dict of reasons by layer name."""
    found: dict[str, str] = {}
    for part in keras_internals.parts_of(model):
        if planned_call_of(part) is not None:
            found |= planned_call_of(part).reasons()
    return found


def _scaling_or_itself(operation: Any) -> Any:
    companion = companion_of(operation)
    return operation if companion is None or not companion.has_started else companion


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Hashable: everything in the arguments that a plan depends on."""

    def of_leaf(leaf: Any) -> str | tuple[str, str, bool]:
        if ops.is_tensor(leaf) or isinstance(leaf, np.ndarray):
            mask = keras_internals.mask_of(leaf)
            return str(leaf.shape), str(leaf.dtype), mask is None
        return repr(leaf)

    names = tuple(sorted(kwargs))
    structure = tree.map_structure(lambda leaf: 0, (args, kwargs))
    return names, repr(structure), tuple(map(of_leaf, tree.flatten((args, kwargs))))


def _state_of(parts: list[keras.layers.Layer]) -> tuple[tuple[Any, ...], ...]:
    """Hashable: everything in the layers that a plan depends on."""
    return tuple((id(part), part.built, *_flags(part)) for part in parts)


def _flags(part: keras.layers.Layer) -> tuple[tuple[str, Any], ...]:
    """The attributes of a user-defined layer that control it: numbers, strings and booleans."""
    if planned_call_of(part) is None:
        return ()
    return tuple(
        (name, value)
        for name, value in vars(part).items()
        if name not in _attributes_of_keras() and isinstance(value, bool | int | float | str | None)
    )


@functools.cache
def _attributes_of_keras() -> frozenset[str]:
    return frozenset([*vars(keras.layers.Layer()), *vars(keras.Model())])
