"""Makes Keras optimizers compute updates of 16-bit weights in float32.

A step that is smaller than half of the last bit of a weight would be lost. Here the optimizer sees
a float32 number for each of these weights; what it makes of that is rounded once, by a function
that can do so without losing small steps on average. All that it keeps for itself is float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend import routes
from tf_adaptive_ls.backend.types import Tensor

# Function of a float32 tensor, the dtype to round to, the place of the weight among those that the
# optimizer was built for, and how many steps it has taken.
Round = Callable[[Tensor, str, int, Tensor], Tensor]

_NARROW = ("float16", "bfloat16")


def is_of_16_bits(variable: Any) -> bool:
    """Whether a variable, of Keras or of TensorFlow, holds floating-point numbers of 16 bits."""
    return keras.backend.standardize_dtype(variable.dtype) in _NARROW


def update_in_float32(optimizer: keras.optimizers.Optimizer, rounded: Round) -> None:
    """From now on an optimizer that is not built yet updates weights of 16 bits in float32.

    Args:
        optimizer: The optimizer.
        rounded: How its results are rounded.
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
    """What stands for a weight while it is updated: its numbers in float32."""

    def __init__(self, narrow: Any) -> None:
        # Not that of Keras: it is no variable that is to be made or tracked.
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
    """Of an embedding, on TensorFlow, it is given as the rows that there are."""
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
    """Those of 16 bits decay where they are updated."""
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
    # On TensorFlow Keras assigns them as they are, which are of another dtype.
    for variable, average in zip(variables, optimizer._model_variables_moving_average, strict=True):
        if average is not None:
            variable.assign(ops.cast(average, variable.dtype))
    return None
