"""Compiles a model like another model, with the state of its optimizer."""

import collections
import math
from collections.abc import Callable
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import arguments_of_compile, variables_built_for
from tf_adaptive_ls.training.optimizer import INITIAL_SCALE


def compile_like(
    model: keras.Model, result: keras.Model, make_optimizer: Callable[..., Any]
) -> None:
    """Compiles `result` as `model` is compiled, with a copy of its optimizer and the state."""
    if type(model).compile is not keras.Model.compile:
        return  # only the author of the class knows the arguments of its `compile`
    config = arguments_of_compile(model)
    optimizer, loss_scale = model.optimizer, INITIAL_SCALE
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        if optimizer.built:
            loss_scale = 2.0 ** math.floor(math.log2(float(optimizer.dynamic_scale.numpy())))
        optimizer = optimizer.inner_optimizer
    if optimizer is None:
        result.compile(**config)
        return
    copy = type(optimizer).from_config(optimizer.get_config())
    result.compile(**{**config, "optimizer": make_optimizer(copy, initial_scale=loss_scale)})
    if optimizer.built:
        # A newly built copy of the old optimizer shows the role of each of its variables.
        twin = type(optimizer).from_config(optimizer.get_config())
        roles = _roles_of_variables(twin, lambda: twin.build(variables_built_for(optimizer)))
        values = dict(zip(roles, optimizer.variables, strict=True))
        roles = _roles_of_variables(
            copy, lambda: result.optimizer.build(result.trainable_variables)
        )
        for role, variable in zip(roles, copy.variables, strict=True):
            if role in values:
                # On JAX, training donates the memory of variables, so no two variables may share
                # it.
                variable.assign(keras.ops.copy(values[role]))


def _roles_of_variables(
    optimizer: Any, build: Callable[..., Any]
) -> list[tuple[int | None, str, int]]:
    """Builds an optimizer, and returns the role of each of its variables.

    Returns:
        List of a tuple for each of `optimizer.variables`: the `id` of the weight that it belongs
        to, or `None`; its name; and the number of earlier variables with the same two entries.
    """
    weight_of = {}
    add = optimizer.add_variable_from_reference

    def recording(reference_variable: keras.Variable, *args: Any, **kwargs: Any) -> keras.Variable:
        variable = add(reference_variable, *args, **kwargs)
        weight_of[id(variable)] = id(reference_variable)
        return variable

    optimizer.add_variable_from_reference = recording
    try:
        build()
    finally:
        del optimizer.add_variable_from_reference
    counts: collections.Counter[Any] = collections.Counter()
    roles = []
    for variable in optimizer.variables:
        # Keras does not find all slots inside of a `LossScaleOptimizer`; the names of the others
        # say what they belong to.
        kind = weight_of.get(id(variable)), variable.name
        roles.append((*kind, counts[kind]))
        counts[kind] += 1
    return roles
