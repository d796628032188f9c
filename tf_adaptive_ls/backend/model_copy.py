"""Copies a model from its config, with its weights, also in float32."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend.keras_internals import copy_called_flag, parts_of

FLOATS = ("float16", "bfloat16", "float32", "float64")
_POLICIES = (*FLOATS, "mixed_float16", "mixed_bfloat16")


def rebuilt_from_config(
    model: Any,
    plain_class: Any = None,
    dtype: str | None = None,
    plain: Callable[[Any], Any] = lambda copy: copy,
) -> Any:
    """A new model like `model`, from its config, with its weights.

    Classes of layers need not be registered.

    Args:
        model: A built `keras.Model`.
        plain_class: The class of the copy. Defaults to that of the model.
        dtype: "float32" for layers that store and compute float32. `None` keeps their dtypes.
        plain: Function that receives the copy before it gets weights, and returns the model to use.

    Raises:
        Exception: Of any type, if Keras cannot create the model.
    """
    plain_class = plain_class or type(model)
    policy = keras.config.dtype_policy()
    try:
        config = _arguments_of(plain_class, plain_class.get_config(model))
        if dtype is not None:
            config = _in_float32(config)
            keras.config.set_dtype_policy(dtype)
        with keras.saving.custom_object_scope(_classes_in(model)):
            copy = plain_class.from_config(config)
        build_config = model.get_build_config() or {}
        if not copy.built:
            copy.build_from_config(build_config)
        copy = plain(copy)
        weights = [w for w in model.weights if not hasattr(w, "loss_scaled")]
        if len(copy.weights) < len(weights) and "input_shape" in build_config:
            # The model's `build` leaves building its layers to the first call.
            copy(keras.KerasTensor(build_config["input_shape"]))
        copy.set_weights([ops.convert_to_numpy(w) for w in weights])
    finally:
        keras.config.set_dtype_policy(policy)
    copy_called_flag(copy, model)
    return copy


def layers_of_other_dtypes(model: keras.Model) -> dict[str, str]:
    """The dtype policies, by name, of layers with another floating dtype than float32."""
    return {
        part.name: part.dtype_policy.name
        for part in parts_of(model)
        if {part.compute_dtype, part.variable_dtype} & set(FLOATS) - {"float32"}
    }


def _arguments_of(plain_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Removes config entries that Keras added but the class's `__init__` does not accept."""
    parameters = inspect.signature(plain_class.__init__).parameters.values()
    if "layers" in config or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return config
    taken = {p.name for p in parameters}
    added = {"trainable", "dtype"}
    return {key: value for key, value in config.items() if key in taken or key not in added}


def _classes_in(model: keras.Model) -> dict[str, type]:
    return {type(part).__name__: type(part) for part in parts_of(model) if part is not model}


def _in_float32(config: Any, names_dtype: bool = False) -> Any:
    """A config in which every floating dtype, and every policy with one, is float32."""
    if isinstance(config, dict):
        return {
            key: _in_float32(value, names_dtype or key in ("dtype", "dtype_policy"))
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float32(value, names_dtype) for value in config)
    is_name = names_dtype and isinstance(config, str) and config in _POLICIES
    return "float32" if is_name else config
