"""Custom gradients, what is recorded for gradients, and rematerialization."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


def custom_gradient(
    function: Callable[..., Any], constants: Sequence[Tensor] = ()
) -> Callable[..., Any]:
    """`function(constants, *inputs)` with a custom gradient for `inputs`.

    On TensorFlow, all inputs of such a function go through one `IdentityN` node. If `constants`
    were inputs, even inference would compute them, although only the backward pass needs them. On
    JAX, the backward pass must not close over values that depend on differentiated values, so
    `constants` are inputs there.
    """
    if keras.backend.backend() != "jax":
        differentiable = keras.ops.custom_gradient(lambda *inputs: function(constants, *inputs))
        return lambda *inputs: _left_to_graph(differentiable(*map(_of_this_graph, inputs)))

    def with_constants(*all_inputs: Any) -> Any:
        given, inputs = all_inputs[: len(constants)], all_inputs[len(constants) :]
        outputs, backward = function(given, *inputs)
        zeros = [keras.ops.zeros_like(constant) for constant in given]

        def backward_of_all(*gradients: Any) -> Any:
            # the gradients of several outputs come as one argument
            if isinstance(gradients[0], (list, tuple)):
                (gradients,) = gradients
            return (*zeros, *backward(*gradients))

        return outputs, backward_of_all

    differentiable = keras.ops.custom_gradient(with_constants)

    def in_reverse_mode(*inputs: Any) -> Any:
        try:
            return differentiable(*constants, *inputs)
        except TypeError as error:
            if not _is_of_forward_mode(error):
                raise
            raise NotImplementedError(
                "Expected gradients through a LossScaled layer to be taken in reverse mode, as by "
                "`jax.grad` or `jax.jacrev`. Received: forward mode, as of `jax.jvp` or "
                "`jax.jacfwd`. Run the forward pass it belongs to inside "
                "`with tf_adaptive_ls.neutral_scales():`."
            ) from error

    return in_reverse_mode


def pulled_back(function: Callable[[Tensor], Tensor], value: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of the argument of a function, given the gradient of its result.

    Args:
        function: Function from a tensor to a tensor.
        value: The argument.
        gradient: The gradient of the result, a tensor like it.
    """
    if keras.backend.backend() == "jax":
        import jax

        (result,) = jax.vjp(function, value)[1](gradient)
        return result
    import tensorflow as tf

    value = tf.convert_to_tensor(value)  # `value` may be a variable
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(value)
        result = function(value)
    return tape.gradient(result, value, output_gradients=gradient)


def _of_this_graph(tensor: Tensor) -> Tensor:
    """A tensor in the graph that is being built. In a branch of a conditional, it may be outside.

    TensorFlow requires all outputs of a custom gradient to be in one graph.
    """
    import tensorflow as tf

    if tf.executing_eagerly() or getattr(tensor, "graph", None) is tf.compat.v1.get_default_graph():
        return tensor
    return tf.identity(tensor)


def _is_of_forward_mode(error: Exception) -> bool:
    """Whether an error of JAX says that forward mode met a custom backward pass."""
    return "forward-mode" in str(error)


def _left_to_graph(outputs: Any) -> Any:
    """The outputs of a custom gradient, after `leave_gradients_to_graph` for this gradient only."""
    if builds_graph():
        _leave_gradient_to_graph(keras.tree.flatten(outputs)[0].op)
    return outputs


def is_recorded() -> bool:
    """Whether TensorFlow records operations for gradients at the moment.

    During the first run of a rematerialized function, it does not. There is no public way to ask.
    """
    if keras.backend.backend() != "tensorflow":
        return True
    from tensorflow.python import pywrap_tfe

    return not pywrap_tfe.TFE_Py_TapeSetIsStopped()


