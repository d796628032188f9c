"""Custom gradients, recorded operations, and running a function again for its gradients."""

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


def custom_gradient(
    function: Callable[..., Any], constants: Sequence[Tensor] = ()
) -> Callable[..., Any]:
    """Custom gradient of `function(constants, *inputs)` by `inputs`.

    TensorFlow gathers all inputs of such a function in one `IdentityN` node, so that
    even inference would compute `constants`, which only the backward pass needs: there
    they must not be inputs. JAX does not let the backward pass close over anything
    that depends on what is differentiated: there they must be.
    """
    if keras.backend.backend() != "jax":
        differentiable = keras.ops.custom_gradient(lambda *inputs: function(constants, *inputs))
        return lambda *inputs: _left_to_graph(differentiable(*map(_of_this_graph, inputs)))

    def with_constants(*all_inputs: Any) -> Any:
        given, inputs = all_inputs[: len(constants)], all_inputs[len(constants) :]
        outputs, backward = function(given, *inputs)
        zeros = [keras.ops.zeros_like(constant) for constant in given]

        def backward_of_all(*gradients: Any) -> Any:
            if isinstance(gradients[0], (list, tuple)):  # those of several outputs come as one
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
    """The gradient by `value` of what a function makes of it, from that of the result.

    Args:
        function: Function of a tensor to a tensor.
        value: The former.
        gradient: Tensor like the latter.
    """
    if keras.backend.backend() == "jax":
        import jax

        (result,) = jax.vjp(function, value)[1](gradient)
        return result
    import tensorflow as tf

    value = tf.convert_to_tensor(value)  # it may be a variable
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(value)
        result = function(value)
    return tape.gradient(result, value, output_gradients=gradient)


def _of_this_graph(tensor: Tensor) -> Tensor:
    """A tensor in the graph that is being built: in a branch of a conditional it may be of another.

    TensorFlow wants all outputs of a custom gradient in one graph.
    """
    import tensorflow as tf

    if tf.executing_eagerly() or getattr(tensor, "graph", None) is tf.compat.v1.get_default_graph():
        return tensor
    return tf.identity(tensor)


def _is_of_forward_mode(error: Exception) -> bool:
    """Whether JAX says that a function with a backward rule is computed in forward mode."""
    return "forward-mode" in str(error)


def _left_to_graph(outputs: Any) -> Any:
    """The outputs of a custom gradient, after `leave_gradients_to_graph` for it alone."""
    if builds_graph():
        _leave_gradient_to_graph(keras.tree.flatten(outputs)[0].op)
    return outputs


def is_recorded() -> bool:
    """Whether operations are recorded, should somebody want gradients.

    Not so inside the first run of a rematerialised function on TensorFlow, which has no public
    way to ask.
    """
    if keras.backend.backend() != "tensorflow":
        return True
    from tensorflow.python import pywrap_tfe

    return not pywrap_tfe.TFE_Py_TapeSetIsStopped()


def is_differentiated(tensors: Sequence[Tensor], others: Sequence[Tensor] = ()) -> bool:
    """Whether gradients by one of several tensors are known to be wanted.

    On TensorFlow of what is recorded at present: of a graph that is called in a tape that was not
    there when it was built, nothing is known. On JAX of all but what runs once more or in a loop.

    Args:
        tensors: List of tensors.
        others: On JAX, more of them, without which it cannot be told of those that nothing is
            wanted of them.
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
    """Of each of several tensors, whether anybody may want gradients by it, now or later.

    On TensorFlow that is never known; on JAX of all but what runs once more or in a loop. As
    `is_differentiated`.
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
    """A context that sees which variables are read in it, other than through a scope of Keras.

    On TensorFlow; elsewhere no gradient comes to a variable that is not among the arguments.

    Args:
        known: List of values that may be read: those of variables, and others.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        self._watcher: Any = None
        # Of `tf.distribute` there is one on every device.
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
        """The names of trainable `tf.Variable`s that were read: a list."""
        read = () if self._watcher is None else self._watcher.watched_variables()
        return [variable.name for variable in read if id(variable) not in self._known]

    def is_outside(self) -> bool:
        """Whether a function is being traced that was not when the context was entered.

        Such a `tf.function` remembers what it reads, if it is no variable, for good. Bodies of
        loops and branches are built anew.
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
    """Which tensors no gradient of what a function returns comes to: a list of booleans.

    Args:
        function: Function without arguments to a list of tensors, of TensorFlow.
        tensors: List of tensors and `tf.Variable`s.
        others: List of other tensors that gradients are taken by.
    """
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch([*tensors, *others])
        results = function()
    # Recorded by tapes around it: a `tf.custom_gradient` may use a tape of its own in there.
    return [gradient is None for gradient in tape.gradient(results, tensors)]


