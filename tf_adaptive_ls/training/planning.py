"""Derives a scale plan from the calls that a model is made of."""

import collections

import keras

from tf_adaptive_ls.training.calls import CallGraph, graph_call
from tf_adaptive_ls.training.keras_internals import (
    graph_of,
    is_from_keras,
    is_plain_keras_layer,
    nodes_of,
    parts_of,
)
from tf_adaptive_ls.training.layer_scaling import LayerScaling
from tf_adaptive_ls.training.scale_plan import AT_S, Route, ScaleGroup, ScalePlan

_NORMALISATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)


def plan_of_graph(graph, models=()):
    """Derives the `ScalePlan` of a `CallGraph`.

    Args:
        graph: The graph. What has a scale stands in it as a `LayerScaling`.
        models: As those of the plan.
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

    def group_of(key):
        return AT_S if key is None else groups.scale_group(key)

    def passes_from(call):
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


def _grouped(graph, times_called):
    """The `_Groups` of the tensors of a graph."""
    groups = _Groups()
    groups.pin([*graph.inputs, *graph.ends])
    for call in graph.calls:
        operation, inputs, outputs = call.operation, call.inputs, call.outputs
        if isinstance(operation, LayerScaling):
            if times_called[id(operation)] > 1:
                groups.pin([*inputs, *outputs])
            if operation.layer.activity_regularizer is not None:
                groups.pin(outputs)  # its loss may be computed outside of the border
            for tensor in inputs:
                groups.add_consumer(tensor, operation)
        else:
            groups.join([*inputs, *outputs])
            if call.takes_values or not _only_hands_gradients_on(operation):
                groups.pin([*inputs, *outputs])
    return groups


def plan_of(model):
    """Derives the `ScalePlan` of a Functional or built Sequential model from its graph."""
    graph = graph_of(model)
    same, nodes, models = {}, [], []
    _collect_nodes(model, same, nodes, models)

    def key_of(tensor):
        key = id(tensor)
        while key in same:
            key = same[key]
        return key

    calls = [graph_call(node, node.operation, key_of) for node in nodes]
    inputs, outputs = (tuple(map(key_of, tensors)) for tensors in (graph.inputs, graph.outputs))
    return plan_of_graph(CallGraph(calls, inputs, outputs), models)


def _collect_nodes(model, same, nodes, models):
    """Lists the calls in `model`'s graph and those of models called once in it.

    Args:
        model: The model.
        same: Dict to fill: by the `id` of a tensor at the border of a nested graph, that of the one
            that it is on the other side.
        nodes: List to extend by the calls.
        models: List to extend by pairs of a model and its graph.
    """
    graph = graph_of(model)
    models.append((model, graph))
    own = nodes_of(graph)
    for node in own:
        operation = node.operation
        if isinstance(operation, keras.Model) and graph_of(operation) is not None:
            nested = graph_of(operation)
            shared = sum(other.operation is operation for other in own) > 1
            seen = any(operation is other for other, _ in models)
            plain = len(node.input_tensors) == len(nested.inputs)
            if plain and not shared and not seen:
                _collect_nodes(operation, same, nodes, models)
                pairs = [*zip(nested.inputs, node.input_tensors, strict=True)]
                pairs += zip(node.output_tensors, nested.outputs, strict=True)
                same.update((id(a), id(b)) for a, b in pairs if a is not b)
                continue
        nodes.append(node)


def _scaled_layers(operation):
    """What has a scale and may be run at its border by a call of `operation`."""
    if isinstance(operation, LayerScaling):
        return [operation]
    if not isinstance(operation, keras.layers.Layer):
        return []
    return [layer for layer in parts_of(operation) if isinstance(layer, LayerScaling)]


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
    """Union-find over the tensors of a graph, by their keys, with what is known of each group."""

    def __init__(self):
        self._parent = {}
        self._pinned = set()
        self._consumers = {}
        self._passing = {}

    def _find(self, key):
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
