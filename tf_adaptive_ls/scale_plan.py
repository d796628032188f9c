"""At which scale each tensor's gradient travels through a model's graph.

By default a gradient returns to the scale S of the surroundings between any two
`LossScaled` layers. Inside a Functional or Sequential model it need not: it can
travel from layer to layer at a scale of the layers' own. Tensors that layers
without weights connect (activation, pooling, add, concatenate, …) must share one,
because such a layer hands the scale of its output's gradient on to its inputs.
They form a class. A class travels at the smallest scale of its consumers, for
each knows what its own input gradient can bear, or at S (`None` below) if it holds

- an input or output of the model,
- an input or output of a `LossScaled` layer that is called at several places, or
- a tensor next to an operation that is not known to treat gradients linearly and
  to have no gradients of its own: one with weights, or not of Keras.

Layers that normalise, half of all layers in many models, have few weights and hand on
about what they get. They need no scale apart from their surroundings: such a layer
*passes* gradients on at the scale that its outputs' class travels at, which is then its
own, and the optimizer holds that to those of the consumers. Where nothing else takes its
input, that belongs to the same class.

A plan is derived from the graph of one model and holds only while that model runs
it: see `running`.
"""

import contextlib
import contextvars
import dataclasses

import keras
from keras import ops, tree

from tf_adaptive_ls.scale_state import factor_of

# Keras layers that run code Keras does not know.
_FOREIGN_CODE = ("Lambda", "TFSMLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper")

_NORMALISATIONS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
)

_running = contextvars.ContextVar("running_scale_plan", default=None)


@dataclasses.dataclass(frozen=True)
class Border:
    """The classes that one call of a `LossScaled` layer has at its border.

    Each class is the tuple of the layers at whose smallest scale it travels, or `None`
    for S.

    Args:
        args, kwargs, outputs: The classes of the leaves of each.
        passes_from: The layers that gradients come from which the layer passes on at the
            scale they come at; empty if it does not.
    """

    args: tuple = ()
    kwargs: dict = dataclasses.field(default_factory=dict)
    outputs: tuple = ()
    passes_from: tuple = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePlan:
    """Borders of the layers of a graph; made by `plan_of`.

    Args:
        layers: The `LossScaled` layers that have a border, and
        borders: the `Border` of each, by its `id`.
        models: The model and those nested in it that are planned with it, each
            with the graph that the plan was derived from.
    """

    layers: tuple
    borders: dict
    models: tuple

    def covers(self, model):
        return any(model is planned for planned, _ in self.models)

    def is_current(self):
        """Whether the models still have the graphs that were planned."""
        return all(_graph(model) is graph for model, graph in self.models)


class _Run:
    """One run of a planned graph; computes the powers of two of all layers at once."""

    def __init__(self, plan):
        self.plan = plan
        self._of_layers = None
        self._of_classes = {}

    def powers(self, layer):
        if self._of_layers is None:
            layers = self.plan.layers
            factors = factor_of(ops.stack([each.loss_scale.value for each in layers]))
            ups, downs = (ops.unstack(each, len(layers)) for each in (factors, 1 / factors))
            self._of_layers = dict(zip(map(id, layers), zip(ups, downs, strict=True), strict=True))
        return self._of_layers[id(layer)]

    def class_powers(self, consumers):
        if len(consumers) == 1:
            return self.powers(consumers[0])
        if consumers not in self._of_classes:
            ups, downs = zip(*map(self.powers, consumers), strict=True)
            self._of_classes[consumers] = ops.min(ops.stack(ups)), ops.max(ops.stack(downs))
        return self._of_classes[consumers]


@contextlib.contextmanager
def running(plan):
    """Makes `plan` hold for the `LossScaled` layers called inside; `None` for none."""
    token = _running.set(plan and _Run(plan))
    try:
        yield
    finally:
        _running.reset(token)


def is_covered(model):
    """Whether the plan that holds includes the graph of `model`."""
    run = _running.get()
    return run is not None and run.plan.covers(model)


def border_of(layer):
    """The `Border` of `layer` under the plan that holds, `None` if there is none."""
    run = _running.get()
    return run and run.plan.borders.get(id(layer))


def powers(layer):
    """2**r and 2**-r of a layer in the running computation, two float32 scalars."""
    if border_of(layer):
        return _running.get().powers(layer)
    factor = factor_of(layer.loss_scale.value)
    return factor, 1 / factor


def class_powers(consumers):
    """The same of a class of the plan that holds, for its scale relative to S."""
    return _running.get().class_powers(consumers)