def gradients_end_at_variables() -> bool:
    """Whether code of somebody else may define gradients by variables, not by values."""
    return keras.backend.backend() == "tensorflow"


def gradients_end_at_assignments() -> bool:
    """Whether a variable that is assigned to has the gradient of its new value from then on.

    Otherwise, as on JAX, where there are only values, it has that of what it was before.
    """
    return keras.backend.backend() == "tensorflow"


def rematerialised(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is run once more in the backward pass, instead of keeping what it needs.

    Args:
        function: Function of floating-point tensors to a pair: a list of such, which have
            gradients by the arguments and by nothing else, and a structure of anything else,
            without.
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


def run_again_from(
    function: Callable[..., Any],
    keep: Callable[[Sequence[Tensor]], Any],
    restore: Callable[[Any], list[Tensor]],
) -> Callable[..., Any]:
    """As `rematerialised`, but the second run is on what can be made of what was kept.

    Args:
        function: As that of `rematerialised`. On JAX what it closes over has no gradients.
        keep: Function of the arguments, a list, to a structure of tensors.
        restore: Function of that to the arguments, or what is near them.
    """
    if keras.backend.backend() == "jax":
        return _run_again_on_jax(function, keep, restore)
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
    """What was kept, known to TensorFlow only once gradients are, if it is of 8 bits.

    It would run again, and keep what comes of it, as soon as it can. XLA does not look at control
    dependencies, but takes no number for equal to itself that may be NaN. If it is, all bits are
    set, which is NaN in 8 bits, too.
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


def _run_again_on_jax(
    function: Callable[..., Any], keep: Callable[..., Any], restore: Callable[..., Any]
) -> Callable[..., Any]:
    import jax

    def forward(*tensors: Any) -> tuple[Any, Any]:
        return function(*tensors), keep(tensors)

    def backward(kept: Any, gradients: Any) -> Any:
        # Otherwise XLA would restore all in the forward pass, and keep that.
        kept, of_results = jax.lax.optimization_barrier((kept, gradients[0]))
        return jax.vjp(lambda *tensors: function(*tensors)[0], *restore(kept))[1](of_results)

    differentiable: Any = jax.custom_vjp(lambda *tensors: function(*tensors))
    differentiable.defvjp(forward, backward)
    return differentiable


def leave_gradients_to_graph() -> None:
    """Lets custom gradients in the graph that is being built live as long as it, and no longer.

    TensorFlow keeps the backward pass of every custom gradient in a graph for good, and with it
    the graph and all that its model is made of: a program that builds many models runs out of
    memory. Keras's optimizers make such gradients when they reduce over replicas.
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
    # There is no public way to take a gradient out of the registry, where it is looked up by
    # name whenever its graph is differentiated.
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
    """A function that lives as long as others refer to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = weakref.ref(function)

    def __call__(self, *args: Any) -> list[Tensor | None]:
        function = self._function()
        assert function is not None
        return function(*args)


def value_and_gradients(
    function: Callable[..., Any], tensors: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """The value of a function, and its gradients by its arguments.

    Args:
        function: Function of a list of tensors to a scalar tensor.
        tensors: The list.

    Returns:
        The value, and a list of gradients; zeros for a tensor that it does not depend on.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.value_and_grad(function)(tensors)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(tensors)
    found = tape.gradient(value, tensors, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    return value, [tf.convert_to_tensor(gradient) for gradient in found]  # of embeddings: sparse
