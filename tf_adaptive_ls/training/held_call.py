"""Runs a layer on given values of its weights, once or again in the backward pass."""

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
from tf_adaptive_ls.training.held_variables import HeldVariables, ReadElsewhere, values_of
from tf_adaptive_ls.training.kept_results import KeptResults
from tf_adaptive_ls.training.saved_bytes import note_saved

_runs_again = contextvars.ContextVar("runs_again", default=False)


class Surroundings(NamedTuple):
    """What a layer runs in.

    Attributes:
        context: Function of the receivers that makes a context.
        receivers: Values of variables that are read in it.
    """

    context: Callable[[tuple[Tensor, ...]], Any] = lambda receivers: contextlib.nullcontext()
    receivers: tuple[Tensor, ...] = ()


def runs_again() -> bool:
    """Whether this is the second run of a call, in the backward pass."""
    return _runs_again.get()


def call_held(
    layer: keras.layers.Layer,
    run: Callable[..., Any],
    weights: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Surroundings,
    saves_8_bits: bool = False,
) -> tuple[Any, list[Any]]:
    """Calls a layer, and makes the updates of variables that its call asks for.

    Args:
        layer: A layer that is scaled.
        run: Function `(*args, **kwargs)` that calls it.
        weights: Pairs of a variable that gradients are taken by and its value.
        args: A tuple of arguments by position.
        kwargs: A dict of arguments by name.
        around: The `Surroundings`.
        saves_8_bits: Whether all that is kept for the backward pass are the inputs, in 8 bits, on
            which the layer then runs once more.

    Returns:
        The outputs, and a list of the losses that the layer has added.
    """
    values = values_of(layer, weights)
    inputs = CallTensors((args, kwargs)).tensors
    # What is not differentiated keeps nothing.
    saves_8_bits = (
        saves_8_bits
        and bool(inputs)
        and autodiff.is_differentiated([*inputs, *(value for _, value in weights)])
    )
    again = saves_8_bits or keras_internals.is_rematerialised(layer, args, kwargs)
    call: Callable[..., Any] = _call
    if again:
        call = functools.partial(_call_twice, packs=len(inputs) if saves_8_bits else None)
    with keras_internals.not_rematerialised(layer):
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
    held = HeldVariables(layer, values, around.receivers)
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
    """Raises `ReadElsewhere` if gradients do not come to all given values that they should come to.

    So it is with a `tf.custom_gradient` that expects variables: it does not see values. Calls the
    layer, and once more without any scope of ours if there is something to be cleared up.

    Args:
        layer: As that of `call_held`.
        run: Likewise.
        weights: Likewise.
        args: Likewise.
        kwargs: Likewise.
    """
    values = values_of(layer, weights)

    def held_call() -> list[Tensor]:
        with scale_plan.running(None), HeldVariables(layer, values) as held:
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
    with keras_internals.not_rematerialised(layer):
        missing = autodiff.independent(held_call, tensors, inputs)
    doubtful = [
        v for v, yes, was_read in zip(variables, missing, read, strict=True) if yes and was_read
    ]
    if doubtful:
        own_values = list(map(keras_internals.own_value, doubtful))
        missing = autodiff.independent(plain_call, own_values, inputs)
        names = [v.path for v, is_missing in zip(doubtful, missing, strict=True) if not is_missing]
        if names:
            raise ReadElsewhere(f"has gradients of {', '.join(names)} that only variables get")


def run_again_from_8_bits(
    layer: keras.layers.Layer,
    function: Callable[..., Any],
    keep: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    number: int | None = None,
    results: KeptResults | None = None,
) -> Callable[..., Any]:
    """A function that is run once more in the backward pass, on what 8 bits have kept.

    Args:
        layer: The layer that it is a call of.
        function: As that of `autodiff.rematerialised`.
        keep: Function of the arguments, a list, to what is to be kept and can stand for them.
        number: How many of these, the first, are kept in 8 bits; all by default.
        results: What else it keeps, `KeptResults`.
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

    return autodiff.run_again_from(function, pack, unpack)


class _FirstRun(NamedTuple):
    """What is known of a call that is run twice once it has run.

    Attributes:
        found: As `HeldVariables.found`.
        results: `CallTensors` of outputs and losses.
        updated: The variables that it asks to be updated.
    """

    found: list[Any]
    results: CallTensors
    updated: list[keras.Variable]


def _call_twice(
    layer: keras.layers.Layer,
    run_layer: Callable[..., Any],
    values: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    around: Surroundings,
    packs: int | None = None,
) -> Any:
    """`_call` that keeps nothing for the backward pass, but runs the layer there once more.

    So would Keras, but TensorFlow then finds no gradients by what are not variables, and
    here they are taken by values: each must be an argument of what is run again. With `packs` so
    many of the first tensors in the arguments are kept in 8 bits.
    """
    variables = [variable for variable, _ in values]
    # As they are now: statistics and seeds are updated before the second run.
    copies = [ops.copy(value) for _, value in values]
    given = CallTensors((args, kwargs, copies, tuple(map(ops.copy, around.receivers))))
    context = keras_internals.call_context()  # it is gone by the second run
    kept = KeptResults()
    first: _FirstRun | None = None

    def run(*tensors: Tensor) -> tuple[list[Tensor], Any]:
        nonlocal first
        new_args, new_kwargs, held, new_receivers = given.replaced(tensors)
        found_before: list[Any] = [] if first is None else first.found
        new_values = [*zip(variables, held, strict=True), *found_before]
        token = _runs_again.set(first is not None or runs_again())
        try:
            with (
                keras_internals.in_call_context(context),
                keras_internals.not_rematerialised(layer),
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
            _runs_again.reset(token)
        results = CallTensors((outputs, losses))
        if first is None:
            first = _FirstRun(found, results, [variable for variable, _ in updates])
        logits = [] if packs is None else list(results.logits.values())
        others = results.others, results.masks, [value for _, value in updates]
        return [*results.tensors, *logits], others

    if packs is None:
        runs_twice = autodiff.rematerialised(run)
    else:
        runs_twice = run_again_from_8_bits(layer, run, lambda tensors: tensors, packs, kept)
    tensors, (others, masks, updates) = runs_twice(*given.tensors)
    assert first is not None
    results = first.results
    number = len(results.tensors)
    # As in Keras, logits are not kept by what is rematerialised.
    logits = dict(zip(results.logits, tensors[number:], strict=False))
    outputs, losses = results.replaced(tensors[:number], others=others, masks=masks, logits=logits)
    return outputs, losses, list(zip(first.updated, updates, strict=True)), first.found
