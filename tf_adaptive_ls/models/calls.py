"""The layer calls that a model consists of, from which its scale plan is derived."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
from keras import tree


@dataclasses.dataclass(frozen=True)
class GraphCall:
    """One call of an operation. Tensors are known by keys.

    Attributes:
        operation: The layer or operation that is called.
        args: The keys of the leaves of its arguments by position, `None` for what is no tensor
            of the graph.
        kwargs: Likewise a dict of those by name.
        inputs: The keys of all tensors that it takes.
        outputs: The keys of those that it returns.
        takes_values: Whether it takes what may have gradients and is no tensor of the graph: a
            variable, or what was computed from one.
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
        calls: List of `GraphCall`, in an order in which they can be run.
        inputs: The keys of its inputs.
        ends: The keys of all tensors that are used outside of these calls: what it returns, losses
            that it adds, and what it leaves elsewhere.
        order: What has a scale and is called, in the order of the calls; `None` if not known.
    """

    calls: list[GraphCall]
    inputs: tuple[int, ...]
    ends: tuple[int, ...]
    order: tuple[object, ...] | None = None


def graph_call(
    node: Any, operation: Any, key_of: Callable[..., Any], takes_values: bool = False
) -> GraphCall:
    """The `GraphCall` of a node of Keras.

    Args:
        node: The node.
        operation: What stands for its operation.
        key_of: Function of a `KerasTensor` to its key.
        takes_values: As the attribute.
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
