"""`plan_of`: derives a scale plan from the layer calls of a model."""

import collections
from collections.abc import Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import (
    is_from_keras,
    is_plain_keras_layer,
    parts_of,
)
from tf_adaptive_ls.models.calls import CallGraph, GraphCall
from tf_adaptive_ls.training.layer_scaling import LayerScaling
from tf_adaptive_ls.training.scale_plan import AT_S, Route, ScaleGroup, ScalePlan

_NORMALIZATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


def plan_of(
    graph: CallGraph, models: Sequence[tuple[keras.layers.Layer, keras.Model | None]] = ()
) -> ScalePlan:
    """Derives the `ScalePlan` of a `CallGraph`.

    Args:
        graph: The graph. Scaled layers appear in it as their `LayerScaling`.
        models: As in `ScalePlan`.
    """
    times_called = collections.Counter(
        id(layer) for call in graph.calls for layer in _scaled_layers(call.operation)
    )
    groups = _grouped(graph, times_called)
    planned = [
        call
        for call in graph.calls
        if isinstance(call.operation, LayerScaling) and times_called[id(call.operation)] == 1
    ]
    passing = [call for call in planned if _may_pass(call) and groups.consumers(call.outputs[0])]
    only_taken_by_it = [groups.consumers(call.inputs[0]) == (call.operation,) for call in passing]
    for call, joined in zip(passing, only_taken_by_it, strict=True):
        groups.add_passing(call.outputs[0], call.operation)
        if joined:
            groups.join([*call.inputs, *call.outputs])

    def group_of(key: Any) -> ScaleGroup:
        return AT_S if key is None else groups.scale_group(key)

    def passes_from(call: GraphCall) -> tuple[LayerScaling, ...]:
        if not any(call is other for other in passing):
            return ()
        consumers = groups.consumers(call.outputs[0])
        return tuple(layer for layer in consumers if layer is not call.operation)

    routes = {
        id(call.operation): Route(
            args=tuple(map(group_of, call.args)),
            kwargs={name: tuple(map(group_of, keys)) for name, keys in call.kwargs.items()},
            outputs=tuple(map(group_of, call.outputs)),
            passes_from=passes_from(call),
        )
        for call in planned
    }
    layers = tuple(call.operation for call in planned)
    order = None
    if graph.order is not None:
        order = tuple(layer for layer in graph.order if id(layer) in routes)
    calls = tuple((call.operation, call.inputs, call.outputs) for call in graph.calls)
    return ScalePlan(layers, routes, tuple(models), calls, graph.inputs, order)


def _grouped(graph: CallGraph, times_called: dict[int, int]) -> "_Groups":
    """Groups the tensors of a graph: returns its `_Groups`."""
    groups = _Groups()
    groups.pin([*graph.inputs, *graph.ends])
    for call in graph.calls:
        operation, inputs, outputs = call.operation, call.inputs, call.outputs
        if isinstance(operation, LayerScaling):
            if times_called[id(operation)] > 1:
                groups.pin([*inputs, *outputs])
            if operation.layer.activity_regularizer is not None:
                groups.pin(outputs)  # the loss may be computed from it outside of the border
            for tensor in inputs:
                groups.add_consumer(tensor, operation)
        else:
            groups.join([*inputs, *outputs])
            if call.takes_values or not _only_hands_gradients_on(operation):
                groups.pin([*inputs, *outputs])
    return groups


def _scaled_layers(operation: Any) -> list[LayerScaling]:
    """The scaled layers whose border a call of `operation` crosses."""
    if isinstance(operation, LayerScaling):
        return [operation]
    if not isinstance(operation, keras.layers.Layer):
        return []
    return [layer for layer in parts_of(operation) if isinstance(layer, LayerScaling)]


def _may_pass(call: GraphCall) -> bool:
    """Whether a call is a normalization of a single input."""
    layer = call.operation.layer
    return (
        isinstance(layer, _NORMALIZATIONS)
        and is_plain_keras_layer(layer)
        and len(call.inputs) == len(call.outputs) == 1
    )


def _only_hands_gradients_on(operation: Any) -> bool:
    """Whether the backward pass of `operation` is linear, and it has no gradients of its own."""
    if not isinstance(operation, keras.layers.Layer):
        return is_from_keras(type(operation))
    return all(
        is_plain_keras_layer(layer) and not layer.weights and layer.activity_regularizer is None
        for layer in parts_of(operation)
    )


class _Groups:
    """Union-find over the keys of tensors, with the properties of each group."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}
        self._pinned: set[Any] = set()
        self._consumers: dict[Any, list[LayerScaling]] = {}
        self._passing: dict[Any, list[LayerScaling]] = {}

    def _find(self, key: Any) -> Any:
        root = self._parent.setdefault(key, key)
        while self._parent[root] != root:
            root = self._parent[root]
        self._parent[key] = root
        return root

    def join(self, tensors: Sequence[Any]) -> None:
        if not tensors:
            return
        first, *others = (self._find(tensor) for tensor in tensors)
        for root in others:
            if root != first:
                self._parent[root] = first
                for layers in (self._consumers, self._passing):
                    layers.setdefault(first, []).extend(layers.pop(root, []))
                if root in self._pinned:
                    self._pinned.add(first)

    def pin(self, tensors: Sequence[Any]) -> None:
        """Makes the gradients of the groups of `tensors` travel at S."""
        self._pinned.update(self._find(tensor) for tensor in tensors)

    def add_consumer(self, tensor: Any, layer: LayerScaling) -> None:
        consumers = self._consumers.setdefault(self._find(tensor), [])
        if layer not in consumers:
            consumers.append(layer)

    def add_passing(self, tensor: Any, layer: LayerScaling) -> None:
        self._passing.setdefault(self._find(tensor), []).append(layer)

    def consumers(self, tensor: Any) -> tuple[LayerScaling, ...]:
        """The layers that consume the group of `tensor`. Empty if its gradients travel at S."""
        root = self._find(tensor)
        return () if root in self._pinned else tuple(self._consumers.get(root, ()))

    def scale_group(self, tensor: Any) -> ScaleGroup:
        """The `ScaleGroup` of `tensor`."""
        consumers = self.consumers(tensor)
        passing = tuple(self._passing.get(self._find(tensor), ()))
        return ScaleGroup(passing if consumers and passing else consumers)
