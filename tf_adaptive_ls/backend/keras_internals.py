"""All private members of Keras that this library uses, each with the reason.

`LossScaled` besides overrides `_maybe_build` and `_open_name_scope`, without which a wrapped
layer would be built at another time, and its weights be found under other paths.
`tests/training/test_keras_internals.py` tells what a new Keras has changed.
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
    """A layer and all layers inside it, at any depth.

    `layer.layers` is only there for models, and only one level deep.
    """
    return list(layer._flatten_layers())


# Where Keras's layers are whose config is all there is to them, unless they have variables. Other
# layers have tables (of a vocabulary), functions, statistics, … which Keras has no list of.
_ALL_CONFIG = tuple(
    f"keras.src.layers.{name}." for name in ("activations", "merging", "pooling", "reshaping")
)


def is_all_config(layer: keras.layers.Layer) -> bool:
    """Whether a layer is known to be what its config says, and to have no state.

    One that cannot be told to be so is taken not to be.
    """
    kind = type(layer)
    if not kind.__module__.startswith(_ALL_CONFIG) or layer.variables or len(parts_of(layer)) > 1:
        return False
    # `Layer.__new__` sets these two on every layer; others are somebody's patches.
    patched = vars(layer).keys() - {"build", "quantize"}
    return is_plain_keras_layer(layer) and not any(
        callable(getattr(kind, name, None)) for name in patched
    )


# Keras layers that run code Keras does not know.
_FOREIGN_CODE = ("Lambda", "TFSMLayer", "JaxLayer", "FlaxLayer", "TorchModuleWrapper")


def is_plain_keras_layer(layer: keras.layers.Layer) -> bool:
    """Whether a layer is one of Keras's own and runs only code of Keras."""
    functions = getattr(layer, "activation", None), vars(layer).get("call")
    return (
        is_from_keras(type(layer))
        and type(layer).__name__ not in _FOREIGN_CODE
        and all(function is None or is_from_keras(function) for function in functions)
    )


def is_from_keras(definition: Any) -> bool:
    """Whether a class or function is defined in Keras."""
    return definition.__module__.partition(".")[0] == "keras"


