"""`CallGraph`: the layer calls of a model, from which its scale plan is derived."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import tree


@dataclasses.dataclass(frozen=True)
class GraphCall:
    """One call of an operation. Tensors are identified by keys.

    Attributes:
        operation: The layer or operation.
        args: The keys of the leaves of the positional arguments. `None` for a leaf that is not a
            tensor of the graph.
        kwargs: The keys of the leaves of each keyword argument, likewise.
        inputs: The keys of all tensors that the call takes.
        outputs: The keys of all tensors that it returns.
        takes_values: Whether it takes a value outside of the graph that may have gradients: a
            variable, or something computed from one.
    """

    operation: Any
    args: tuple[int | None, ...]
    kwargs: dict[str, tuple[int | None, ...]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    takes_values: bool = False


@dataclasses.dataclass(frozen=True)
class CallGraph:
    """What a model computes.

    Attributes:
        calls: List of `GraphCall`, in an order in which they can run.
        inputs: The keys of the inputs of the model.
        ends: The keys of all tensors that are used outside of the calls: outputs, losses that the
            model adds, and tensors that it stores.
        order: The scaled layers in the order of their calls. `None` if not known.
    """

    calls: list[GraphCall]
    inputs: tuple[int, ...]
    ends: tuple[int, ...]
    order: tuple[object, ...] | None = None


def graph_call(
    node: Any, operation: Any, key_of: Callable[..., Any], takes_values: bool = False
) -> GraphCall:
    """Makes the `GraphCall` of a Keras node.

    Args:
        node: The node.
        operation: The operation to record for it.
        key_of: Function from a `KerasTensor` to its key.
        takes_values: As in `GraphCall`.
    """

    def keys(structure: Any) -> tuple[int | None, ...]:
        return tuple(
            key_of(leaf) if isinstance(leaf, keras.KerasTensor) else None
            for leaf in tree.flatten(structure)
        )

    return GraphCall(
        operation,
        keys(node.arguments.args),
        {name: keys(value) for name, value in node.arguments.kwargs.items()},
        tuple(map(key_of, node.input_tensors)),
        tuple(map(key_of, node.output_tensors)),
        takes_values,
    )
