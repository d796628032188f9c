"""Runs a layer on given values of its weights, and may run it again in the backward pass."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from tf_adaptive_ls.backend import autodiff, keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.packing import packed, unpacked
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.given_variables import GivenVariables, ReadElsewhere, values_of
from tf_adaptive_ls.training.kept_results import KeptResults
from tf_adaptive_ls.training.saved_bytes import note_saved

_is_second_run = contextvars.ContextVar("is_second_run", default=False)


class Surroundings(NamedTuple):
    """The context in which a layer runs.

    Attributes:
        context: Function from the receivers to a context manager.
        receivers: Values of variables that are read inside the context.
    """

    context: Callable[[tuple[Tensor, ...]], Any] = lambda receivers: contextlib.nullcontext()
    receivers: tuple[Tensor, ...] = ()


def is_second_run() -> bool:
    """Whether this is the second run of a call, in the backward pass."""
    return _is_second_run.get()


def functional_call(
    layer: keras.layers.Layer,
    run: Callable[..., Any],
    weights: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Surroundings,
    saves_8_bits: bool = False,
) -> tuple[Any, list[Any]]:
    """Calls a layer on given values of its weights, and applies the variable updates of the call.

    Args:
        layer: The layer.
        run: Function `(*args, **kwargs)` that calls it.
        weights: List of pairs of a trainable variable and its value.
        args: Tuple of positional arguments.
        kwargs: Dict of keyword arguments.
        around: The `Surroundings`.
        saves_8_bits: Whether to save only the inputs for the backward pass, in 8 bits, and to run
            the layer again there.

    Returns:
        The outputs, and a list of the losses that the layer added.
    """
    values = values_of(layer, weights)
    inputs = CallTensors((args, kwargs)).tensors
    # A call that is not differentiated saves nothing.
    saves_8_bits = (
        saves_8_bits
        and bool(inputs)
        and autodiff.is_differentiated([*inputs, *(value for _, value in weights)])
    )
    again = saves_8_bits or keras_internals.is_rematerialized(layer, args, kwargs)
    call: Callable[..., Any] = _call
    if again:
        call = functools.partial(_rematerialized_call, packs=len(inputs) if saves_8_bits else None)
    with keras_internals.not_rematerialized(layer):
        outputs, losses, updates, _ = call(layer, run, values, args, kwargs, around)
    for variable, value in updates:
        variable.assign(value)
    return outputs, losses


def _call(
    layer: keras.layers.Layer,
    run: Callable[..., Any],
    values: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Surroundings,
) -> Any:
    held = GivenVariables(layer, values, around.receivers)
    with scale_plan.running(None), held, around.context(around.receivers):
        outputs = run(*args, **kwargs)
        losses = held.take_losses(layer)
    held.check_reads()
    return outputs, losses, held.updates, held.found


def check_gradients(
    layer: keras.layers.Layer,
    run: Callable[..., Any],
    weights: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raises `ReadElsewhere` if gradients do not reach the given values of weights.

    This happens with a `tf.custom_gradient` that looks for variables, because it does not see the
    given values. The check calls the layer. If a weight was read and has no gradient, it calls the
    layer again without our scope, to see whether the variable itself has one.

    Args:
        layer: The layer.
        run: As in `functional_call`.
        weights: As in `functional_call`.
        args: As in `functional_call`.
        kwargs: As in `functional_call`.
    """
    values = values_of(layer, weights)

    def call_with_given_values() -> list[Tensor]:
        with scale_plan.running(None), GivenVariables(layer, values) as held:
            outputs = run(*args, **kwargs)
            read[:] = map(held.was_read, variables)
            return CallTensors((outputs, list(held.losses))).tensors

    def plain_call() -> list[Tensor]:
        with scale_plan.running(None), keras.StatelessScope(collect_losses=True) as scope:
            outputs = run(*args, **kwargs)
            return CallTensors((outputs, list(scope.losses))).tensors

    variables, tensors = zip(*weights, strict=True)
    read: list[bool] = []
    inputs = CallTensors((args, kwargs)).tensors
    with keras_internals.not_rematerialized(layer):
        missing = autodiff.independent(call_with_given_values, tensors, inputs)
    doubtful = [
        v for v, yes, was_read in zip(variables, missing, read, strict=True) if yes and was_read
    ]
    if doubtful:
        own_values = list(map(keras_internals.own_value, doubtful))
        missing = autodiff.independent(plain_call, own_values, inputs)
        names = [v.path for v, is_missing in zip(doubtful, missing, strict=True) if not is_missing]
        if names:
            raise ReadElsewhere(f"has gradients of {', '.join(names)} that only variables get")


