"""`VariableScope`: a Keras scope that intercepts all reads and assignments of variables."""

from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.backend.types import Tensor


class VariableScope(keras.StatelessScope):
    """A scope in which variables have given values, and what is assigned to them is kept.

    Keras documents the scope, but not what it calls of it. Subclasses say what happens.

    Args:
        values: Pairs of a variable and its value.
    """

    def __init__(self, values: list[tuple[keras.Variable, Tensor]]) -> None:
        super().__init__(values, collect_losses=True)

    def read(self, variable: keras.Variable, value: Tensor | None) -> Tensor | None:
        """What a variable reads as here; `value` is what it was given, `None` for nothing."""
        raise NotImplementedError

    def assigned(self, variable: keras.Variable, value: Tensor) -> Tensor:
        """What a variable that `value` is assigned to reads as from then on."""
        raise NotImplementedError

    def value_outside(self, variable: keras.Variable) -> Tensor | None:
        """What a variable reads as around the scope, `None` if it has no value yet."""
        own = keras_internals.own_value(variable)
        if own is None:
            return None
        value = None
        if self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return ops.copy(own) if value is None else value

    def take_losses(self, layer: keras.layers.Layer) -> list[Tensor]:
        """The losses that were added in the scope, which a layer then has not."""
        losses = list(self.losses)
        self.losses.clear()  # Keras 3.12 would look for each by its value, which graphs have not
        keras_internals.forget_losses(layer, losses)
        return losses

    def get_current_value(self, variable: keras.Variable) -> Any:
        return self.read(variable, super().get_current_value(variable))

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        variable, value = update
        super().add_update((variable, self.assigned(variable, value)))
