"""A scope in which a layer works on given values of its variables, and changes none of them."""

import keras
from keras import ops

from tf_adaptive_ls.numerics import backend
from tf_adaptive_ls.numerics.gradient_tap import redirect_gradient
from tf_adaptive_ls.training import keras_internals


class HeldVariables(keras.StatelessScope):
    """The scope.

    Args:
        layer: The layer.
        values: Pairs of a variable and its value, see `values_of`.
    """

    def __init__(self, layer, values):
        super().__init__(values, collect_losses=True)
        self._layer_name = layer.name
        self._is_recorded = backend.is_recorded()
        self._found = {}
        self._weights = {id(v): value for v, value in values if is_scaled_weight(v)}
        self._updates = {}

    @property
    def updates(self):
        """Pairs of a variable and the value that it was assigned."""
        return list(self._updates.values())

    def add_update(self, update):
        variable, value = update
        self._updates[id(variable)] = variable, value
        if id(variable) in self._weights and backend.gradients_end_at_assignments():
            # Outside of such a scope, too, a weight assigned to in a call has the gradient
            # of its new value.
            value = redirect_gradient(value, self._weights[id(variable)])
        super().add_update((variable, value))

    @property
    def found(self):
        """Pairs of a variable that was not among the values and the value it was found to have."""
        return list(self._found.values())

    def get_current_value(self, variable):
        value = super().get_current_value(variable)
        if id(variable) in self._weights:
            self._check_is_recorded(variable)
        if value is None and keras_internals.own_value(variable) is not None:
            self._check_has_no_gradient(variable)
            if self.original_scope is not None:
                value = self.original_scope.get_current_value(variable)
            if value is None:
                value = ops.copy(keras_internals.own_value(variable))
            self._found.setdefault(id(variable), (variable, value))
        return value

    def _check_has_no_gradient(self, variable):
        if is_scaled_weight(variable):
            raise ValueError(
                "Expected a LossScaled layer to use only trainable weights that it "
                f"tracks. Received: layer '{self._layer_name}' reading "
                f"'{variable.path}', whose gradient would come out at the wrong "
                "scale. Make the weight, or the layer that owns it, an attribute of "
                f"'{self._layer_name}'."
            )

    def _check_is_recorded(self, variable):
        # Outside of such a scope TensorFlow finds it even there, since it is a variable.
        if self._is_recorded and not backend.is_recorded():
            raise ValueError(
                "Expected a LossScaled layer to read its weights where TensorFlow records "
                f"gradients. Received: layer '{self._layer_name}' reading '{variable.path}' in "
                "a function made by `keras.remat` or `tf.recompute_grad`. Make the layer in a "
                "`keras.RematScope` instead, or wrap the layers inside it, one by one."
            )


def values_of(layer, weights):
    """`weights`, pairs of a variable and its value, and those of all others of a layer."""
    known = {id(variable) for variable, _ in weights}
    # Statistics, seeds, metrics.
    others = {id(v): v for v in [*layer.variables, *layer.metrics_variables]}
    return [*weights, *((v, v.value) for key, v in others.items() if key not in known)]


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
