"""`plain_copy`: makes a plain Keras model with the same weights, also in float32."""

from typing import TypeVar

import keras

from tf_adaptive_ls.backend.model_copy import layers_of_other_dtypes, rebuilt_from_config
from tf_adaptive_ls.models.wrapping import check_is_model, strip_model

Model = TypeVar("Model", bound=keras.Model)


def plain_copy(model: Model, dtype: str | None = None) -> Model:
    """Makes a plain Keras model with the same weights. The wrapped model can continue to train.

    With `dtype="float32"`, the copy is the *float32 twin* of a `mixed_float16` model: all of its
    layers store and compute float32. It gives the same outputs as a model that was built in float32
    with these weights. LiteRT, ONNX and `quantize("int8")` need such a model.

    ```python
    twin = als.plain_copy(model, dtype="float32")
    twin.export("served")  # or "model.tflite", format="litert"; or "model.onnx", format="onnx"
    ```

    Args:
        model: Any built `keras.Model` that can be created from its config.
        dtype: "float32" for a copy in float32. `None` keeps the dtype of every layer.

    Returns:
        A model of the original class, not compiled.

    Raises:
        ValueError: If the model is not built or cannot be created from its config, if `dtype` is
            neither `None` nor "float32", or if a layer insists on another dtype.
    """
    check_is_model(model, "plain_copy")
    if not (dtype is None or (isinstance(dtype, str) and dtype == "float32")):
        raise ValueError(
            f"`plain_copy` expected `dtype` to be None or 'float32'. Received: {dtype!r}. Leave it "
            "out to keep the dtype of every layer."
        )
    plain_class = getattr(model, "base_class", None) or type(model)
    try:
        copy = rebuilt_from_config(model, plain_class, dtype, strip_model)
    except Exception as error:
        raise ValueError(
            f"Expected a built model that can be made anew from its config. Received: model "
            f"'{model.name}' (of type {plain_class.__name__}): {error} Give its class a "
            "`get_config`, or save it with `strip_model` at the end of training."
        ) from error
    others = {} if dtype is None else layers_of_other_dtypes(copy)
    if others:
        raise ValueError(
            "`plain_copy` expected layers that take their dtype from their config or from "
            f"Keras's policy. Received: model '{model.name}', whose class gives layers another "
            f"one: {others}. Let its `__init__` leave `dtype` out, or take it as an argument."
        )
    return copy
