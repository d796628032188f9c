"""`plain_copy`: a plain Keras model with the same weights, beside another, also in float32."""

import inspect
from typing import Any, TypeVar

import keras

from tf_adaptive_ls.backend.keras_internals import parts_of, take_as_called
from tf_adaptive_ls.models.wrapping import check_is_model, strip_model

Model = TypeVar("Model", bound=keras.Model)

FLOATS = ("float16", "bfloat16", "float32", "float64")
POLICIES = (*FLOATS, "mixed_float16", "mixed_bfloat16")


def plain_copy(model: Model, dtype: str | None = None) -> Model:
    """A plain Keras model with the same weights, beside one that goes on training.

    With `dtype="float32"` the copy is the *float32 twin* of a `mixed_float16` model: all layers
    keep and compute float32, so the copy gives the outputs of a model that was built in float32
    with these weights. LiteRT, ONNX and `quantize("int8")` need such a model.

    ```python
    twin = als.plain_copy(model, dtype="float32")
    twin.export("model.tflite", format="litert")
    ```

    Args:
        model: Any built `keras.Model` that can be made from its config.
        dtype: "float32" for a copy in float32. `None` keeps the dtype of every layer.

    Returns:
        A model of the same class as before it was wrapped, not compiled.

    Raises:
        ValueError: If the model cannot be made from its config, is not built, or if `dtype` is
            neither `None` nor "float32". If a layer insists on another dtype.
    """
    check_is_model(model, "plain_copy")
    if dtype not in (None, "float32"):
        raise ValueError(
            f"`plain_copy` expected `dtype` to be None or 'float32'. Received: {dtype!r}. Leave it "
            "out to keep the dtype of every layer."
        )
    plain_class = getattr(model, "base_class", None) or type(model)
    policy = keras.config.dtype_policy()
    try:
        config = plain_class.get_config(model)
        if dtype:
            config = _in_float32(config)
            keras.config.set_dtype_policy(dtype)
        with keras.saving.custom_object_scope(_classes_in(model)):
            copy = _made_anew(model, plain_class, config)
    except Exception as error:
        raise ValueError(
            f"Expected a built model that can be made anew from its config. Received: model "
            f"'{model.name}' (of type {plain_class.__name__}): {error} Give its class a "
            "`get_config`, or save it with `strip_model` at the end of training."
        ) from error
    finally:
        keras.config.set_dtype_policy(policy)
    if dtype:
        _check_is_float32(copy)
    return copy


def _made_anew(model: Any, plain_class: Any, config: dict[str, Any]) -> Any:
    copy = plain_class.from_config(_arguments_of(plain_class, config))
    build_config = model.get_build_config() or {}
    if not copy.built:
        copy.build_from_config(build_config)
    copy = strip_model(copy)  # models inside it come back wrapped
    weights = [w for w in model.weights if not hasattr(w, "loss_scaled")]
    if len(copy.weights) < len(weights) and "input_shape" in build_config:
        # Its `build` leaves layers to their first call.
        copy(keras.KerasTensor(build_config["input_shape"]))
    copy.set_weights([keras.ops.convert_to_numpy(w) for w in weights])
    take_as_called(copy, model)
    return copy


def _arguments_of(plain_class: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what Keras adds to the config of a class whose `__init__` does not take it."""
    parameters = inspect.signature(plain_class.__init__).parameters.values()
    if "layers" in config or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return config
    taken = {p.name for p in parameters}
    added = {"trainable", "dtype"}
    return {key: value for key, value in config.items() if key in taken or key not in added}


def _classes_in(model: keras.Model) -> dict[str, type]:
    """The classes of layers in a model, by name: they need not be registered for a copy."""
    return {type(part).__name__: type(part) for part in parts_of(model) if part is not model}


def _in_float32(config: Any, names_dtype: bool = False) -> Any:
    """A config in which whatever names a floating dtype, or a policy of one, names float32."""
    if isinstance(config, dict):
        return {
            key: _in_float32(value, names_dtype or key in ("dtype", "dtype_policy"))
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float32(value, names_dtype) for value in config)
    return "float32" if names_dtype and isinstance(config, str) and config in POLICIES else config


def _check_is_float32(model: keras.Model) -> None:
    others = {
        part.name: part.dtype_policy.name
        for part in parts_of(model)
        if {part.compute_dtype, part.variable_dtype} & set(FLOATS) - {"float32"}
    }
    if others:
        raise ValueError(
            "`plain_copy` expected layers that take their dtype from their config or from "
            f"Keras's policy. Received: model '{model.name}', whose class gives layers another "
            f"one: {others}. Let its `__init__` leave `dtype` out, or take it as an argument."
        )