def rematerialized_from_8_bits(
    layer: keras.layers.Layer,
    function: Callable[..., Any],
    keep: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    number: int | None = None,
    results: KeptResults | None = None,
) -> Callable[..., Any]:
    """A function that runs again in the backward pass, from arguments saved in 8 bits.

    Args:
        layer: The layer that calls it.
        function: As in `autodiff.rematerialized`.
        keep: Function from the list of arguments to the list of tensors to save, on which
            `function` can run again.
        number: How many of these tensors, from the first on, are saved in 8 bits. Defaults to all.
        results: `KeptResults` of the call, if it saves more.
    """
    dtypes: list[str] = []
    results = results or KeptResults()

    def pack(tensors: Sequence[Tensor]) -> Any:
        kept = keep(tensors)
        count = len(kept) if number is None else number
        dtypes[:] = [keras.backend.standardize_dtype(x.dtype) for x in kept[:count]]
        bits = list(map(packed, kept[:count]))
        note_saved(layer, [*bits, *results.noted_bits])
        return bits, list(kept[count:]), results.noted

    def unpack(kept: Any) -> list[Tensor]:
        bits, others, noted = kept
        results.give(noted)
        return [*map(unpacked, bits, dtypes), *others]

    return autodiff.rematerialized_from(function, pack, unpack)


class _FirstRun(NamedTuple):
    """What the first of two runs of a call has found.

    Attributes:
        found: As `GivenVariables.found`.
        results: `CallTensors` of the outputs and losses.
        updated: The variables that the call updates.
    """

    found: list[Any]
    results: CallTensors
    updated: list[keras.Variable]


def _rematerialized_call(
    layer: keras.layers.Layer,
    run_layer: Callable[..., Any],
    values: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Surroundings,
    packs: int | None = None,
) -> Any:
    """`_call` that saves only its arguments and runs again in the backward pass.

    Keras's own rematerialization does not work here: in TensorFlow it finds gradients of variables
    only, but this library differentiates by the values of variables. Each value must therefore be
    an argument of the function that runs again. If `packs` is not `None`, the first `packs` tensors
    of the arguments are saved in 8 bits.
    """
    variables = [variable for variable, _ in values]
    # Copies of the current values: statistics and seeds are updated before the second run.
    copies = [ops.copy(value) for _, value in values]
    given = CallTensors((args, kwargs, copies, tuple(map(ops.copy, around.receivers))))
    context = keras_internals.call_context()  # no longer available in the second run
    kept = KeptResults()
    first: _FirstRun | None = None

    def run(*tensors: Tensor) -> tuple[list[Tensor], Any]:
        nonlocal first
        new_args, new_kwargs, held, new_receivers = given.replaced(tensors)
        found_before: list[Any] = [] if first is None else first.found
        new_values = [*zip(variables, held, strict=True), *found_before]
        token = _is_second_run.set(first is not None or is_second_run())
        try:
            with (
                keras_internals.in_call_context(context),
                keras_internals.not_rematerialized(layer),
                contextlib.nullcontext() if packs is None else kept.running(layer),
            ):
                outputs, losses, updates, found = _call(
                    layer,
                    run_layer,
                    new_values,
                    new_args,
                    new_kwargs,
                    Surroundings(around.context, new_receivers),
                )
        finally:
            _is_second_run.reset(token)
        results = CallTensors((outputs, losses))
        if first is None:
            first = _FirstRun(found, results, [variable for variable, _ in updates])
        logits = [] if packs is None else list(results.logits.values())
        others = results.others, results.masks, [value for _, value in updates]
        return [*results.tensors, *logits], others

    if packs is None:
        runs_twice = autodiff.rematerialized(run)
    else:
        runs_twice = rematerialized_from_8_bits(layer, run, lambda tensors: tensors, packs, kept)
    tensors, (others, masks, updates) = runs_twice(*given.tensors)
    assert first is not None
    results = first.results
    number = len(results.tensors)
    # As in Keras, a rematerialized call does not keep logits.
    logits = dict(zip(results.logits, tensors[number:], strict=False))
    outputs, losses = results.replaced(tensors[:number], others=others, masks=masks, logits=logits)
    return outputs, losses, list(zip(first.updated, updates, strict=True)), first.found
