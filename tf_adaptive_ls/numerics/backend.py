"""What Keras has no neutral name for: all that depends on the backend is here."""

import contextlib
import functools
import itertools
import math
import os
import re
import weakref
from typing import Any, TypeAlias

import keras
import numpy as np

if keras.backend.backend() not in ("tensorflow", "jax"):
    raise ImportError(
        "Expected Keras on TensorFlow or JAX. Received: Keras on the backend "
        f"'{keras.backend.backend()}'. Set KERAS_BACKEND=tensorflow or KERAS_BACKEND=jax "
        "before Keras is imported."
    )

# One of whichever backend computes; also a NumPy array, where nothing is differentiated.
Tensor: TypeAlias = Any


def custom_gradient(function, constants=()):
    """Custom gradient of `function(constants, *inputs)` by `inputs`.

    TensorFlow gathers all inputs of such a function in one `IdentityN` node, so that
    even inference would compute `constants`, which only the backward pass needs: there
    they must not be inputs. JAX does not let the backward pass close over anything
    that depends on what is differentiated: there they must be.
    """
    if keras.backend.backend() != "jax":
        differentiable = keras.ops.custom_gradient(lambda *inputs: function(constants, *inputs))
        return lambda *inputs: _left_to_graph(differentiable(*map(_of_this_graph, inputs)))

    @keras.ops.custom_gradient
    def with_constants(*all_inputs):
        given, inputs = all_inputs[: len(constants)], all_inputs[len(constants) :]
        outputs, backward = function(given, *inputs)
        zeros = [keras.ops.zeros_like(constant) for constant in given]
        return outputs, lambda *gradients: (*zeros, *backward(*gradients))

    def in_reverse_mode(*inputs):
        try:
            return with_constants(*constants, *inputs)
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


def _of_this_graph(tensor):
    """A tensor in the graph that is being built: in a branch of a conditional it may be of another.

    TensorFlow wants all outputs of a custom gradient in one graph.
    """
    import tensorflow as tf

    if tf.executing_eagerly() or getattr(tensor, "graph", None) is tf.compat.v1.get_default_graph():
        return tensor
    return tf.identity(tensor)


def _is_of_forward_mode(error):
    """Whether JAX says that a function with a backward rule is computed in forward mode."""
    return "forward-mode" in str(error)


def _left_to_graph(outputs):
    """The outputs of a custom gradient, after `leave_gradients_to_graph` for it alone."""
    if _builds_graph():
        _leave_gradient_to_graph(keras.tree.flatten(outputs)[0].op)
    return outputs


def is_recorded():
    """Whether operations are recorded, should somebody want gradients.

    Not so inside the first run of a rematerialised function on TensorFlow, which has no public
    way to ask.
    """
    if keras.backend.backend() != "tensorflow":
        return True
    from tensorflow.python import pywrap_tfe

    return not pywrap_tfe.TFE_Py_TapeSetIsStopped()


def is_differentiated(tensors, others=()):
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
    import jax

    found = []

    @jax.custom_vjp
    def identity(*tensors):
        return tensors

    def forward(*tensors):
        found.extend(tensor.perturbed for tensor in tensors)
        return tuple(tensor.value for tensor in tensors), None

    identity.defvjp(forward, lambda _, gradients: gradients, symbolic_zeros=True)
    try:
        identity(*tensors, *others)
    except TypeError as error:
        if not _is_of_forward_mode(error):
            raise
        return True
    return any(found[: len(tensors)]) if found else True


class ReadsOfVariables:
    """A context that sees which variables are read in it, other than through a scope of Keras.

    On TensorFlow; elsewhere no gradient comes to a variable that is not among the arguments.

    Args:
        known: List of values that may be read: those of variables, and others.
    """

    def __init__(self, known=()):
        self._watcher = None
        # Of `tf.distribute` there is one on every device.
        parts = [getattr(value, "values", ()) for value in known]
        parts = itertools.chain(*(each for each in parts if isinstance(each, tuple)))
        self._known = set(map(id, [*known, *parts]))
        self._graph = _graph_being_built()

    def __enter__(self):
        if keras.backend.backend() == "tensorflow":
            from tensorflow.python.eager import record

            self._watcher = record.VariableWatcher()
            self._watcher.__enter__()
        return self

    def __exit__(self, *exception):
        if self._watcher is not None:
            self._watcher.__exit__(*exception)

    @property
    def names(self):
        """The names of trainable `tf.Variable`s that were read: a list."""
        read = () if self._watcher is None else self._watcher.watched_variables()
        return [variable.name for variable in read if id(variable) not in self._known]

    def is_outside(self):
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


