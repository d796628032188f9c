"""Runs a layer on given values of its weights: once, or once more in the backward pass."""

import contextlib
import contextvars
from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from tf_adaptive_ls.backend import autodiff, keras_internals
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.training import scale_plan
from tf_adaptive_ls.training.call_tensors import CallTensors
from tf_adaptive_ls.training.held_variables import HeldVariables, ReadElsewhere, values_of

_runs_again = contextvars.ContextVar("runs_again", default=False)


def runs_again() -> bool:
    """Whether this is the second run of a call, in the backward pass."""
    return _runs_again.get()


def call_held(
    layer: keras.layers.Layer,
    run: Callable[..., Any],
    weights: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    within: Callable[..., Any] = contextlib.nullcontext,
    receivers: tuple[Tensor, ...] = (),
) -> tuple[Any, list[Any]]:
    """Calls a layer, and makes the updates of variables that its call asks for.

    Args:
        layer: A layer that is scaled.
        run: Function `(*args, **kwargs)` that calls it.
        weights: Pairs of a variable that gradients are taken by and its value.
        args: A tuple of arguments by position.
        kwargs: A dict of arguments by name.
        within: Function that makes a context in which the layer is to run.
        receivers: Values of variables that are read in that context.

    Returns:
        The outputs, and a list of the losses that the layer has added.
    """
    values = values_of(layer, weights)
    again = keras_internals.is_rematerialised(layer, args, kwargs)
    with keras_internals.not_rematerialised(layer):
        call = _call_twice if again else _call
        outputs, losses, updates, _ = call(layer, run, values, args, kwargs, within, receivers)
    for variable, value in updates:
        variable.assign(value)
    return outputs, losses


def _call(
    layer: keras.layers.Layer,
    run: Callable[..., Any],
    values: list[tuple[keras.Variable, Tensor]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    within: Callable[..., Any],
    receivers: tuple[Tensor, ...],
) -> Any:
    with scale_plan.running(None), HeldVariables(layer, values, receivers) as held, within():
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
    within: Callable[..., Any],
    receivers: tuple[Tensor, ...],
) -> Any:
    """`_call` that keeps nothing for the backward pass, but runs the layer there once more.

    So would Keras, but TensorFlow then finds no gradients by what are not variables, and
    here they are taken by values: each must be an argument of what is run again.
    """
    variables = [variable for variable, _ in values]
    # As they are now: statistics and seeds are updated before the second run.
    given = CallTensors((args, kwargs, [ops.copy(value) for _, value in values]))
    context = keras_internals.call_context()  # it is gone by the second run
    first: _FirstRun | None = None

    def run(*tensors: Tensor) -> tuple[list[Tensor], Any]:
        nonlocal first
        new_args, new_kwargs, held = given.replaced(tensors)
        found_before: list[Any] = [] if first is None else first.found
        new_values = [*zip(variables, held, strict=True), *found_before]
        token = _runs_again.set(first is not None or runs_again())
        try:
            with (
                keras_internals.in_call_context(context),
                keras_internals.not_rematerialised(layer),
            ):
                outputs, losses, updates, found = _call(
                    layer, run_layer, new_values, new_args, new_kwargs, within, receivers
                )
        finally:
            _runs_again.reset(token)
        results = CallTensors((outputs, losses))
        if first is None:
            first = _FirstRun(found, results, [variable for variable, _ in updates])
        return results.tensors, (results.others, results.masks, [value for _, value in updates])

    tensors, (others, masks, updates) = autodiff.rematerialised(run)(*given.tensors)
    assert first is not None
    # As in Keras, logits are not kept.
    outputs, losses = first.results.replaced(tensors, others=others, masks=masks, logits={})
    return outputs, losses, list(zip(first.updated, updates, strict=True)), first.found
