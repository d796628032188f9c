"""Features of devices, and reductions over several devices."""

import contextlib
import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import keras

from tf_adaptive_ls.backend.types import Tensor


@functools.cache
def on_gpu() -> bool:
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    import tensorflow as tf

    return bool(tf.config.list_logical_devices("GPU"))


@functools.cache
def has_products_of_8_bits() -> bool:
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


def sums_of_all_bits() -> contextlib.AbstractContextManager[None]:
    """A context in which sums of products of 8 bits are not shortened, on JAX.

    Otherwise Hopper adds with 14 bits.
    """
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def zeros_unless(
    condition: Tensor, function: Callable[[], Tensor], shape: tuple[int, ...]
) -> Tensor:
    """What `function` returns, of some shape, if a scalar tensor is true, and else zeros.

    On a GPU it is called anyway: the host would wait for the condition, which costs more.
    """
    if on_gpu():
        return keras.ops.where(condition, function(), keras.ops.zeros(shape))
    return keras.ops.cond(condition, function, lambda: keras.ops.zeros(shape))


def computed_once(tensor: Tensor) -> Tensor:
    """`tensor`, which XLA on a GPU does not compute anew in every kernel that reads it."""
    if keras.backend.backend() != "jax" or not on_gpu():
        return tensor
    import jax

    return jax.lax.optimization_barrier(tensor)


def is_first_process() -> bool:
    """Whether this process is the one of several that writes what all know."""
    if keras.backend.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0


def run_if(condition: Any, function: Callable[..., Any], *arguments: Any) -> None:
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
    def on_all(strategy: Any, condition: Any, arguments: Any) -> None:
        condition = strategy.experimental_local_results(condition)[0]
        _run_if(
            condition,
            lambda: strategy.extended.call_for_each_replica(function, args=arguments),
        )

    context = tf.distribute.get_replica_context()
    context.merge_call(on_all, args=(condition, arguments))


def _run_if(condition: Any, function: Callable[..., Any]) -> None:
    def run() -> None:
        function()

    keras.ops.cond(condition, run, lambda: None)


def _varies_over(tensor: Tensor) -> Any:
    """The axes of a mesh that a tensor has other values along, where JAX keeps account of it."""
    import jax

    kind = jax.typeof(tensor)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", ())  # up to JAX 0.9


def varying_as(x: Tensor, other: Tensor) -> Tensor:
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


def max_over_shards(function: Callable[..., Any], tensors: list[Tensor]) -> Tensor:
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

    def of_part(*tensors: Any) -> Any:
        part = jax.lax.axis_index(axis)
        return jax.lax.pmax(function(list(tensors), part, num_parts), axis)

    over_mesh = jax.shard_map(
        of_part, mesh=mesh, in_specs=tuple(specs), out_specs=whole, axis_names={axis}
    )
    return over_mesh(*tensors)


def unsupported_strategy() -> str | None:
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


def sum_over_replicas(tensor: Tensor) -> tuple[Tensor, int]:
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
