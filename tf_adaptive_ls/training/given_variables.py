"""A scope in which a layer uses given values of its variables and changes none."""

from typing import Any

import keras

from tf_adaptive_ls.backend import arrays, autodiff
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.backend.variable_scope import VariableScope
from tf_adaptive_ls.numerics.gradient_tap import redirect_gradient


class ReadElsewhere(BaseException):
    """A layer reads its weights otherwise than through the values it was given.

    This is not an `Exception`, because Keras, AutoGraph or a layer could catch or replace it.

    Args:
        how: How the layer reads its weights, as part of a sentence in a warning.
    """

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.how = how


class GivenVariables(VariableScope):
    """A scope in which variables have given values, and in which assignments are recorded only.

    Args:
        layer: The layer that runs in the scope.
        values: List of pairs of a variable and its value, see `values_of`.
        others: Values of other variables that may be read.
    """

    def __init__(
        self,
        layer: keras.layers.Layer,
        values: list[tuple[keras.Variable, Tensor]],
        others: tuple[Tensor, ...] = (),
    ) -> None:
        super().__init__(values)
        self._layer_name = layer.name
        self._reads = autodiff.ReadsOfVariables(known=[*(value for _, value in values), *others])
        self._read: set[int] = set()
        self._is_recorded = autodiff.is_recorded()
        self._found: dict[int, tuple[keras.Variable, Tensor]] = {}
        self._weights = {id(v): value for v, value in values if is_scaled_weight(v)}
        self._updates: dict[int, tuple[keras.Variable, Tensor]] = {}

    def __enter__(self) -> "GivenVariables":
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._reads.__exit__(*exception)

    def check_reads(self) -> None:
        """Raises `ReadElsewhere` if a variable was read without going through the scope."""
        if self._reads.names:
            raise ReadElsewhere(f"reads {', '.join(self._reads.names)} as a tf.Variable")

    def was_read(self, variable: keras.Variable) -> bool:
        return id(variable) in self._read

    @property
    def updates(self) -> list[tuple[keras.Variable, Tensor]]:
        """List of pairs of a variable and the value assigned to it."""
        return list(self._updates.values())

    def assigned(self, variable: keras.Variable, value: Tensor) -> Tensor:
        self._check_is_here()
        self._updates[id(variable)] = variable, value
        if id(variable) in self._weights and autodiff.gradients_end_at_assignments():
            # In plain Keras, too, a weight that a call assigns has the gradient of its new value.
            value = redirect_gradient(value, self._weights[id(variable)])
        return value

    @property
    def found(self) -> list[tuple[keras.Variable, Tensor]]:
        """List of pairs of a variable without a given value that was read, and the value it had."""
        return list(self._found.values())

    def read(self, variable: keras.Variable, value: Tensor | None) -> Tensor | None:
        self._check_is_here()
        self._read.add(id(variable))
        if id(variable) in self._weights:
            self._check_is_recorded(variable)
        if value is None:
            value = self.value_outside(variable)
            if value is not None:
                self._check_has_no_gradient(variable)
                self._found.setdefault(id(variable), (variable, value))
        return value

    def _check_is_here(self) -> None:
        if self._reads.is_outside():
            raise ReadElsewhere("uses variables in a tf.function of its own")

    def _check_has_no_gradient(self, variable: keras.Variable) -> None:
        if is_scaled_weight(variable):
            raise ValueError(
                "Expected a LossScaled layer to use only trainable weights that it "
                f"tracks. Received: layer '{self._layer_name}' reading "
                f"'{variable.path}', whose gradient would come out at the wrong "
                "scale. Make the weight, or the layer that owns it, an attribute of "
                f"'{self._layer_name}'."
            )

    def _check_is_recorded(self, variable: keras.Variable) -> None:
        # Without the scope, TensorFlow would find the gradient even there, because it watches
        # variables.
        if self._is_recorded and not autodiff.is_recorded():
            raise ReadElsewhere(
                f"reads {variable.path} where TensorFlow records nothing, as in "
                "`tf.recompute_grad` (a `keras.RematScope` would do) or `tf.stop_gradient`"
            )


def values_of(
    layer: keras.layers.Layer, weights: list[tuple[keras.Variable, Tensor]]
) -> list[tuple[keras.Variable, Tensor]]:
    """`weights`, pairs of a variable and its value, extended by all other variables of a layer."""
    known = {id(variable) for variable, _ in weights}
    # Such as statistics, seeds and metrics.
    others = {id(v): v for v in [*layer.variables, *layer.metrics_variables]}
    return [*weights, *((v, v.value) for key, v in others.items() if key not in known)]


def scaled_weights_of(layer: keras.layers.Layer) -> list[keras.Variable]:
    """The variables of a layer whose gradients are scaled."""
    return [v for v in layer.trainable_variables if is_scaled_weight(v)]


def is_scaled_weight(variable: keras.Variable) -> bool:
    """Whether the gradient of `variable` is scaled."""
    return (
        variable.trainable
        and not variable.overwrite_with_gradient
        and arrays.is_inexact_dtype(variable.dtype)
    )
