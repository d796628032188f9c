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
    """Whether XLA computes the matmul of tensors cast from float8 in float8.

    On JAX it does, if all devices are at least Ada or Hopper, and if Triton's matmuls are turned
    off. XLA would otherwise try these, for half a minute per matmul (benchmarks/NOTES.md).
    """
    if keras.backend.backend() != "jax":
        return False
    import jax

    if "--xla_gpu_enable_triton_gemm=false" not in os.environ.get("XLA_FLAGS", ""):
        return False
    capabilities = [str(getattr(d, "compute_capability", "")) for d in jax.local_devices()]
    return all(re.fullmatch(r"8\.9|9\.\d|\d\d\.\d", each) for each in capabilities)


def sums_of_all_bits() -> contextlib.AbstractContextManager[None]:
    """Context manager in which float8 matmuls on JAX accumulate with full precision.

    Otherwise, Hopper accumulates with 14 bits.
    """
    if keras.backend.backend() != "jax":
        return contextlib.nullcontext()
    import jax

    return jax.default_matmul_precision("highest")


def zeros_unless(
    condition: Tensor, function: Callable[[], Tensor], shape: tuple[int, ...]
) -> Tensor:
    """The result of `function` if a boolean scalar tensor is true, otherwise zeros.

    On a GPU, `function` always runs: a condition would make the host wait, which takes longer.
    """
    if on_gpu():
        return keras.ops.where(condition, function(), keras.ops.zeros(shape))
    return keras.ops.cond(condition, function, lambda: keras.ops.zeros(shape))


def computed_once(tensor: Tensor) -> Tensor:
    """`tensor`, protected from being recomputed by XLA in every GPU kernel that reads it."""
    if keras.backend.backend() != "jax" or not on_gpu():
        return tensor
    import jax

    return jax.lax.optimization_barrier(tensor)


def is_first_process() -> bool:
    """Whether this process is the one that writes files and logs for all processes."""
    if keras.backend.backend() != "jax":
        return True
    import jax

    return jax.process_index() == 0


def run_if(condition: Any, function: Callable[..., Any], *arguments: Any) -> None:
    """Runs `function(*arguments)`, which updates variables, if a boolean scalar tensor is true.

    With `tf.distribute`, it runs on every replica, and `condition` must be the same on all. It
    cannot be used where there are `only_values`.
    """
    import tensorflow as tf

    if tf.__internal__.distribute.strategy_supports_no_merge_call():
        _run_if(condition, lambda: function(*arguments))
        return

    # Variable updates merge replicas, which is impossible inside of a conditional of one replica.
    # The conditional must therefore enclose all replicas.
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
    """The axes of the mesh along which a tensor varies, as far as JAX tracks it."""
    import jax

    kind = jax.typeof(tensor)
    if hasattr(kind, "manual_axis_type"):
        return kind.manual_axis_type.varying
    return getattr(kind, "vma", ())  # up to JAX 0.9


def varying_as(x: Tensor, other: Tensor) -> Tensor:
    """`x`, marked for JAX as varying along the same axes of the mesh as `other`."""
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
    """The element-wise maximum of a function over the shards of a batch.

    With `keras.distribution` on JAX, one computation spans all devices. This keeps each device on
    its own shard, so that gradients of activations are not transferred. Inside a `jax.shard_map`,
    there is only the local shard.

    Args:
        function: Function `(tensors, part, num_parts) -> tensor` with values >= 0.
        tensors: List of tensors of shape `[batch, ...]`.
    """
    if keras.backend.backend() != "jax":
        return function(tensors, 0, 1)
    import jax

    axes = tuple(sorted(set().union(*map(_varies_over, tensors))))
    if axes:  # in a user's `jax.shard_map`
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
    """The name of the current `tf.distribute` strategy, if it cannot sum over replicas.

    `None` if it can, or if there is no strategy.
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
    """The sum of a tensor over all `tf.distribute` replicas of a step, and their number.

    Loss scales need no other communication between replicas.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            total = context.all_reduce(tf.distribute.ReduceOp.SUM, tensor)
            return total, context.num_replicas_in_sync
    return tensor, 1
