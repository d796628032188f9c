"""The parts of a model: layers at any depth, and operations between layers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.models.walk import layers_inside
from tf_adaptive_ls.numerics.float_format import narrowest
from tf_adaptive_ls.training.companion import Companion, companion_of
from tf_adaptive_ls.training.layer_scaling import LayerScaling


class Part(NamedTuple):
    """A layer, or an operation between layers.

    Attributes:
        name: Its path in the model, as in `scale_table`.
        operation: The `keras.Operation`.
        inside: The layer, and all layers inside of it that are not parts themselves. A Keras layer,
            such as attention or an RNN, is one part with everything inside of it.
        autocasts: Whether it reads its weights in its compute dtype.
        casts: Whether it also casts floating-point inputs to its compute dtype.
        is_open: Whether it consists of other parts: a model, or a user-defined layer with layers
            inside.
        is_graph: Whether it is a model of which every operation is a part.
    """

    name: str
    operation: Any
    inside: tuple[keras.layers.Layer, ...] = ()
    autocasts: bool = False
    casts: bool = False
    is_open: bool = False
    is_graph: bool = False

    @property
    def is_random(self) -> bool:
        """Whether the part itself draws random numbers."""
        return any(
            isinstance(value, keras.random.SeedGenerator)
            for layer in self.inside
            for value in vars(layer).values()
        )

    @property
    def runs_alone(self) -> bool:
        """Whether the part can be run by itself in two dtypes with the same result.

        The random numbers for one seed differ between dtypes.
        """
        if self.is_graph:
            return False
        return not self.is_random or "training" in self.operation.call_signature_parameters

    @property
    def dtype(self) -> str | None:
        """The compute dtype of a layer. `None` for an operation, whose dtype depends on its inputs.

        For a user-defined layer that computes between layers inside of it, the narrowest dtype of
        these.
        """
        layer = self.operation
        if not isinstance(layer, keras.layers.Layer):
            return None
        graph = keras_internals.graph_of(layer) if self.is_graph else None
        if graph is None:
            inside = keras_internals.parts_of(layer) if self.is_open else self.inside[:1]
            layers = [each for each in inside if not isinstance(each, LayerScaling)]
            return narrowest(each.compute_dtype for each in layers).name
        # A Functional model casts to the dtypes of its `Input`s, whatever its policy is. A
        # Sequential model without an `Input` has one with the dtype of its first layer.
        return narrowest(tensor.dtype for tensor in graph.inputs).name


def parts_of_model(model: keras.Model) -> list[Part]:
    """All parts of a model, each once: first the model, then the parts inside of it."""
    seen = {id(model)}
    parts = [_part(model, model.name)]
    for operation in _inside(model):
        parts += _parts(operation, "", seen)
    return parts


def _parts(operation: Any, prefix: str, seen: set[int]) -> Iterator[Part]:
    name = prefix + operation.name
    if isinstance(operation, LayerScaling):
        if isinstance(operation, Companion):
            return  # a companion is inside of the layer that it scales
        operation = operation.layer
    if id(operation) in seen or isinstance(operation, keras.layers.InputLayer):
        return
    seen.add(id(operation))
    yield _part(operation, name)
    for each in _inside(operation):
        yield from _parts(each, f"{name}/", seen)


def _part(operation: Any, name: str) -> Part:
    if not isinstance(operation, keras.layers.Layer):
        return Part(name, operation)
    is_open = isinstance(operation, keras.Model) or bool(_inside(operation))
    layers = [operation] if is_open else keras_internals.parts_of(operation)
    graph = keras_internals.graph_of(operation) if isinstance(operation, keras.Model) else None
    companion = companion_of(operation)
    autocast = operation.autocast if companion is None else companion.casts_inputs
    return Part(
        name,
        operation,
        tuple(layer for layer in layers if not isinstance(layer, LayerScaling)),
        autocast,
        graph is not None or (autocast and keras_internals.converts_inputs(operation)),
        is_open,
        graph is not None,
    )


def _inside(operation: Any) -> list[Any]:
    """What parts an operation contains: everything in a model and in a user-defined layer.

    A Keras layer may run layers in loops, whose values cannot be read outside. Changes to the
    policy of a single layer inside of it would also be lost when the model is loaded.
    """
    if not isinstance(operation, keras.layers.Layer):
        return []
    if isinstance(operation, keras.Model):
        graph = keras_internals.graph_of(operation)
        operations = [] if graph is None else keras_internals.operations_of(graph)
        return [*operations, *layers_inside(operation)]
    return [] if keras_internals.computes_as_keras_does(operation) else layers_inside(operation)
