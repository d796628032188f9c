"""All private members of Keras that this library uses, each with the reason.

In addition, `LossScaled` overrides `_maybe_build` and `_open_name_scope`: otherwise its layer
would be built at another time, and its weights would have other paths.
`tests/training/test_keras_internals.py` fails if a new Keras changes any of these members.
"""

import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src.backend.common import AutocastScope, get_autocast_scope, global_state, masking
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

from tf_adaptive_ls.backend import routes
from tf_adaptive_ls.backend.types import Tensor

__all__ = ["AutocastScope"]


def parts_of(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and all layers inside of it, at any depth.

    `layer.layers` exists only for models, and goes only one level deep.
    """
    return list(layer._flatten_layers())


# Modules of Keras whose layers have no state except their config and their variables. Other layers
# have vocabularies, functions, statistics, …, which Keras does not list.
_ALL_CONFIG = tuple(
    f"keras.src.layers.{name}." for name in ("activations", "merging", "pooling", "reshaping")
)


def is_all_config(layer: keras.layers.Layer) -> bool:
    """Whether a layer is fully described by its config, without any state.

    If this is not certain, it is false.
    """
    kind = type(layer)
    if not kind.__module__.startswith(_ALL_CONFIG) or layer.variables or len(parts_of(layer)) > 1:
        return False
    # `Layer.__new__` sets these two on every layer. Others were set by someone else.
    patched = vars(layer).keys() - {"build", "quantize"}
    return is_plain_keras_layer(layer) and not any(
        callable(getattr(kind, name, None)) for name in patched
    )


# Keras layers that run user code.
_FOREIGN_CODE = ("Lambda", "TFSMLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper")


def is_plain_keras_layer(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one of Keras's own, and runs only Keras's code."""
    functions = getattr(layer, "activation", None), vars(layer).get("call")
    return (
        is_from_keras(type(layer))
        and type(layer).__name__ not in _FOREIGN_CODE
        and all(function is None or is_from_keras(function) for function in functions)
    )


def is_from_keras(definition: Any) -> bool:
    """Whether Keras defines a class or function."""
    return definition.__module__.partition(".")[0] == "keras"


def layers_in(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers inside of a layer, one level deep, in whatever lists they are stored."""
    return list(layer._layers)


# Keras classes that do not define what a subclass computes.
_OPEN_CLASSES = ("Layer", "Model", "Functional", "Sequential", "Wrapper")


def computes_as_keras_does(layer: keras.layers.Layer) -> bool:
    """Whether a layer has a Keras class that computes something, or a subclass of one."""
    kind = next(kind for kind in type(layer).__mro__ if is_from_keras(kind))
    return kind.__name__ not in _OPEN_CLASSES


def may_be_trained(layer: keras.layers.Layer) -> bool:
    """Whether a layer has weights that are trainable unless the layer is frozen."""
    return any(map(own_weights, parts_of(layer)))


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights of a layer itself, without layers inside, that are trainable unless frozen."""
    return list(layer._trainable_variables)


def graph_of(model: keras.layers.Layer) -> keras.Model | None:
    """The Functional graph that a model runs, or `None`.

    A Sequential model creates a Functional model and runs it; there is no public access to it.
    """
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def nodes_of(graph: keras.Model) -> list[Any]:
    """The nodes (calls) of a Functional graph, in an order in which they can run.

    A layer knows its calls in all graphs, in `_inbound_nodes`. A graph shows its layers, but
    neither its calls nor the operations between layers.
    """
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input
    ]


def operations_of(layer: keras.layers.Layer) -> list[Any]:
    """The operations in the graph of a Functional model, including layers; otherwise none."""
    return list(getattr(layer, "_operations", ()))


def calls_of(operation: Any) -> list[Any]:
    """The list in which Keras records all calls of an operation on symbolic tensors."""
    return operation._inbound_nodes


def calls_after(operation: Any) -> list[Any]:
    """The list in which Keras records all calls that take outputs of an operation."""
    return operation._outbound_nodes


def node_of(tensor: Tensor) -> Any:
    """The node that a symbolic tensor comes from, or `None`."""
    history = getattr(tensor, "_keras_history", None)
    if history is None or history.operation is None:
        return None
    return history.operation._inbound_nodes[history.node_index]


def _no_mode(layer: keras.layers.Layer) -> None:
    return None


def _take_no_mode(layer: keras.layers.Layer, mode: object) -> None:
    pass


# A rematerialization mode for layers that Keras must not rematerialize, even if they are created in
# a `keras.RematScope`. A layer takes its mode from the scope, and has no argument for it.
_NEVER_REMATERIALIZED = property(_no_mode, _take_no_mode)


class StandIn(keras.layers.Wrapper):
    """A layer that acts for Keras as the layer inside of it."""

    # Keras may rematerialize the inner layer, but not this one.
    _remat_mode = _NEVER_REMATERIALIZED

    def _maybe_build(self, call_spec: Any) -> None:
        if not self.layer.built:
            build_for_call(self.layer, call_spec)
        self.built = True

    def _open_name_scope(self) -> contextlib.AbstractContextManager[None]:
        # The inner layer opens its own name scope, so weights have the same paths as without the
        # wrapper.
        return contextlib.nullcontext()


# The class that the mixin is combined with, for type checkers.
_Model: Any = object


class WithHiddenVariables(_Model):
    """Mixin for a model whose `summary` leaves out some trainable variables."""

    # What is recorded about the model's calls would be wrong in a second run. The layers inside may
    # be rematerialized.
    _remat_mode = _NEVER_REMATERIALIZED

    @property
    def shown_trainable_weights(self) -> list[keras.Variable]:
        """The trainable variables that `summary` counts."""
        raise NotImplementedError

    @property
    def _collected_trainable_weights(self) -> list[keras.Variable]:
        # `summary` counts this attribute if it exists.
        return self.shown_trainable_weights


def is_rematerialized(
    layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether Keras would rematerialize a call of a layer.

    It depends on the `keras.RematScope` in which the layer was created, which has no public access.
    Rematerializing only the activation does not count, because an activation is a function of its
    arguments alone.
    """

    def call() -> None:
        pass

    return any(
        mode.mode == "full"
        or part.name in mode.layer_names
        or (part is layer and _rematerialized(part, call, args, kwargs) is not call)
        for part, mode in _remat_modes(layer)
    )


def may_be_rematerialized(layer: keras.layers.Layer) -> bool:
    """Whether Keras may rematerialize a layer with everything inside of it."""
    mode = layer._remat_mode
    return mode is not None and (
        mode.mode in ("full", "larger_than") or layer.name in mode.layer_names
    )


def _rematerialized(
    layer: keras.layers.Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    # The `call` of the class, because the one of the object may be a route.
    return type(layer).rematerialized_call(layer, call, *args, **kwargs)


def rematerialized_unless_routed(
    layer: keras.layers.Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[..., Any]:
    """`call`, or its rematerialized version where Keras would use it."""
    if layer._remat_mode is None or id(layer) in _run_once.get():
        return call
    return _rematerialized(layer, call, args, kwargs)


# The `id` of each layer that Keras must not rematerialize in the current context.
_run_once: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    "run_once", default=frozenset()
)


@contextlib.contextmanager
def not_rematerialized(layer: keras.layers.Layer) -> Iterator[None]:
    """Context manager in which Keras does not rematerialize a layer or layers inside of it."""
    parts = [part for part, _ in _remat_modes(layer)]
    for part in parts:
        if "rematerialized_call" not in vars(part):
            # It stays, because other threads may be calling the same layer.
            routes.Route(part, "rematerialized_call", functools.partial(_unless_run_once, part))
    token = _run_once.set(_run_once.get().union(map(id, parts)))
    try:
        yield
    finally:
        _run_once.reset(token)


# The method of a batch normalization that computes its statistics.
MOMENTS = "_moments"


def route_moments(layer: keras.layers.Layer, run: Callable[..., Any]) -> None:
    """Routes the moments of a batch normalization through `run`, as a `Route` does."""
    if routes.route_of(layer, MOMENTS) is None:
        routes.Route(layer, MOMENTS, run)


def _remat_modes(layer: keras.layers.Layer) -> list[tuple[keras.layers.Layer, Any]]:
    """Pairs of a layer in `layer`, or `layer` itself, and its rematerialization mode."""
    modes = [(part, part._remat_mode) for part in parts_of(layer)]
    return [
        (part, mode)
        for part, mode in modes
        if mode and mode.mode != "activations" and id(part) not in _run_once.get()
    ]


def _unless_run_once(
    layer: keras.layers.Layer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    return args[0] if id(layer) in _run_once.get() else original(*args, **kwargs)


@contextlib.contextmanager
def computing_in_float32(model: keras.Model) -> Iterator[None]:
    """Context manager in which all layers of a model compute in float32 or wider.

    Functional models take float32 inputs in it, instead of casting them to a narrower dtype.
    """
    narrow = ("float16", "bfloat16")
    wide = keras.DTypePolicy("float32")
    parts = parts_of(model)
    graphs = [graph_of(part) for part in parts if isinstance(part, keras.Model)]
    inputs = [x for graph in graphs if graph is not None for x in graph.inputs]
    casting: list[Any] = [p for p in parts if isinstance(p, keras.layers.InputLayer)] + inputs
    casting = [(each, each._dtype) for each in casting if each._dtype in narrow]
    try:
        for each, _ in casting:
            each._dtype = "float32"
        with with_policies([(part, wide) for part in parts if part.compute_dtype in narrow]):
            yield
    finally:
        for each, dtype in casting:
            each._dtype = dtype


@contextlib.contextmanager
def with_policies(policies: list[tuple[keras.layers.Layer, Any]]) -> Iterator[None]:
    """Context manager in which layers have other dtype policies.

    The setter of `dtype_policy` is no use: it would write to a policy that layers share, a
    `DTypePolicyMap`, and cannot restore the policy of a quantized layer.

    Args:
        policies: List of pairs of a layer and its policy.
    """
    before = [(layer, layer._dtype_policy) for layer, _ in policies]
    try:
        for layer, policy in policies:
            layer._dtype_policy = policy
        yield
    finally:
        for layer, policy in before:
            layer._dtype_policy = policy


def make_float32(layers: list[keras.layers.Layer], model: keras.Model) -> list[Callable[[], None]]:
    """Makes layers compute in float32, without changing their weights, as `with_policies` does.

    Returns a list of functions that undo it.
    """

    def set_policy(layer: keras.layers.Layer, policy: Any) -> None:
        layer._dtype_policy = policy
        forget_compiled_functions(model)

    undo: list[Callable[[], None]] = [
        functools.partial(set_policy, layer, layer._dtype_policy) for layer in layers
    ]
    for layer in layers:
        set_policy(layer, keras.DTypePolicy("float32"))
    return undo


def make_inputs_float32(model: keras.Model) -> list[Callable[[], None]]:
    """Makes a Functional model take float32 inputs; returns a list of functions to undo it."""
    graph: Any = graph_of(model)
    layers = [each for each in layers_in(model) if isinstance(each, keras.layers.InputLayer)]
    inputs = [each for each in (*layers, *graph.inputs) if each._dtype in ("float16", "bfloat16")]
    undo: list[Callable[[], None]] = [
        functools.partial(setattr, each, "_dtype", each._dtype) for each in inputs
    ]
    for each in inputs:
        each._dtype = "float32"
    return undo


def forget_compiled_functions(model: keras.Model) -> None:
    """Makes a model, and the models inside of it, compile their steps again."""
    for part in parts_of(model):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None


def build_for_call(layer: keras.layers.Layer, call_spec: Any) -> None:
    """Builds a layer as a call would, whatever the signature of its `build` is.

    `layer.build` expects shapes under the names of its own arguments.
    """
    layer._maybe_build(call_spec)


def forget_losses(layer: keras.layers.Layer, losses: list[Any]) -> None:
    """Removes the losses of the last call from a layer and the layers inside of it.

    `_clear_losses` would also remove those of earlier calls.
    """
    forgotten = set(map(id, losses))
    for part in parts_of(layer):
        part._loss_ids -= forgotten


def allow_any_positional_arguments(layer: keras.layers.Layer) -> None:
    """Allows positional arguments that are not tensors in calls of a layer.

    Keras uses this flag in its own wrappers that take `*args`.
    """
    layer._allow_non_tensor_positional_args = True


def is_symbolic() -> bool:
    """Whether only shapes are being computed."""
    return in_symbolic_scope()


def autocast_scope_of_call(layer: keras.layers.Layer, casts: bool) -> Callable[..., Any] | None:
    """A function that makes the scope that `Layer.__call__` opens around a call, or `None`.

    Args:
        layer: A layer whose `autocast` is off, and which is being called.
        casts: Its original `autocast`.
    """
    scope = get_autocast_scope()
    if scope is None:
        return None
    dtype = scope.dtype
    if dtype is None and casts and keras.backend.is_float_dtype(layer.compute_dtype):
        dtype = layer.compute_dtype
    return lambda: AutocastScope(dtype)


def no_autocast() -> contextlib.AbstractContextManager[Any]:
    """Context manager in which variables are read in their own dtype.

    Outside of all scopes they are, too. In a scope without a dtype, every `Variable.dtype` reads as
    float32, so this opens one only where it must.
    """
    if get_autocast_scope() is None:
        return contextlib.nullcontext()
    return AutocastScope(None)


def copy_called_flag(model: keras.Model, other: keras.Model) -> None:
    """Marks a model as called if `other` was. Keras exports only called models to ONNX."""
    model._called = other._called


def converts_inputs(layer: keras.layers.Layer) -> bool:
    """Whether a call of a layer converts its inputs to tensors of its own dtype.

    A Functional model leaves this to its graph.
    """
    return bool(layer._convert_input_args)


def cast_inputs(
    layer: keras.layers.Layer, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Casts the tensors in the arguments of a call as `Layer.__call__` does."""

    def cast(x: Tensor) -> Tensor:
        mask = mask_of(x)
        y = layer.dtype_policy.convert_input(x, True, layer.input_dtype)
        if mask is not None and y is not x:
            set_mask(y, mask)
        return y

    return keras.tree.map_structure(cast, arguments) if layer._convert_input_args else arguments


def add_part(layer: keras.layers.Layer, name: str, part: keras.layers.Layer) -> None:
    """Sets `part` as an attribute of a layer, even if the layer is already built."""
    tracker = layer._tracker
    was_locked = tracker.locked
    tracker.unlock()
    setattr(layer, name, part)
    if was_locked:
        tracker.lock(tracker._lock_violation_msg)


def take_out(layer: keras.layers.Layer, name: str, part: keras.layers.Layer) -> None:
    """Undoes `add_part`."""
    if vars(layer).get(name) is part:
        delattr(layer, name)
        layer._tracker.untrack(part)


def move_variables_to(layer: keras.layers.Layer, other: keras.layers.Layer) -> None:
    """Gives the variables of a layer paths as if they belonged to another layer."""
    for variable in layer.variables:
        variable._path = f"{other.path or other.name}/{variable.name}"


def call_context() -> Any:
    """The current call-context arguments, such as `training`, that layers pass on to others."""
    return copy.copy(global_state.get_global_attribute(_CALL_CONTEXT))


@contextlib.contextmanager
def in_call_context(context: Any) -> Iterator[None]:
    """Context manager that restores what `call_context` returned."""
    before = global_state.get_global_attribute(_CALL_CONTEXT)
    global_state.set_global_attribute(_CALL_CONTEXT, copy.copy(context))
    try:
        yield
    finally:
        global_state.set_global_attribute(_CALL_CONTEXT, before)


_CALL_CONTEXT = "current_call_ctx"


def unpickled_model(file: Any) -> Any:
    """The model in a pickle."""
    return keras.Model._unpickle_model(file)


def own_value(variable: keras.Variable) -> Tensor | None:
    """The value of a variable outside of all scopes. `None` if it has none yet.

    Reading `value` inside a scope would ask the scope, or initialize the variable.
    """
    return variable._value


def mask_of(tensor: Tensor) -> Any:
    """The Keras mask of a tensor, or `None`.

    It is an attribute of the tensor, or, since JAX arrays have no attributes, in a table of Keras.
    """
    return masking.get_keras_mask(tensor)


def set_mask(tensor: Tensor, mask: Tensor) -> None:
    """Gives a tensor a Keras mask, see `mask_of`."""
    masking.set_keras_mask(tensor, mask)


def logits_of(tensor: Tensor) -> Any:
    """The logits that Keras has stored on the result of a softmax or sigmoid, or `None`.

    On TensorFlow, Keras's crossentropies use them.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Tensor, logits: Tensor) -> None:
    """Stores logits on a tensor, see `logits_of`."""
    tensor._keras_logits = logits


def arguments_of_compile(model: keras.Model) -> dict[str, Any]:
    """The arguments of the last call of `compile`, a dict.

    `get_compile_config` returns them serialized, which not every loss supports.
    """
    return dict(model._compile_config.config)


def variables_built_for(optimizer: Any) -> list[keras.Variable]:
    """The variables that an optimizer was built for, in order."""
    return list(optimizer._trainable_variables)


def track_variable(optimizer: Any, variable: keras.Variable) -> None:
    """Makes an existing variable the next variable of an optimizer.

    `add_variable` would create a new one.
    """
    optimizer._track_variable(variable)