def plan_of(model, scaled_class):
    """Derives the plan of a Functional or built Sequential model.

    Args:
        model: The model.
        scaled_class: The class `LossScaled`.
    """
    calls, models = [], []
    _collect_calls(model, calls, models)

    times_called = {}
    for call in calls:
        if call.nested is not None:
            continue  # its layers have calls of their own in the list
        for layer in _scaled_layers(call.operation, scaled_class):
            times_called[id(layer)] = times_called.get(id(layer), 0) + 1

    classes = _Classes()
    for nested, graph in models:
        if nested is model:
            classes.pin([*graph.inputs, *graph.outputs])
    for call in calls:
        operation, inputs, outputs = call.operation, call.inputs, call.outputs
        if isinstance(operation, scaled_class):
            if times_called[id(operation)] > 1:
                classes.pin([*inputs, *outputs])
            for tensor in inputs:
                classes.add_consumer(tensor, operation)
        elif call.nested is not None:
            for outside, inside in zip(inputs, call.nested.inputs, strict=True):
                classes.join([outside, inside])
            for outside, inside in zip(outputs, call.nested.outputs, strict=True):
                classes.join([outside, inside])
        else:
            classes.join([*inputs, *outputs])
            if not _is_pure(operation):
                classes.pin([*inputs, *outputs])

    planned = [
        call
        for call in calls
        if isinstance(call.operation, scaled_class) and times_called[id(call.operation)] == 1
    ]
    passing = [call for call in planned if _may_pass(call) and classes.consumers(call.outputs[0])]
    only_taken_by_it = [classes.consumers(call.inputs[0]) == (call.operation,) for call in passing]
    for call, joined in zip(passing, only_taken_by_it, strict=True):
        classes.add_passing(call.outputs[0], call.operation)
        if joined:
            classes.join([*call.inputs, *call.outputs])

    def travel(leaf):
        return classes.travels_at(leaf) if isinstance(leaf, keras.KerasTensor) else None

    def passes_from(call):
        if not any(call is other for other in passing):
            return ()
        consumers = classes.consumers(call.outputs[0])
        return tuple(layer for layer in consumers if layer is not call.operation)

    borders = {
        id(call.operation): Border(
            args=tuple(travel(leaf) for leaf in tree.flatten(call.args)),
            kwargs={
                name: tuple(travel(leaf) for leaf in tree.flatten(value))
                for name, value in call.kwargs.items()
            },
            outputs=tuple(travel(tensor) for tensor in call.outputs),
            passes_from=passes_from(call),
        )
        for call in planned
    }
    return ScalePlan(tuple(call.operation for call in planned), borders, tuple(models))


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
    graph = _graph(model)
    models.append((model, graph))
    nodes = [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input
    ]
    for node in nodes:
        operation, arguments = node.operation, node.arguments
        nested = None
        if isinstance(operation, keras.Model) and _graph(operation) is not None:
            shared = sum(other.operation is operation for other in nodes) > 1
            seen = any(operation is other for other, _ in models)
            plain = len(node.input_tensors) == len(_graph(operation).inputs)
            if plain and not shared and not seen:
                nested = _graph(operation)
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


def _graph(model):
    """The Functional graph that `model` runs, or `None`."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def _scaled_layers(operation, scaled_class):
    """The `LossScaled` layers that a call of `operation` may run at its border."""
    if isinstance(operation, scaled_class):
        return [operation]
    if not isinstance(operation, keras.layers.Layer):
        return []
    return [layer for layer in operation._flatten_layers() if isinstance(layer, scaled_class)]


def _may_pass(call):
    """Whether a call is one of a layer that normalises its only input."""
    layer = call.operation.layer
    return (
        isinstance(layer, _NORMALISATIONS)
        and is_plain_keras_layer(layer)
        and len(call.inputs) == len(call.outputs) == 1
    )


def _is_pure(operation):
    """Whether `operation` has a linear backward pass and no gradients of its own."""
    if not isinstance(operation, keras.layers.Layer):
        return _is_from_keras(type(operation))
    return all(
        is_plain_keras_layer(layer) and not layer.weights and layer.activity_regularizer is None
        for layer in operation._flatten_layers()
    )


def is_plain_keras_layer(layer):
    """Whether `layer` is one of Keras's own and runs only code of Keras."""
    function = getattr(layer, "activation", None)
    return (
        _is_from_keras(type(layer))
        and type(layer).__name__ not in _FOREIGN_CODE
        and (function is None or _is_from_keras(function))
    )


def _is_from_keras(definition):
    return definition.__module__.partition(".")[0] == "keras"


class _Classes:
    """Union-find over the tensors of a graph, with what is known of each class."""

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
        """Lets the classes of `tensors` travel at S."""
        self._pinned.update(self._find(tensor) for tensor in tensors)

    def add_consumer(self, tensor, layer):
        consumers = self._consumers.setdefault(self._find(tensor), [])
        if layer not in consumers:
            consumers.append(layer)

    def add_passing(self, tensor, layer):
        self._passing.setdefault(self._find(tensor), []).append(layer)

    def consumers(self, tensor):
        """The consumers in the class of `tensor`, `None` if it travels at S."""
        root = self._find(tensor)
        consumers = self._consumers.get(root)
        return tuple(consumers) if consumers and root not in self._pinned else None

    def travels_at(self, tensor):
        """The layers at whose smallest scale the class of `tensor` travels, `None` for S."""
        consumers = self.consumers(tensor)
        return consumers and tuple(self._passing.get(self._find(tensor), ()) or consumers)