def is_differentiated(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> bool:
    """Whether gradients of one of several tensors are known to be needed.

    On TensorFlow, this looks at the tapes that record now. It is not known whether a graph will
    later be called inside another tape. On JAX, it is true of everything that is rematerialized or
    in a loop.

    Args:
        tensors: List of tensors.
        others: Used on JAX: list of other tensors. If their gradients are needed, it is known
            which gradients of `tensors` are not.
    """
    if not tensors:
        return False
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf
        from tensorflow.python.eager import record

        known = [tensor for tensor in tensors if isinstance(tensor, tf.Tensor)]
        return len(known) < len(tensors) or record.should_record_backprop(known)
    return any(may_be_differentiated(tensors, others))


def may_be_differentiated(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> list[bool]:
    """For each of several tensors, whether its gradient may be needed now or later.

    The arguments are as in `is_differentiated`. On TensorFlow, the answer is always yes.
    """
    if keras.backend.backend() == "tensorflow" or not tensors:
        return [True] * len(tensors)
    import jax

    found: list[bool] = []

    def unchanged(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def forward(*tensors: Any) -> tuple[tuple[Tensor, ...], None]:
        found.extend(tensor.perturbed for tensor in tensors)
        return tuple(tensor.value for tensor in tensors), None

    identity: Any = jax.custom_vjp(unchanged)
    identity.defvjp(forward, lambda _, gradients: gradients, symbolic_zeros=True)
    try:
        identity(*tensors, *others)
    except TypeError as error:
        if not _is_of_forward_mode(error):
            raise
        found.clear()
    return found[: len(tensors)] or [True] * len(tensors)


class ReadsOfVariables:
    """Context manager that detects reads of variables that bypass Keras's scopes.

    It does so on TensorFlow. On JAX, only arguments can have gradients, so it has nothing to do.

    Args:
        known: List of values that may be read: of variables and others.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        self._watcher: Any = None
        # With `tf.distribute`, a variable has one component per device.
        values = [getattr(value, "values", ()) for value in known]
        parts = itertools.chain(*(each for each in values if isinstance(each, tuple)))
        self._known = set(map(id, [*known, *parts]))
        self._graph = _graph_being_built()

    def __enter__(self) -> "ReadsOfVariables":
        if keras.backend.backend() == "tensorflow":
            from tensorflow.python.eager import record

            self._watcher = record.VariableWatcher()
            self._watcher.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._watcher is not None:
            self._watcher.__exit__(*exception)

    @property
    def names(self) -> list[str]:
        """List of the names of the trainable `tf.Variable`s that were read."""
        read = () if self._watcher is None else self._watcher.watched_variables()
        return [variable.name for variable in read if id(variable) not in self._known]

    def is_outside(self) -> bool:
        """Whether a function is being traced that was not yet when the context was entered.

        Such a `tf.function` keeps the values it reads as constants, unless they are variables.
        Bodies of loops and branches do not count, because they are built on each trace.
        """
        graph = _graph_being_built()
        while graph is not None and graph is not self._graph:
            if not _is_control_flow(graph):
                return True
            graph = getattr(graph, "outer_graph", None)
        return False


def _graph_being_built() -> Any:
    if not builds_graph():
        return None
    import tensorflow as tf

    return tf.compat.v1.get_default_graph()


def _is_control_flow(graph: Any) -> bool:
    from tensorflow.python.ops import control_flow_v2_func_graphs

    return isinstance(graph, control_flow_v2_func_graphs.ControlFlowFuncGraph)


def independent(
    function: Callable[..., Any], tensors: Sequence[Tensor], others: Sequence[Tensor]
) -> list[bool]:
    """For each tensor, whether no gradient of what `function` returns reaches it: list of booleans.

    Args:
        function: Function without arguments that returns a list of TensorFlow tensors.
        tensors: List of tensors and `tf.Variable`s.
        others: List of other tensors to differentiate by.
    """
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([*tensors, *others])
        results = function()
    # Outer tapes record this: the function may contain a `tf.custom_gradient` that uses a tape.
    return [gradient is None for gradient in tape.gradient(results, tensors)]


def gradients_end_at_variables() -> bool:
    """Whether user code can define gradients of variables instead of values."""
    return keras.backend.backend() == "tensorflow"


def gradients_end_at_assignments() -> bool:
    """Whether the gradient of an assigned variable is the gradient of its new value.

    On JAX, it is the gradient of the value before the assignment.
    """
    return keras.backend.backend() == "tensorflow"


def rematerialized(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs again in the backward pass instead of saving intermediate results.

    Args:
        function: Function of floating-point tensors. It returns a list of floating-point tensors,
            whose gradients only depend on the arguments, and any other structure, which has no
            gradients.
    """
    if keras.backend.backend() != "tensorflow":
        return keras.remat(function)

    def compute(*tensors: Tensor) -> tuple[list[Tensor], Any]:
        others = []

        def differentiable(*tensors: Tensor) -> list[Tensor]:
            results, other = function(*tensors)
            others.append(other)
            return results

        results = keras.remat(differentiable)(*tensors)
        return list(_left_to_graph(results)), others[0]

    return compute


def rematerialized_from(
    function: Callable[..., Any],
    keep: Callable[[Sequence[Tensor]], Any],
    restore: Callable[[Any], list[Tensor]],
) -> Callable[..., Any]:
    """Like `rematerialized`, but saves something else than the arguments.

    Args:
        function: As in `rematerialized`. On JAX, what it closes over has no gradients.
        keep: Function from the list of arguments to a structure of tensors to save.
        restore: Function from this structure to the arguments, or approximations of them.
    """
    if keras.backend.backend() == "jax":
        return _rematerialized_on_jax(function, keep, restore)
    import tensorflow as tf

    def compute(*tensors: Tensor) -> tuple[list[Tensor], Any]:
        others = []

        def differentiable(*tensors: Tensor) -> tuple[list[Tensor], Callable[..., Any]]:
            results, other = function(*tensors)
            others.append(other)
            kept = keep(tensors)

            def backward(*gradients: Tensor) -> list[Tensor | None]:
                values = restore(_not_before(gradients, kept))
                with tf.GradientTape(watch_accessed_variables=False) as tape:
                    tape.watch(values)
                    again, _ = function(*values)
                return tape.gradient(again, values, output_gradients=list(gradients))

            return results, backward

        results = tf.custom_gradient(differentiable)(*map(_of_this_graph, tensors))
        return list(_left_to_graph(results)), others[0]

    return compute


def _not_before(gradients: Sequence[Tensor], kept: Any) -> Any:
    """Makes saved 8-bit tensors depend on gradients, so that only the backward pass uses them.

    Otherwise TensorFlow runs the function again, and saves its results, as soon as possible. XLA
    ignores control dependencies, but it cannot assume that a number equals itself, since it may be
    NaN. In this case all bits are set, which is NaN in 8 bits, too.
    """
    import tensorflow as tf

    if tf.executing_eagerly():
        return kept
    first = tf.reshape(gradients[0], [-1])[:1]
    known = tf.reduce_all(tf.equal(first, first))

    def wait(x: Tensor) -> Tensor:
        if x.dtype != tf.uint8:
            return x
        return tf.where(known, x, tf.constant(x.dtype.max, x.dtype))

    return tf.nest.map_structure(wait, kept)


def _rematerialized_on_jax(
    function: Callable[..., Any], keep: Callable[..., Any], restore: Callable[..., Any]
) -> Callable[..., Any]:
    import jax

    def forward(*tensors: Any) -> tuple[Any, Any]:
        return function(*tensors), keep(tensors)

    def backward(kept: Any, gradients: Any) -> Any:
        # Otherwise XLA would restore everything during the forward pass, and keep it.
        kept, of_results = jax.lax.optimization_barrier((kept, gradients[0]))
        return jax.vjp(lambda *tensors: function(*tensors)[0], *restore(kept))[1](of_results)

    differentiable: Any = jax.custom_vjp(lambda *tensors: function(*tensors))
    differentiable.defvjp(forward, backward)
    return differentiable


def leave_gradients_to_graph() -> None:
    """Ties the lifetime of all custom gradients of the graph that is being built to the graph.

    TensorFlow keeps the backward function of each custom gradient in a graph forever. It refers to
    the graph, and through it to the model, so a program that builds many models would run out of
    memory. Keras's optimizers create such gradients when they reduce over replicas.
    """
    if builds_graph():
        import tensorflow as tf

        for operation in tf.compat.v1.get_default_graph().get_operations():
            _leave_gradient_to_graph(operation)


def builds_graph() -> bool:
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def _leave_gradient_to_graph(operation: Any) -> None:
    # There is no public way to remove a gradient from the registry, where TensorFlow looks it up by
    # name each time it differentiates the graph.
    from tensorflow.python.framework import ops

    registered = ops.gradient_registry._registry
    try:
        name = operation.get_attr("_gradient_op_type").decode()
    except ValueError:
        return  # not a custom gradient
    backward = registered[name]["type"]
    if isinstance(backward, _WeakFunction):
        return
    registered[name]["type"] = _WeakFunction(backward)
    operation.graph.add_to_collection("tf_adaptive_ls", backward)
    weakref.finalize(operation.graph, registered.pop, name, None)


class _WeakFunction:
    """Calls a function that it refers to weakly."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = weakref.ref(function)

    def __call__(self, *args: Any) -> list[Tensor | None]:
        function = self._function()
        assert function is not None
        return function(*args)


def value_and_gradients(
    function: Callable[..., Any], tensors: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The value of a function, and its gradients.

    Args:
        function: Function from a list of tensors to a scalar tensor.
        tensors: The list.

    Returns:
        The value, and the list of gradients. The gradient of a tensor that the value does not
        depend on is zero.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.value_and_grad(function)(tensors)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(tensors)
    found = tape.gradient(value, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    # gradients of embeddings are sparse
    return value, [tf.convert_to_tensor(gradient) for gradient in found]
