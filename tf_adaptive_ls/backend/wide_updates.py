"""Makes Keras optimizers update 16-bit weights in float32.

An update smaller than half of the last bit of a weight would otherwise be lost. Here the
optimizer sees each of these weights as float32. Its result is rounded once, by a function that
can preserve small updates on average. All variables of the optimizer are float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend import routes
from tf_adaptive_ls.backend.types import Tensor

# Function of a float32 tensor, the dtype to round to, the index of the weight in the list that the
# optimizer was built for, and the number of steps taken.
Round = Callable[[Tensor, str, int, Tensor], Tensor]

_NARROW = ("float16", "bfloat16")


def is_of_16_bits(variable: Any) -> bool:
    """Whether a Keras or TensorFlow variable stores 16-bit floating-point numbers."""
    return keras.backend.standardize_dtype(variable.dtype) in _NARROW


def update_in_float32(optimizer: keras.optimizers.Optimizer, rounded: Round) -> None:
    """Makes an optimizer that is not built yet update 16-bit weights in float32.

    Args:
        optimizer: The optimizer.
        rounded: Function that rounds its results.
    """
    runs: dict[str, Callable[..., Any]] = {
        "add_variable": _add_variable,
        "update_step": functools.partial(_update_step, optimizer, rounded),
        "assign": _assign_by("assign"),
        "assign_add": _assign_by("assign_add"),
        "assign_sub": _assign_by("assign_sub"),
        "_var_key": _key,
        "_apply_weight_decay": _decay_wide_weights,
        "_update_model_variables_moving_average": _average,
        "_overwrite_model_variables_with_average_value": functools.partial(_overwrite, optimizer),
    }
    for name, run in runs.items():
        routes.Route(optimizer, name, run)


class _Wide(keras.Variable):
    """Stands for a weight during its update, with the numbers in float32."""

    def __init__(self, narrow: Any) -> None:
        # Not Keras's `__init__`, which would create and track a variable.
        self.narrow = narrow
        self._numbers = ops.cast(ops.convert_to_tensor(narrow), "float32")
        self._name = narrow.name
        self._path = getattr(narrow, "path", narrow.name)
        self._shape, self._ndim = tuple(narrow.shape), len(narrow.shape)
        self._dtype, self._autocast = "float32", False

    @property
    def value(self) -> Tensor:
        return self._numbers

    def assign(self, value: Any) -> Tensor:
        self._numbers = ops.cast(ops.convert_to_tensor(value), "float32")
        return self._numbers

    def __tf_tensor__(self, dtype: Any = None, name: Any = None) -> Tensor:
        return self._numbers


def _add_variable(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if kwargs.get("dtype") is not None and keras.backend.standardize_dtype(kwargs["dtype"]) in (
        _NARROW
    ):
        kwargs = {**kwargs, "dtype": "float32"}
    return original(*args, **kwargs)


def _update_step(
    optimizer: keras.optimizers.Optimizer,
    rounded: Round,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    gradient, variable, learning_rate = args
    if not is_of_16_bits(variable):
        return original(*args, **kwargs)
    wide = _Wide(variable)
    if optimizer.weight_decay is not None and optimizer._use_weight_decay(variable):
        decay = ops.cast(optimizer.weight_decay, "float32") * ops.cast(learning_rate, "float32")
        wide.assign(wide.value - wide.value * decay)
    original(ops.cast(_dense(gradient), "float32"), wide, learning_rate)
    place = optimizer._get_variable_index(variable)
    dtype = keras.backend.standardize_dtype(variable.dtype)
    variable.assign(rounded(wide.value, dtype, place, optimizer._iterations))
    return None


def _dense(gradient: Any) -> Tensor:
    """The dense gradient. On TensorFlow, the gradient of an embedding is given as rows."""
    return gradient if keras.backend.backend() == "jax" else ops.convert_to_tensor(gradient)


def _assign_by(name: str) -> Callable[..., Any]:
    def run(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        variable, value = args
        if isinstance(variable, _Wide):
            return getattr(variable, name)(value)
        return original(*args, **kwargs)

    return run


def _key(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (variable,) = args
    return original(variable.narrow if isinstance(variable, _Wide) else variable)


def _decay_wide_weights(
    original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Applies weight decay to other weights; 16-bit weights decay in their update."""
    (variables,) = args
    return original([v for v in variables if not is_of_16_bits(v)])


def _average(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (variables,) = args
    return original([_Wide(v) if is_of_16_bits(v) else v for v in variables])


def _overwrite(
    optimizer: keras.optimizers.Optimizer,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    (variables,) = args
    if not any(map(is_of_16_bits, variables)):
        return original(*args, **kwargs)
    # On TensorFlow, Keras would assign these float32 numbers without casting.
    for variable, average in zip(variables, optimizer._model_variables_moving_average, strict=True):
        if average is not None:
            variable.assign(ops.cast(average, variable.dtype))
    return None
