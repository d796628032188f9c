"""Traces a model by calling it on symbolic tensors.

Keras records every layer and operation that is called on a `KerasTensor`. The trace looks into
models and layers that are made of layers: their own `call` runs on the symbolic tensors, so
that the graph shows the calls inside. Where this is impossible, the layer is one opaque call.
"""

import contextvars
import dataclasses
import functools
import gc
import re
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_adaptive_ls.backend import arrays, keras_internals, routes
from tf_adaptive_ls.backend.keras_internals import calls_after, calls_of
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.models.calls import CallGraph, graph_call
from tf_adaptive_ls.training.call_tensors import is_inexact
from tf_adaptive_ls.training.noted_calls import noting

# Batch sizes to trace with, one after the other: code may need a number for the batch size, and
# some code needs an even one.
_BATCH_SIZES = (8, None)

_tracing: contextvars.ContextVar["_Trace | None"] = contextvars.ContextVar("trace", default=None)
# Traces run one at a time, because Keras records calls in the layers themselves.
_one_at_a_time = threading.RLock()


class NotTraceable(Exception):
    """The model's computation cannot be known before it runs.

    Args:
        reason: Why, as part of a sentence.
    """


def current() -> "_Trace | None":
    """The running `_Trace`, or `None`."""
    return _tracing.get()


