"""`VariableScope`: a Keras scope that intercepts all reads and assignments of variables."""

from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.backend.types import Tensor


class VariableScope(keras.StatelessScope):
    """A scope in which variables have given values, and which intercepts assignments.

    Keras documents the base class, but not which of its methods Keras calls. Subclasses define what
    a read or an assignment does.

    Args:
        values: List of pairs of a variable and its value.
    """

    def __init__(self, values: list[tuple[keras.Variable, Tensor]]) -> None:
        super().__init__(values, collect_losses=True)

    def read(self, variable: keras.Variable, value: Tensor | None) -> Tensor | None:
        """The value that a variable reads as. `value` is the given value, or `None`."""
        raise NotImplementedError

    def assigned(self, variable: keras.Variable, value: Tensor) -> Tensor:
        """The value that a variable reads as after `value` is assigned to it."""
        raise NotImplementedError

    def value_outside(self, variable: keras.Variable) -> Tensor | None:
        """The value of a variable outside of the scope, or `None`."""
        own = keras_internals.own_value(variable)
        if own is None:
            return None
        value = None
        if self.original_scope is not None:
            value = self.original_scope.get_current_value(variable)
        return ops.copy(own) if value is None else value

    def take_losses(self, layer: keras.layers.Layer) -> list[Tensor]:
        """Removes the losses that were added in the scope from the layer, and returns them."""
        losses = list(self.losses)
        # Keras 3.12 would compare values to find each loss, which is impossible in a graph
        self.losses.clear()
        keras_internals.forget_losses(layer, losses)
        return losses

    def get_current_value(self, variable: keras.Variable) -> Any:
        return self.read(variable, super().get_current_value(variable))

    def add_update(self, update: tuple[keras.Variable, Tensor]) -> None:
        variable, value = update
        super().add_update((variable, self.assigned(variable, value)))