def _graph_being_built():
    if not _builds_graph():
        return None
    import tensorflow as tf

    return tf.compat.v1.get_default_graph()


def _is_control_flow(graph):
    from tensorflow.python.ops import control_flow_v2_func_graphs

    return isinstance(graph, control_flow_v2_func_graphs.ControlFlowFuncGraph)


def independent(function, tensors, others):
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


def gradients_end_at_variables():
    """Whether code of somebody else may define gradients by variables, not by values."""
    return keras.backend.backend() == "tensorflow"


def gradients_end_at_assignments():
    """Whether a variable that is assigned to has the gradient of its new value from then on.

    Otherwise, as on JAX, where there are only values, it has that of what it was before.
    """
    return keras.backend.backend() == "tensorflow"


def only_values():
    """Whether a conditional may not update variables, as on JAX, but has to return new values."""
    return keras.backend.backend() != "tensorflow"


def rematerialised(function):
    """A function that is run once more in the backward pass, instead of keeping what it needs.

    Args:
        function: Function of floating-point tensors to a pair: a list of such, which have
            gradients by the arguments and by nothing else, and a structure of anything else,
            without.
    """
    if keras.backend.backend() != "tensorflow":
        return keras.remat(function)

    def compute(*tensors):
        others = []

        def differentiable(*tensors):
            results, other = function(*tensors)
            others.append(other)
            return results

        results = keras.remat(differentiable)(*tensors)
        return list(_left_to_graph(results)), others[0]

    return compute


def leave_gradients_to_graph():
    """Lets custom gradients in the graph that is being built live as long as it, and no longer.

    TensorFlow keeps the backward pass of every custom gradient in a graph for good, and with it
    the graph and all that its model is made of: a program that builds many models runs out of
    memory. Keras's optimizers make such gradients when they reduce over replicas.
    """
    if _builds_graph():
        import tensorflow as tf

        for operation in tf.compat.v1.get_default_graph().get_operations():
            _leave_gradient_to_graph(operation)


def _builds_graph():
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def _leave_gradient_to_graph(operation):
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

    def __init__(self, function):
        self._function = weakref.ref(function)

    def __call__(self, *args):
        return self._function()(*args)


def value_and_gradients(function, tensors):
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


def compiled(function):
    """A function of nested structures of tensors, compiled when it is first called."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, reduce_retracing=True)


def dense_parts(x):
    """The dense tensors that a value is made of, and how to make one like it of others.

    A ragged or sparse tensor has several.

    Args:
        x: Any value without structure of its own, as `keras.tree` sees it.

    Returns:
        A list of tensors and other values, and a function from such a list to a value like `x`.

    Raises:
        ValueError: If `x` holds tensors in a way in which they cannot be replaced.
    """
    if keras.backend.backend() == "jax":
        import jax

        parts, structure = jax.tree.flatten(x)
        return parts, structure.unflatten
    import tensorflow as tf

    if isinstance(x, tf.TensorArray) or getattr(x, "dtype", None) == tf.variant:
        raise ValueError(
            "Expected a LossScaled layer to take and return tensors of numbers. Received: "
            f"{x!r} (of type {type(x).__name__}), whose gradients cannot be reached. Take them "
            "out of it inside the layer (`tensor_array.stack()`), or leave the layer unscaled."
        )
    if isinstance(x, tf.__internal__.CompositeTensor) and not isinstance(x, tf.Variable):
        parts = tf.nest.flatten(x, expand_composites=True)
        return parts, lambda parts: tf.nest.pack_sequence_as(x, parts, expand_composites=True)
    return [x], lambda parts: parts[0]


def behind_activation(x):
    """What a tensor was computed from by a softmax or sigmoid, and that function; or `None`.

    In a graph of TensorFlow, where Keras's crossentropies look for that. As from `dense_parts`.
    """
    if not _builds_graph():
        return None
    import tensorflow as tf

    functions = {"Softmax": tf.nn.softmax, "Sigmoid": tf.sigmoid}
    if not isinstance(x, tf.Tensor) or x.op.type not in functions:
        return None
    return list(x.op.inputs), lambda parts: functions[x.op.type](*parts)


def is_inexact_dtype(dtype):
    """Whether a dtype, of a tensor, is one of floating-point or complex numbers."""
    name = keras.backend.standardize_dtype(dtype)
    return keras.backend.is_float_dtype(name) or name.startswith("complex")


def real_numbers(x):
    """All numbers of a dense or sparse gradient as real ones: complex ones as two."""
    x = x.values if hasattr(x, "indices") else x  # of embeddings: `tf.IndexedSlices`
    if not keras.backend.standardize_dtype(x.dtype).startswith("complex"):
        return x
    return keras.ops.stack([keras.ops.real(x), keras.ops.imag(x)], axis=-1)


def complex_number(real, imaginary):
    """The complex tensor of two of the same floating-point dtype."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.complex(real, imaginary)
    import tensorflow as tf

    return tf.complex(real, imaginary)