class _Trace:
    """A running trace.

    Attributes:
        ends: Tensors that are used outside of the recorded calls.
        called: The scaled layers that were called, in order.
    """

    def __init__(self, opaque: dict[Any, Any]) -> None:
        self._opaque = opaque
        self._inside: dict[
            int, Any
            # by the `id` of a tensor outside of a traced layer: that tensor, and the tensor inside
        ] = {}
        self._times_called: dict[Any, int] = {}
        self.ends: list[Any] = []
        self.called: list[Any] = []

    def call_inside(
        self,
        layer: keras.layers.Layer,
        original: Callable[..., Any],
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Calls a layer that is made of layers on symbolic tensors.

        Args:
            layer: The layer.
            original: Its `call`.
            plain: Its `symbolic_call`.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            Its outputs.
        """
        self._times_called[id(layer)] = self._times_called.get(id(layer), 0) + 1
        if id(layer) in self._opaque:
            return plain(*args, **kwargs)
        try:
            outputs = original(*args, **kwargs)
            if not all(isinstance(leaf, keras.KerasTensor) for leaf in tree.flatten(outputs)):
                raise NotTraceable("it returns something else than tensors")
        except Exception as error:
            self._opaque[id(layer)] = _told(error)
            return plain(*args, **kwargs)
        return tree.map_structure(lambda tensor: self._outside(layer, tensor), outputs)

    def _outside(self, layer: keras.layers.Layer, tensor: Tensor) -> Tensor:
        # Keras will record in this copy that it comes from the layer.
        twin = keras.KerasTensor(tensor.shape, tensor.dtype)
        mask = keras_internals.mask_of(tensor)
        if mask is not None:
            keras_internals.set_mask(twin, mask)
        self._inside[id(twin)] = twin, tensor
        if layer.activity_regularizer is not None:
            self.ends.append(twin)
        return twin

    def is_looked_into(self, operation: Any) -> bool:
        return id(operation) in self._times_called and id(operation) not in self._opaque

    def key_of(self, tensor: Tensor) -> Any:
        """The key of a tensor. The output of a traced layer has the key that it has inside."""
        return id(self._within(tensor))

    def node_of(self, tensor: Tensor) -> Any:
        """The node that a tensor comes from. `None` for an input."""
        return keras_internals.node_of(self._within(tensor))

    def twins(self) -> list[Tensor]:
        """The tensors outside of traced layers that stand for tensors inside."""
        return [twin for twin, _ in self._inside.values()]

    def _within(self, tensor: Tensor) -> Tensor:
        while id(tensor) in self._inside:
            tensor = self._inside[id(tensor)][1]
        return tensor

    def called_often(self) -> list[Any]:
        """The `id` of each traced layer that was called more than once."""
        return [key for key, n in self._times_called.items() if n > 1 and key not in self._opaque]


def trace(
    layer: keras.layers.Layer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stands_for: Callable[..., Any],
) -> tuple[CallGraph, dict[int, str]]:
    """Traces a call of a model or layer.

    Args:
        layer: The model, or a layer that is made of layers. All must be built.
        original: Its `call`, a function `(*args, **kwargs)`.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        stands_for: Function from an operation to the one to record in the graph.

    Returns:
        The `CallGraph`, and a dict from the `id` of each opaque layer to the reason.

    Raises:
        NotTraceable: If the computation cannot be known.
    """
    with _one_at_a_time:
        for batch_size in _BATCH_SIZES:
            opaque: dict[int, Any] = {}
            try:
                # Layers that are called more than once get plans of their own.
                while True:
                    # Keras passes on call-context arguments such as `training` to all layers
                    # inside.
                    with keras_internals.in_call_context(keras_internals.call_context()):
                        graph, often = _traced(
                            layer, original, args, kwargs, stands_for, batch_size, opaque
                        )
                    if not often:
                        return graph, opaque
                    opaque.update((key, "it is called at several places") for key in often)
            except NotTraceable as error:
                reason = str(error)
            except Exception as error:
                reason = _told(error)
        raise NotTraceable(reason)


def _told(error: Exception) -> str:
    if isinstance(error, NotTraceable):
        return str(error)
    found = _KERAS_ADDS.match(str(error).strip())
    where, text = found.groups() if found else ("", str(error))
    text = text.partition("\n")[0]
    return f"{where + ': ' if where else ''}{type(error).__name__}: {text}"[:200]


# The words that Keras adds around the error message of a layer or operation.
_KERAS_ADDS = re.compile(
    r"(?:Exception encountered when calling (.*)\.call\(\)\.\s*)?(?:\x1b\[1m)?([^\x1b]*)"
)


def _traced(
    layer: keras.layers.Layer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    stands_for: Callable[..., Any],
    batch_size: int | None,
    opaque: dict[Any, Any],
) -> tuple[CallGraph, list[Any]]:
    parts = keras_internals.parts_of(layer)
    unbuilt = [part for part in parts if not part.built]
    state = _State(parts)
    refusals = [routes.Route(part, "_maybe_build", _refuse_to_build) for part in unbuilt]
    try:
        graph, often, tensors = _recorded(
            _Trace(opaque),
            state,
            original,
            tree.map_structure(lambda leaf: _symbolic(leaf, batch_size), (args, kwargs)),
            stands_for,
        )
        # A tensor that is still alive is referenced elsewhere: in an attribute, a list or a closure
        # of the model's author.
        if any(ref() is not None for _, ref in tensors):
            gc.collect()
        escaped = {key for key, ref in tensors if ref() is not None}
        return dataclasses.replace(graph, ends=(*graph.ends, *escaped)), often
    finally:
        for refusal in refusals:
            refusal.end()
        state.restore_attributes()


def _refuse_to_build(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if _tracing.get() is not None:
        raise NotTraceable("it builds layers while it runs")
    return original(*args, **kwargs)


def _recorded(
    running: _Trace,
    state: "_State",
    original: Callable[..., Any],
    arguments: tuple[tuple[Any, ...], dict[str, Any]],
    stands_for: Callable[..., Any],
) -> Any:
    """The `CallGraph`, the layers called more than once, and weak references to tensors by key."""
    token = _tracing.set(running)
    try:
        args, kwargs = arguments
        inputs = _symbolic_leaves(arguments)
        with keras.StatelessScope(), noting(running.called):
            outputs = _symbolic_leaves(original(*args, **kwargs))
        if not outputs:
            raise NotTraceable("it returns no tensor that depends on what it is given")
        ends = [*outputs, *filter(_is_symbolic, running.ends)]
        all_nodes = state.new_nodes()
        # Nodes of traced layers are replaced by the nodes inside.
        nodes = [node for node in all_nodes if not running.is_looked_into(node.operation)]
        nodes = _sorted(nodes, ends, running, state)
    finally:
        _tracing.reset(token)
        state.forget_nodes()
    for node in nodes:
        _check_shows_all(node.operation, node)
    key_of = running.key_of
    graph = CallGraph(
        [
            graph_call(node, stands_for(node.operation), key_of, _takes_values(node))
            for node in nodes
        ],
        tuple(map(key_of, inputs)),
        tuple(map(key_of, ends)),
        tuple(running.called),
    )
    seen = [*inputs, *running.twins(), *(x for node in nodes for x in node.output_tensors)]
    tensors = [(key_of(tensor), weakref.ref(tensor)) for tensor in seen]
    for node in [*nodes, *all_nodes]:
        _free(node)
    return graph, running.called_often(), tensors


def _symbolic(leaf: Any, batch_size: int | None) -> Any:
    if not ops.is_tensor(leaf) and not isinstance(leaf, np.ndarray):
        return leaf
    if len(arrays.dense_parts(leaf)[0]) > 1:
        raise NotTraceable("it is given a ragged or a sparse tensor")
    if not arrays.has_known_rank(leaf):
        raise NotTraceable("it is given a tensor of unknown rank")
    shape = tuple(leaf.shape)
    if shape and shape[0] is None:
        shape = (batch_size, *shape[1:])
    tensor = keras.KerasTensor(shape, keras.backend.standardize_dtype(leaf.dtype))
    mask = keras_internals.mask_of(leaf)
    if mask is not None:
        keras_internals.set_mask(tensor, _symbolic(mask, batch_size))
    return tensor


def _is_symbolic(leaf: Any) -> bool:
    return isinstance(leaf, keras.KerasTensor)


def _symbolic_leaves(structure: Any) -> list[Tensor]:
    return list(filter(_is_symbolic, tree.flatten(structure)))


def _sorted(nodes: list[Any], ends: list[Tensor], running: _Trace, state: "_State") -> list[Any]:
    """All nodes of a trace, each after the nodes whose outputs it takes."""
    order, seen = [], set()
    stack = [*reversed(nodes)]
    stack += [node for node in map(running.node_of, ends) if node is not None]
    stack = [(node, False) for node in stack]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            before = [running.node_of(tensor) for tensor in node.input_tensors]
            stack += [(other, False) for other in before if other is not None]
    # Operations outside of layers are found through the tensors that they take.
    followers = [
        follower
        for node in order
        for follower in state.new_nodes_after(node)
        if id(follower) not in seen and not running.is_looked_into(follower.operation)
    ]
    return _sorted([*order, *followers], [], running, state) if followers else order


def _check_shows_all(operation: Any, node: Any) -> None:
    """Raises `NotTraceable` if an operation calls functions, which may use tensors unseen."""
    if isinstance(operation, keras.layers.Layer):
        return
    leaves = tree.flatten((node.arguments.args, node.arguments.kwargs))
    if any(isinstance(x, _FUNCTIONS) for x in [*leaves, *vars(operation).values()]):
        raise NotTraceable(f"it uses `ops.{operation.name}`, which calls functions")


_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


def _takes_values(node: Any) -> bool:
    """Whether a node takes a variable, or a tensor that may be computed from one."""

    def is_value(leaf: Any) -> bool:
        if isinstance(leaf, keras.Variable):
            return True
        return not _is_symbolic(leaf) and is_inexact(leaf)

    return any(map(is_value, tree.flatten((node.arguments.args, node.arguments.kwargs))))


def _free(node: Any) -> None:
    """Frees the tensors of a node now, instead of leaving them to the garbage collector."""
    for tensor in node.outputs:
        vars(tensor).pop("_keras_history", None)
    node.outputs, node.arguments, node.operation = [], None, None


# Attributes that layers write while they run, and that need not be restored.
_OF_KERAS = frozenset(
    ["_inbound_nodes", "_outbound_nodes", "_losses", "_loss_ids", "_called", "built"]
)


class _State:
    """What layers recorded before a trace, to be restored after it."""

    def __init__(self, parts: list[keras.layers.Layer]) -> None:
        operations = [each for part in parts for each in keras_internals.operations_of(part)]
        everything = {id(each): each for each in [*parts, *operations]}.values()
        self._nodes = [(e, len(calls_of(e)), len(calls_after(e))) for e in everything]
        self._attributes = [
            (part, {name: (value, _size(value)) for name, value in vars(part).items()})
            for part in parts
            if not keras_internals.is_from_keras(type(part))
        ]

    def new_nodes(self) -> list[Any]:
        """The nodes of calls made during the trace."""
        return [node for each, number, _ in self._nodes for node in calls_of(each)[number:]]

    def new_nodes_after(self, node: Any) -> list[Any]:
        """The new nodes that take an output of `node`'s operation."""
        outbound = calls_after(node.operation)
        known = (number for each, _, number in self._nodes if each is node.operation)
        return outbound[next(known, 0) :]

    def forget_nodes(self) -> None:
        for each, inbound, outbound in self._nodes:
            del calls_of(each)[inbound:]
            del calls_after(each)[outbound:]

    def restore_attributes(self) -> None:
        for part, before in self._attributes:
            now = vars(part)
            for name in [name for name in now if name not in before and name not in _OF_KERAS]:
                del now[name]
            for name, (value, size) in before.items():
                if name in _OF_KERAS:
                    continue
                if size is not None and len(value) > size:
                    del value[size:]
                if now.get(name) is not value:
                    now[name] = value


def _size(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None
