"""Derives a scale plan from the graph of a model."""

import dataclasses

import keras
from keras import tree

from tf_adaptive_ls.training.keras_internals import (
    graph_of,
    is_from_keras,
    is_plain_keras_layer,
    nodes_of,
    parts_of,
)
from tf_adaptive_ls.training.loss_scaled import LossScaled
from tf_adaptive_ls.training.scale_plan import AT_S, Route, ScaleGroup, ScalePlan

_NORMALISATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


def plan_of(model):
    """Derives the `ScalePlan` of a Functional or built Sequential model."""
    calls, models = [], []
    _collect_calls(model, calls, models)

    times_called = {}
    for call in calls:
        if call.nested is not None:
            continue  # its layers have calls of their own in the list
        for layer in _scaled_layers(call.operation):
            times_called[id(layer)] = times_called.get(id(layer), 0) + 1

    groups = _Groups()
    for nested, graph in models:
        if nested is model:
            groups.pin([*graph.inputs, *graph.outputs])
    for call in calls:
        operation, inputs, outputs = call.operation, call.inputs, call.outputs
        if isinstance(operation, LossScaled):
            if times_called[id(operation)] > 1:
                groups.pin([*inputs, *outputs])
            for tensor in inputs:
                groups.add_consumer(tensor, operation)
        elif call.nested is not None:
            for outside, inside in zip(inputs, call.nested.inputs, strict=True):
                groups.join([outside, inside])
            for outside, inside in zip(outputs, call.nested.outputs, strict=True):
                groups.join([outside, inside])
        else:
            groups.join([*inputs, *outputs])
            if not _only_hands_gradients_on(operation):
                groups.pin([*inputs, *outputs])

    planned = [
        call
        for call in calls
        if isinstance(call.operation, LossScaled) and times_called[id(call.operation)] == 1
    ]
    passing = [call for call in planned if _may_pass(call) and groups.consumers(call.outputs[0])]
    only_taken_by_it = [groups.consumers(call.inputs[0]) == (call.operation,) for call in passing]
    for call, joined in zip(passing, only_taken_by_it, strict=True):
        groups.add_passing(call.outputs[0], call.operation)
        if joined:
            groups.join([*call.inputs, *call.outputs])

    def group_of(leaf):
        return groups.scale_group(leaf) if isinstance(leaf, keras.KerasTensor) else AT_S

    def passes_from(call):
        if not any(call is other for other in passing):
            return ()
        consumers = groups.consumers(call.outputs[0])
        return tuple(layer for layer in consumers if layer is not call.operation)

    routes = {
        id(call.operation): Route(
            args=tuple(group_of(leaf) for leaf in tree.flatten(call.args)),
            kwargs={
                name: tuple(group_of(leaf) for leaf in tree.flatten(value))
                for name, value in call.kwargs.items()
            },
            outputs=tuple(group_of(tensor) for tensor in call.outputs),
            passes_from=passes_from(call),
        )
        for call in planned
    }
    layers = tuple(call.operation for call in planned)
    inputs = tuple(map(id, graph_of(model).inputs))
    return ScalePlan(layers, routes, tuple(models), _with_keys(calls), inputs)


def _with_keys(calls):
    """Operations, with keys of what they take and return: `ScalePlan.calls`."""
    same = {}  # a tensor of a nested graph is that outside of it
    for call in calls:
        if call.nested is not None:
            pairs = [*zip(call.nested.inputs, call.inputs, strict=True)]
            pairs += zip(call.outputs, call.nested.outputs, strict=True)
            same.update((id(a), id(b)) for a, b in pairs if a is not b)

    def keys(tensors):
        found = []
        for key in map(id, tensors):
            while key in same:
                key = same[key]
            found.append(key)
        return tuple(found)

    return tuple(
        (call.operation, keys(call.inputs), keys(call.outputs))
        for call in calls
        if call.nested is None
    )


@dataclasses.dataclass(frozen=True)
class _Call:
    """One node of the graph; `nested` is the graph of a model planned inline."""

    operation: object
    args: tuple
    kwargs: dict
    inputs: list
    outputs: list
    nested: object = None


def _collect_calls(model, calls, models):
    """Lists the calls in `model`'s graph and those of models called once in it."""
    graph = graph_of(model)
    models.append((model, graph))
    nodes = nodes_of(graph)
    for node in nodes:
        operation, arguments = node.operation, node.arguments
        nested = None
        if isinstance(operation, keras.Model) and graph_of(operation) is not None:
            shared = sum(other.operation is operation for other in nodes) > 1
            seen = any(operation is other for other, _ in models)
            plain = len(node.input_tensors) == len(graph_of(operation).inputs)
            if plain and not shared and not seen:
                nested = graph_of(operation)
                _collect_calls(operation, calls, models)
        calls.append(
            _Call(
                operation,
                arguments.args,
                arguments.kwargs,
                node.input_tensors,
                node.output_tensors,
                nested,
            )
        )


def _scaled_layers(operation):
    """The `LossScaled` layers that a call of `operation` may run at its border."""
    if isinstance(operation, LossScaled):
        return [operation]
    if not isinstance(operation, keras.layers.Layer):
        return []
    return [layer for layer in parts_of(operation) if isinstance(layer, LossScaled)]


def _may_pass(call):
    """Whether a call is one of a layer that normalises its only input."""
    layer = call.operation.layer
    return (
        isinstance(layer, _NORMALISATIONS)
        and is_plain_keras_layer(layer)
        and len(call.inputs) == len(call.outputs) == 1
    )


def _only_hands_gradients_on(operation):
    """Whether `operation` has a linear backward pass and no gradients of its own."""
    if not isinstance(operation, keras.layers.Layer):
        return is_from_keras(type(operation))
    return all(
        is_plain_keras_layer(layer) and not layer.weights and layer.activity_regularizer is None
        for layer in parts_of(operation)
    )


class _Groups:
    """Union-find over the tensors of a graph, with what is known of each group."""

    def __init__(self):
        self._parent = {}
        self._pinned = set()
        self._consumers = {}
        self._passing = {}

    def _find(self, tensor):
        key = id(tensor)
        root = self._parent.setdefault(key, key)
        while self._parent[root] != root:
            root = self._parent[root]
        self._parent[key] = root
        return root

    def join(self, tensors):
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

    def pin(self, tensors):
        """Lets the groups of `tensors` travel at S."""
        self._pinned.update(self._find(tensor) for tensor in tensors)

    def add_consumer(self, tensor, layer):
        consumers = self._consumers.setdefault(self._find(tensor), [])
        if layer not in consumers:
            consumers.append(layer)

    def add_passing(self, tensor, layer):
        self._passing.setdefault(self._find(tensor), []).append(layer)

    def consumers(self, tensor):
        """The layers that take what is in the group of `tensor`, none if it travels at S."""
        root = self._find(tensor)
        return () if root in self._pinned else tuple(self._consumers.get(root, ()))

    def scale_group(self, tensor):
        """The `ScaleGroup` of `tensor`."""
        consumers = self.consumers(tensor)
        passing = tuple(self._passing.get(self._find(tensor), ()))
        return ScaleGroup(passing if consumers and passing else consumers)