def would_be_constant(value):
    """Whether a function that is being compiled would keep `value` as it is now, for good.

    So JAX does with what is not among the arguments of the function. TensorFlow reads variables
    anew. Computing gradients alone, without compiling, traces nothing.
    """
    if keras.backend.backend() != "jax":
        return False
    import jax

    compiles = isinstance(jax.lax.full((), 0.0), jax.core.Tracer)
    return compiles and not isinstance(value, jax.core.Tracer)


def is_traced_alone():
    """Whether TensorFlow traces a function, and not one of several replicas."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly() and not tf.distribute.has_strategy()


def outside_of_traces():
    """Context in which what is computed is not part of a function that is being traced."""
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.init_scope()


def bitcast(x, dtype):
    """The bits of `x`, read as another dtype of the same size.

    Keras 3.15's `ops.view` refuses tensors of unknown size on TensorFlow.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.lax.bitcast_convert_type(x, dtype)
    import tensorflow as tf

    return tf.bitcast(x, dtype)


def random_bits(seed, shape, number):
    """Random whole numbers in `[0, 2**number)`, int32, the same for the same seed.

    Keras's own random numbers take no seed that is a tensor.

    Args:
        seed: Uint32 tensor `[2]`, as a `keras.random.SeedGenerator` gives it.
        shape: Of the result.
        number: An int below 32.
    """
    if keras.backend.backend() == "jax":
        import jax

        bits = jax.random.bits(jax.random.wrap_key_data(seed), shape, "uint32")
        return keras.ops.cast(keras.ops.right_shift(bits, np.uint32(32 - number)), "int32")
    import tensorflow as tf

    return tf.random.stateless_uniform(
        shape, tf.bitcast(tf.cast(seed, "uint32"), "int32"), 0, 2**number, "int32"
    )


def divide_by_power_of_two(x, divisor):
    """`x / divisor`, exactly rounded, for a power of two that float32 holds the inverse of.

    A gradient has several readers: its shift, its peak, its sample. XLA on a CPU computes
    a chain of cheap operations anew for each of them, and counts multiplications as
    cheap, but divisions not: dividing makes a step up to 14 % faster (see
    benchmarks/NOTES.md). Elsewhere a division need not be exact, so it is a product.
    """
    if _on_gpu():
        return keras.ops.multiply(x, 1 / divisor)
    return keras.ops.divide(x, divisor)


@functools.cache
def _on_gpu():
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))


@functools.cache
def has_products_of_8_bits():
    """Whether XLA makes products of 8 bits of those of tensors that were cast.

    On JAX, with all devices of the Ada or Hopper kind or later, and only if Triton's products
    are turned off, which XLA would try instead, for half a minute each (benchmarks/NOTES.md).
    """
    if keras.backend.backend() != "jax":
        return False
    import jax

    if "--xla_gpu_enable_triton_gemm=false" not in os.environ.get("XLA_FLAGS", ""):
        return False
    capabilities = [str(getattr(d, "compute_capability", "")) for d in jax.local_devices()]
    return all(re.fullmatch(r"8\.9|9\.\d|\d\d\.\d", each) for each in capabilities)


def sums_of_all_bits():
    """A context in which sums of products of 8 bits are not shortened, on JAX.

    Otherwise Hopper adds with 14 bits.
    """
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def lasting_value(variable):
    """The value of a variable, which no later assignment changes."""
    return variable.value if keras.backend.backend() == "jax" else variable.numpy()


def sync_state(model):
    """Brings the variables of a model up to date in the middle of `fit`.

    On JAX, `fit` keeps their values elsewhere.
    """
    if keras.backend.backend() == "jax":
        model.jax_state_sync()


