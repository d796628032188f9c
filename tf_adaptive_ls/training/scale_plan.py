"""`ScalePlan`: the scale of each gradient between the layers of a model.

Without a plan, gradients return to the scale S of the surroundings between any two scaled
layers. In a Functional or Sequential model, a plan lets gradients stay at layer scales from
layer to layer. Tensors that are connected by layers without weights (activation, pooling, add,
concatenate, …) form a *group*: such layers do not change the scale of gradients, so all of
these gradients have the same scale. The scale of a group is the smallest scale of the layers
that consume it, because each scale suits the input gradient of its own layer. It is S if the
group contains

- an input or output of the model,
- an input or output of a scaled layer that is called more than once, or
- a tensor next to an operation that may not be linear in gradients, or may have gradients of
  its own: an operation with weights, or one that is not from Keras.

Normalization layers, half of the layers of many models, have few weights, and their input
gradients are about as large as their output gradients. They need no scale of their own. Such a
layer *passes* gradients on: it works at the scale of the group of its outputs, and the optimizer
limits this scale to those of the group's consumers. If nothing else consumes its input, its
input belongs to the same group.

`planning` derives a plan from the graph of a model. The plan applies only while that model runs
the graph; see `running`.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from tf_adaptive_ls.backend import devices, functions
from tf_adaptive_ls.backend.keras_internals import graph_of
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.scale_state import factor_of

_running: contextvars.ContextVar["_Run | None"] = contextvars.ContextVar(
    "running_scale_plan", default=None
)


@dataclasses.dataclass(frozen=True)
class ScaleGroup:
    """Tensors whose gradients have the same scale.

    Args:
        layers: Tuple of scaled layers. The scale of the group is the smallest of theirs. If empty,
            the scale is S.
    """

    layers: tuple[Any, ...] = ()


AT_S = ScaleGroup()


@dataclasses.dataclass(frozen=True)
class Route:
    """The groups of the tensors at the border of one call of a scaled layer.

    Args:
        args: The groups of the leaves of the positional arguments.
        kwargs: The groups of the leaves of each keyword argument.
        outputs: The groups of the leaves of the outputs.
        passes_from: If the layer passes gradients on at the scale at which they arrive, the layers
            that they come from.
    """

    args: tuple["ScaleGroup", ...] = ()
    kwargs: dict[str, tuple["ScaleGroup", ...]] = dataclasses.field(default_factory=dict)
    outputs: tuple["ScaleGroup", ...] = ()
    passes_from: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePlan:
    """The routes of the layers of a graph. `planning` makes it.

    Args:
        layers: The scaled layers that have a route.
        routes: Dict from the `id` of each of them to its `Route`.
        models: Pairs of a planned model and its graph: the model itself, and models nested in it.
        calls: The operations of the graph in an order in which they can run, each with the keys of
            the tensors that it takes and of those that it returns.
        inputs: The keys of the inputs of the model.
        order: The layers with a route in the order of their calls, if this order is to be checked.
    """

    layers: tuple[Any, ...]
    routes: dict[int, Route]
    models: tuple[Any, ...]
    calls: tuple[Any, ...] = ()
    inputs: tuple[Any, ...] = ()
    order: tuple[Any, ...] | None = None

    def covers(self, model: keras.layers.Layer) -> bool:
        return any(model is planned for planned, _ in self.models)

    def is_current(self) -> bool:
        """Whether the models still have the graphs from which the plan was derived."""
        return all(graph_of(model) is graph for model, graph in self.models)


class _Run:
    """One run of a planned graph. It computes the factors of each layer and group once."""

    def __init__(self, plan: ScalePlan, from_inputs: bool) -> None:
        self.plan = plan
        self._from_inputs = from_inputs
        self._reached: set[int] | None = None
        self._of_layers: dict[int, tuple[Tensor, Tensor]] | None = None
        self._of_groups: dict[ScaleGroup, tuple[Tensor, Tensor]] = {}
        self.called: list[Any] = []

    def factors(self, group: ScaleGroup) -> tuple[Tensor, Tensor]:
        if group not in self._of_groups:
            ups, downs = zip(*map(self._factors_of_one, group.layers), strict=True)
            alone = len(ups) == 1
            self._of_groups[group] = (
                ups[0] if alone else ops.min(ops.stack(ups)),
                downs[0] if alone else ops.max(ops.stack(downs)),
            )
        return self._of_groups[group]

    def reaches(self, layer: keras.layers.Layer) -> bool:
        """Whether the input of a layer depends on a trained weight or a model input."""
        if self._reached is None:
            reached = self._reached = set()
            tensors: set[Any] = set(self.plan.inputs) if self._from_inputs else set()
            for operation, taken, returned in self.plan.calls:
                comes = not tensors.isdisjoint(taken)
                if comes:
                    reached.add(id(operation))
                if comes or _is_trained(operation):
                    tensors.update(returned)
        return id(layer) in self._reached

    def _factors_of_one(self, layer: keras.layers.Layer) -> tuple[Tensor, Tensor]:
        if functions.are_always_compiled() and not devices.on_gpu():
            # On a CPU, XLA compiles operations on one layer's own variable once for all layers
            # alike. On other devices, the number of operations counts: they are done for all layers
            # at once.
            return _factors_of(layer)
        if self._of_layers is None:
            layers = self.plan.layers
            factors = factor_of(ops.stack([each.loss_scale.value for each in layers]))
            ups, downs = (ops.unstack(each, len(layers)) for each in (factors, 1 / factors))
            self._of_layers = dict(zip(map(id, layers), zip(ups, downs, strict=True), strict=True))
        return self._of_layers[id(layer)]


def _is_trained(operation: Any) -> bool:
    layer = getattr(operation, "layer", operation)  # the layer inside of a `LossScaled`
    return bool(getattr(layer, "trainable_variables", ()))


@contextlib.contextmanager
def running(plan: ScalePlan | None, from_inputs: bool = True) -> Iterator[None]:
    """Context manager in which a plan applies to the scaled layers that are called.

    Args:
        plan: The `ScalePlan`, or `None` for no plan.
        from_inputs: Whether gradients of the inputs of the model may be needed.
    """
    token = _running.set(None if plan is None else _Run(plan, from_inputs))
    try:
        yield
    finally:
        _running.reset(token)


def note_call(layer: keras.layers.Layer) -> None:
    """Records a call of a layer that has a route in the running plan."""
    run = _running.get()
    if run is not None and run.plan.order is not None and id(layer) in run.plan.routes:
        run.called.append(layer)


def was_in_order() -> bool:
    """Whether the layers were called in the order that the running plan expects."""
    run = _running.get()
    return (
        run is None
        or run.plan.order is None
        or (
            len(run.called) == len(run.plan.order)
            and all(a is b for a, b in zip(run.called, run.plan.order, strict=True))
        )
    )


def is_covered(model: keras.layers.Layer) -> bool:
    """Whether the running plan includes the graph of `model`."""
    run = _running.get()
    return run is not None and run.plan.covers(model)


def route_of(layer: keras.layers.Layer) -> Route | None:
    """The `Route` of `layer` in the running plan, or `None`."""
    run = _running.get()
    return None if run is None else run.plan.routes.get(id(layer))


def may_be_passed(layer: keras.layers.Layer) -> bool:
    """Whether anything before a layer may need the gradients that pass it."""
    run = _running.get()
    return run is None or route_of(layer) is None or run.reaches(layer)


def factors(group: ScaleGroup) -> tuple[Tensor, Tensor]:
    """2**r and 2**-r of a `ScaleGroup`, as float32 scalars of the running computation.

    Args:
        group: A group with layers. If it has more than one, it must be in the running plan.
    """
    run = _running.get()
    if run is not None and route_of(group.layers[0]):
        return run.factors(group)
    return _factors_of(group.layers[0])


def _factors_of(layer: keras.layers.Layer) -> tuple[Tensor, Tensor]:
    factor = factor_of(layer.loss_scale.value)
    return factor, 1 / factor
