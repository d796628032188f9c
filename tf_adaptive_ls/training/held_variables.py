"""Runs a layer on given values of its weights, and holds back what it updates."""

import keras

from tf_adaptive_ls.numerics.gradient_tap import redirect_gradient
from tf_adaptive_ls.training import keras_internals


class HeldVariables(keras.StatelessScope):
    """A scope in which a layer works on values, and changes nothing.

    Args:
        layer: The layer.
        weights: Pairs of a variable that gradients are taken by and its value.
    """

    def __init__(self, layer, weights):
        known = {id(variable) for variable, _ in weights}
        # Statistics, seeds, metrics.
        others = {id(v): v for v in [*layer.variables, *layer.metrics_variables]}
        others = [(v, v.value) for key, v in others.items() if key not in known]
        super().__init__([*weights, *others], collect_losses=True)
        self._layer_name = layer.name
        self._weights = {id(variable): value for variable, value in weights}
        self._updates = {}

    def add_update(self, update):
        variable, value = update
        self._updates[id(variable)] = variable, value
        if id(variable) in self._weights:
            # Outside of such a scope, too, a weight assigned to in a call has the gradient
            # of its new value.
            value = redirect_gradient(value, self._weights[id(variable)])
        super().add_update((variable, value))

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if value is None and keras_internals.has_value(variable):
            if is_scaled_weight(variable):
                raise ValueError(
                    "Expected a LossScaled layer to use only trainable weights that it "
                    f"tracks. Received: layer '{self._layer_name}' reading "
                    f"'{variable.path}', whose gradient would come out at the wrong "
                    "scale. Make the weight, or the layer that owns it, an attribute of "
                    f"'{self._layer_name}'."
                )
            if self.original_scope is not None:
                return self.original_scope.get_current_value(variable)
        return value

    def assign_updates(self):
        """Makes the updates that were held back, after the scope."""
        for variable, value in self._updates.values():
            variable.assign(value)


def scaled_weights_of(layer):
    """The variables of a layer that have gradients which bear a scale."""
    return [v for v in layer.trainable_variables if is_scaled_weight(v)]


def is_scaled_weight(variable):
    """Whether `variable` has a gradient that bears a scale."""
    return (
        variable.trainable
        and not variable.overwrite_with_gradient
        and keras.backend.is_float_dtype(variable.dtype)
    )