def no_step(model, arguments):
    """What `model.train_function(*arguments)` returns, without a training step."""
    logs = model.get_metrics_result()
    return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs


def is_first_process():
    """Whether this process is the one of several that writes what all know."""
    if keras.backend.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0


def num_replicas_of(model):
    """On how many replicas `tf.distribute` runs the steps of `model.fit`."""
    if keras.backend.backend() != "tensorflow":
        return 1
    return model.distribute_strategy.num_replicas_in_sync


def joined_batch(model, batch):
    """A batch from the data of `model.fit` in one piece, if `tf.distribute` has divided it."""
    if num_replicas_of(model) == 1:
        return batch
    import tensorflow as tf

    strategy = model.distribute_strategy
    return keras.tree.map_structure(
        lambda leaf: tf.concat(strategy.experimental_local_results(leaf), axis=0), batch
    )


def run_if(condition, function, *arguments):
    """Runs `function(*arguments)`, which updates variables, if a scalar tensor is true.

    In `tf.distribute`, on every replica; `condition` must be the same on all. Not where there are
    `only_values`.
    """
    import tensorflow as tf

    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        _run_if(condition, lambda: function(*arguments))
        return

    # Updates of variables merge replicas, which they cannot do inside a conditional of one
    # replica: the conditional has to be around all.
    def on_all(strategy, condition, arguments):
        condition = strategy.experimental_local_results(condition)[0]
        _run_if(
            condition,
            lambda: strategy.extended.call_for_each_replica(function, args=arguments),
        )

    context = tf.distribute.get_replica_context()
    context.merge_call(on_all, args=(condition, arguments))


def _run_if(condition, function):
    def run():
        function()

    keras.ops.cond(condition, run, lambda: None)


def _varies_over(tensor):
    """The axes of a mesh that a tensor has other values along, where JAX keeps account of it."""
    import jax

    kind = jax.typeof(tensor)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", ())  # up to JAX 0.9


def varying_as(x, other):
    """`x`, with JAX told that it has other values wherever `other` has."""
    if keras.backend.backend() != "jax":
        return x
    import jax

    axes = tuple(set(_varies_over(other)) - set(_varies_over(x)))
    if not axes:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # up to JAX 0.8


def max_over_shards(function, tensors):
    """The element-wise maximum of a function over the parts of a batch that devices hold.

    With `keras.distribution` on JAX one computation spans all devices. What reads gradients
    of activations is told here to stay with the part that a device has, lest they travel. In a
    `jax.shard_map` a part is what varies; what is said of all is then the same everywhere.

    Args:
        function: Function `(tensors, part, num_parts) -> tensor` that is not negative.
        tensors: List of tensors whose first axis is that of the batch.
    """
    if keras.backend.backend() != "jax":
        return function(tensors, 0, 1)
    import jax

    axes = tuple(sorted(set().union(*map(_varies_over, tensors))))
    if axes:  # in a `jax.shard_map` of the user's
        number = math.prod(jax.lax.axis_size(axis) for axis in axes)
        return jax.lax.pmax(function(tensors, jax.lax.axis_index(axes), number), axes)
    distribution = keras.distribution.distribution()
    if distribution is None:
        return function(tensors, 0, 1)
    mesh, axis = distribution.device_mesh.backend_mesh, distribution.batch_dim_name
    num_parts = mesh.shape[axis]
    whole, divided = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec(axis)
    specs = [divided if x.ndim and x.shape[0] % num_parts == 0 else whole for x in tensors]

    def of_part(*tensors):
        part = jax.lax.axis_index(axis)
        return jax.lax.pmax(function(list(tensors), part, num_parts), axis)

    over_mesh = jax.shard_map(
        of_part, mesh=mesh, in_specs=tuple(specs), out_specs=whole, axis_names={axis}
    )
    return over_mesh(*tensors)


def unsupported_strategy():
    """The name of the `tf.distribute` strategy around, if replicas cannot be summed over in it.

    `None` if they can, or if there is none.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    supported = (
        tf.distribute.MirroredStrategy,
        tf.distribute.MultiWorkerMirroredStrategy,
        tf.distribute.OneDeviceStrategy,
    )
    if not tf.distribute.has_strategy() or isinstance(strategy, supported):
        return None
    return type(strategy).__name__


def sum_over_replicas(tensor):
    """The sum of a tensor over the replicas that `tf.distribute` runs a step on, and their number.

    This is the only communication between replicas that loss scales need.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)
            return total, context.num_replicas_in_sync
    return tensor, 1