def layers_in(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers inside a layer, one level deep, whatever lists they are kept in."""
    return list(layer._layers)


# Classes of Keras that say nothing of what a subclass computes.
_OPEN_CLASSES = ("Layer", "Model", "Functional", "Sequential", "Wrapper")


def computes_as_keras_does(layer: keras.layers.Layer) -> bool:
    """Whether a layer is of a class of Keras that computes something, or of a subclass of such."""
    kind = next(kind for kind in type(layer).__mro__ if is_from_keras(kind))
    return kind.__name__ not in _OPEN_CLASSES


def may_be_trained(layer: keras.layers.Layer) -> bool:
    """Whether a layer has weights that are trainable, or would be if it were not frozen."""
    return any(map(own_weights, parts_of(layer)))


def own_weights(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The weights of a layer, not of others inside it, that are trainable if it is not frozen."""
    return list(layer._trainable_variables)


def graph_of(model: keras.layers.Layer) -> keras.Model | None:
    """The Functional graph that a model runs, or `None`.

    A Sequential model runs a Functional one that it makes, and shows it to nobody.
    """
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if hasattr(model, "_nodes_by_depth") else None


def nodes_of(graph: keras.Model) -> list[Any]:
    """The calls in a Functional graph, in an order in which they can be run.

    Layers know only all their calls, in whatever graph, in `_inbound_nodes`; a graph shows
    its layers, but neither its calls nor the operations between layers.
    """
    return [
        node
        for depth in sorted(graph._nodes_by_depth, reverse=True)
        for node in graph._nodes_by_depth[depth]
        if not node.is_input
    ]


def operations_of(layer: keras.layers.Layer) -> list[Any]:
    """The operations in the graph of a Functional model, layers among them; of others, none."""
    return list(getattr(layer, "_operations", ()))


def calls_of(operation: Any) -> list[Any]:
    """The list in which Keras keeps all calls of an operation on symbolic tensors."""
    return operation._inbound_nodes


def calls_after(operation: Any) -> list[Any]:
    """The list in which Keras keeps all calls that take what comes from an operation."""
    return operation._outbound_nodes


def node_of(tensor: Tensor) -> Any:
    """The call that a symbolic tensor comes from, or `None`."""
    history = getattr(tensor, "_keras_history", None)
    if history is None or history.operation is None:
        return None
    return history.operation._inbound_nodes[history.node_index]


def _no_mode(layer: keras.layers.Layer) -> None:
    return None


def _take_no_mode(layer: keras.layers.Layer, mode: object) -> None:
    pass


# The mode of what Keras shall not run once more in the backward pass, in whatever
# `keras.RematScope` it is made. A layer takes over the mode of that scope, and has no argument.
_NEVER_REMATERIALISED = property(_no_mode, _take_no_mode)


class StandIn(keras.layers.Wrapper):
    """A layer that is, as far as Keras can see, the layer that it is around."""

    # The layer may be run once more in the backward pass: what stands for it has to stay.
    _remat_mode = _NEVER_REMATERIALISED

    def _maybe_build(self, call_spec: Any) -> None:
        if not self.layer.built:
            build_for_call(self.layer, call_spec)
        self.built = True

    def _open_name_scope(self) -> contextlib.AbstractContextManager[None]:
        # The layer opens its own: paths of weights read as without a wrapper.
        return contextlib.nullcontext()


# What a mixin is mixed into, as far as types tell.
_Model: Any = object


class WithHiddenVariables(_Model):
    """Mixin for a model: some of its trainable variables are not to be summed up."""

    # What is known of its calls would not hold in the backward pass. Its layers may be run again.
    _remat_mode = _NEVER_REMATERIALISED

    @property
    def shown_trainable_weights(self) -> list[keras.Variable]:
        """Those that are."""
        raise NotImplementedError

    @property
    def _collected_trainable_weights(self) -> list[keras.Variable]:
        # What `summary` counts, if a model has it.
        return self.shown_trainable_weights


def is_rematerialised(
    layer: keras.layers.Layer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether Keras would run a call of a layer once more in the backward pass.

    As the `keras.RematScope` has it that it was made in, which it does not show. That of an
    activation alone, which takes all that it needs as arguments, does not count.
    """

    def call() -> None:
        pass

    return any(
        mode.mode == "full"
        or part.name in mode.layer_names
        or (part is layer and _rematerialised(part, call, args, kwargs) is not call)
        for part, mode in _remat_modes(layer)
    )


def may_be_rematerialised(layer: keras.layers.Layer) -> bool:
    """Whether Keras may run a layer once more, with all that is inside it."""
    mode = layer._remat_mode
    return mode is not None and (
        mode.mode in ("full", "larger_than") or layer.name in mode.layer_names
    )


def _rematerialised(
    layer: keras.layers.Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    # Of its class: its own may be a route.
    return type(layer).rematerialized_call(layer, call, *args, **kwargs)


def rematerialised_unless_held(
    layer: keras.layers.Layer,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[..., Any]:
    """`call`, or what runs it once more in the backward pass where Keras would have that."""
    if layer._remat_mode is None or id(layer) in _run_once.get():
        return call
    return _rematerialised(layer, call, args, kwargs)


# The `id` of layers that Keras shall not run once more, in the running context.
_run_once: contextvars.ContextVar[frozenset[int]] = contextvars.ContextVar(
    "run_once", default=frozenset()
)


@contextlib.contextmanager
def not_rematerialised(layer: keras.layers.Layer) -> Iterator[None]:
    """Keeps Keras from running a layer, or layers inside it, once more in the backward pass."""
    parts = [part for part, _ in _remat_modes(layer)]
    for part in parts:
        if "rematerialized_call" not in vars(part):
            # It stays: other threads may be in a call of the same layer.
            routes.Route(part, "rematerialized_call", functools.partial(_unless_run_once, part))
    token = _run_once.set(_run_once.get().union(map(id, parts)))
    try:
        yield
    finally:
        _run_once.reset(token)


# The method of a batch normalisation that computes its statistics.
MOMENTS = "_moments"


def lead_moments(layer: keras.layers.Layer, run: Callable[..., Any]) -> None:
    """From now on a batch normalisation asks `run` for its moments, as a `Route` does."""
    if routes.route_of(layer, MOMENTS) is None:
        routes.Route(layer, MOMENTS, run)


def _remat_modes(layer: keras.layers.Layer) -> list[tuple[keras.layers.Layer, Any]]:
    """Pairs of a layer in `layer`, or itself, and the mode in which Keras runs it once more."""
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
    """Makes all layers of a model that compute in less than float32 compute in that.

    And models that are graphs take inputs as they are, and do not cast them to such a dtype.
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
    """Gives layers other dtype policies for a while: pairs of a layer and its policy.

    The setter of `dtype_policy` would write to a policy that layers share, a `DTypePolicyMap`,
    and cannot undo a quantised one.
    """
    before = [(layer, layer._dtype_policy) for layer, _ in policies]
    try:
        for layer, policy in policies:
            layer._dtype_policy = policy
        yield
    finally:
        for layer, policy in before:
            layer._dtype_policy = policy


def made_float32(layers: list[keras.layers.Layer], model: keras.Model) -> list[Callable[[], None]]:
    """Makes layers compute in float32, from now on: a list of functions that undo it.

    Their weights stay. See `with_policies`.
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


def made_to_take_float32(model: keras.Model) -> list[Callable[[], None]]:
    """Makes a model that is a graph take inputs in float32, not in less: a list as above."""
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
    """Makes a model, and those in it, compile their steps anew."""
    for part in parts_of(model):
        if isinstance(part, keras.Model):
            part.train_function = part.test_function = part.predict_function = None


def build_for_call(layer: keras.layers.Layer, call_spec: Any) -> None:
    """Builds a layer as a call of it would, whatever signature its `build` has.

    `layer.build` wants to be told shapes by the names that it gives its arguments.
    """
    layer._maybe_build(call_spec)


def forget_losses(layer: keras.layers.Layer, losses: list[Any]) -> None:
    """Makes a layer, and layers inside it, forget losses that its call has added, and no others.

    `_clear_losses` would take those of earlier calls with them.
    """
    forgotten = set(map(id, losses))
    for part in parts_of(layer):
        part._loss_ids -= forgotten


def allow_any_positional_arguments(layer: keras.layers.Layer) -> None:
    """Lets a layer be called by position with what is not a tensor.

    Keras's own wrappers that take `*args`, and `Layer` for its subclasses, use a flag.
    """
    layer._allow_non_tensor_positional_args = True


def is_symbolic() -> bool:
    """Whether shapes alone are computed."""
    return in_symbolic_scope()


def autocast_scope_of_call(layer: keras.layers.Layer, casts: bool) -> Callable[..., Any] | None:
    """What makes the scope that `Layer.__call__` opens around a call, `None` for none.

    Args:
        layer: A layer whose `autocast` is off, in such a call of it.
        casts: What its `autocast` would be.
    """
    scope = get_autocast_scope()
    if scope is None:
        return None
    dtype = scope.dtype
    if dtype is None and casts and keras.backend.is_float_dtype(layer.compute_dtype):
        dtype = layer.compute_dtype
    return lambda: AutocastScope(dtype)


def no_autocast() -> contextlib.AbstractContextManager[Any]:
    """A scope in which variables are read in the dtype that they have.

    So they are without any scope, while one without a dtype calls all of them float32.
    """
    if get_autocast_scope() is None:
        return contextlib.nullcontext()
    return AutocastScope(None)


def take_as_called(model: keras.Model, other: keras.Model) -> None:
    """Lets a model count as called if `other` was: only then does Keras export to ONNX."""
    model._called = other._called


def converts_inputs(layer: keras.layers.Layer) -> bool:
    """Whether a call of a layer makes tensors of the dtype it wants of what it is given.

    A Functional model leaves that to its graph.
    """
    return bool(layer._convert_input_args)


def cast_inputs(
    layer: keras.layers.Layer, arguments: tuple[tuple[Any, ...], dict[str, Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Casts the tensors among the arguments of a call as `Layer.__call__` does."""

    def cast(x: Tensor) -> Tensor:
        mask = mask_of(x)
        y = layer.dtype_policy.convert_input(x, True, layer.input_dtype)
        if mask is not None and y is not x:
            set_mask(y, mask)
        return y

    return keras.tree.map_structure(cast, arguments) if layer._convert_input_args else arguments


def add_part(layer: keras.layers.Layer, name: str, part: keras.layers.Layer) -> None:
    """Makes `part` an attribute of a layer that may be built already."""
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
    """Lets the paths of a layer's variables read as if they were those of another."""
    for variable in layer.variables:
        variable._path = f"{other.path or other.name}/{variable.name}"


def call_context() -> Any:
    """What layers hand on to those that they call, such as `training`, as it is now."""
    return copy.copy(global_state.get_global_attribute(_CALL_CONTEXT))


@contextlib.contextmanager
def in_call_context(context: Any) -> Iterator[None]:
    """Makes what `call_context` returned hold."""
    before = global_state.get_global_attribute(_CALL_CONTEXT)
    global_state.set_global_attribute(_CALL_CONTEXT, copy.copy(context))
    try:
        yield
    finally:
        global_state.set_global_attribute(_CALL_CONTEXT, before)


_CALL_CONTEXT = "current_call_ctx"


def unpickled_model(file: Any) -> Any:
    """The model that a pickle holds as a file."""
    return keras.Model._unpickle_model(file)


def own_value(variable: keras.Variable) -> Tensor | None:
    """The value of a variable in no scope, `None` if it has none yet.

    Inside a scope, asking for `value` asks the scope, and would make one.
    """
    return variable._value


def mask_of(tensor: Tensor) -> Any:
    """The Keras mask of a tensor, or `None`.

    An attribute where tensors have attributes; JAX's have none, and Keras a table.
    """
    return masking.get_keras_mask(tensor)


def set_mask(tensor: Tensor, mask: Tensor) -> None:
    """Gives a tensor a Keras mask, see `mask_of`."""
    masking.set_keras_mask(tensor, mask)


def logits_of(tensor: Tensor) -> Any:
    """The logits that Keras has left on the result of a softmax or sigmoid, or `None`.

    On TensorFlow: its crossentropies compute from them.
    """
    return getattr(tensor, "_keras_logits", None)


def set_logits(tensor: Tensor, logits: Tensor) -> None:
    """Leaves logits on a tensor, see `logits_of`."""
    tensor._keras_logits = logits


def arguments_of_compile(model: keras.Model) -> dict[str, Any]:
    """What `compile` was called with, a dict.

    `get_compile_config` gives the same serialized, which not every loss can be.
    """
    return dict(model._compile_config.config)


def variables_built_for(optimizer: Any) -> list[keras.Variable]:
    """The variables that an optimizer was built for, in its order."""
    return list(optimizer._trainable_variables)


def track_variable(optimizer: Any, variable: keras.Variable) -> None:
    """Makes a variable that was made elsewhere the next of an optimizer.

    `add_variable` would make another.
    """
    optimizer._track_variable(variable)
