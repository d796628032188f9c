"""Finds float16 operations that should compute in float32."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras

from tf_adaptive_ls.backend.keras_internals import graph_of, nodes_of, parts_of
from tf_adaptive_ls.numerics.float_format import is_narrow_dtype
from tf_adaptive_ls.observe.named_layers import named_layers
from tf_adaptive_ls.training.layer_scaling import LayerScaling

_ACTIVATIONS = (keras.activations.softmax, keras.activations.log_softmax)
# Operations between layers, by the names of their classes, which are not public in Keras.
_OPERATIONS = {"Softmax": "softmax", "LogSoftmax": "softmax", "Logsumexp": "logsumexp"}


@dataclasses.dataclass(frozen=True)
class NarrowReduction:
    """A float16 operation that loses precision in the forward pass.

    No loss scale can help it.

    Attributes:
        name: Name of the layer or operation, as in `scale_table`.
        reason: What it computes in a narrow dtype.
    """

    name: str
    reason: str


def narrow_reductions(model: keras.layers.Layer) -> tuple[NarrowReduction, ...]:
    """Finds float16 operations that should compute in float32.

    These are: a softmax, also inside of attention; a logsumexp; an activity regularizer, whose
    gradient is the loss scale itself, and which Keras cannot add to a float32 loss on TensorFlow;
    and an output of the model, because its loss is computed from it.

    Args:
        model: Any `keras.Model` or layer.

    Returns:
        Tuple of `NarrowReduction`, in the order of the model.
    """
    reasons: dict[str, list[str]] = {}

    def add(name: str, reason: str) -> None:
        known = reasons.setdefault(name, [])
        if reason not in known:
            known.append(reason)

    for name, layer in named_layers(model):
        for part in parts_of(layer):
            if not isinstance(part, LayerScaling) and is_narrow_dtype(part.compute_dtype):
                for reason in _reasons_of(part):
                    add(name, reason)
    graph: Any = graph_of(model) if isinstance(model, keras.Model) else None
    for node in nodes_of(graph) if graph else ():
        narrow = any(is_narrow_dtype(tensor.dtype) for tensor in node.input_tensors)
        kind = type(node.operation).__name__
        if narrow and not isinstance(node.operation, keras.layers.Layer) and kind in _OPERATIONS:
            add(node.operation.name, _OPERATIONS[kind])
        for tensor in node.output_tensors:
            if is_narrow_dtype(tensor.dtype) and any(tensor is output for output in graph.outputs):
                add(node.operation.name, "output of the model")
    return tuple(NarrowReduction(name, ", ".join(each)) for name, each in reasons.items())


def advice(reductions: tuple[NarrowReduction, ...]) -> str:
    """What to do about `narrow_reductions`, to print below a table. Empty if there are none."""
    lines = [f"  {each.name}: {each.reason}" for each in reductions]
    heading = 'Better computed in float32, by `dtype="float32"`:'
    return "\n".join([heading, *lines]) if lines else ""


def _reasons_of(layer: keras.layers.Layer) -> Iterator[str]:
    if isinstance(layer, keras.layers.Softmax):
        yield "softmax"
    if getattr(layer, "activation", None) in _ACTIVATIONS:
        yield "softmax"
    if layer.activity_regularizer is not None:
        yield "activity regularizer"
