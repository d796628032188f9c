"""`ScalePlan`: the scale of each gradient between the layers of a model.

By default a gradient returns to the scale S of the surroundings between any two
`LossScaled` layers. Inside a Functional or Sequential model it need not: it can
travel from layer to layer at a scale of the layers' own. Tensors that layers
without weights connect (activation, pooling, add, concatenate, …) must share one,
because such a layer hands the scale of its output's gradient on to its inputs.
They form a group. A group travels at the smallest scale of its consumers, for
each knows what its own input gradient can bear, or at S if it holds

- an input or output of the model,
- an input or output of a `LossScaled` layer that is called at several places, or
- a tensor next to an operation that is not known to treat gradients linearly and
  to have no gradients of its own: one with weights, or not of Keras.

Layers that normalise, half of all layers in many models, have few weights and hand on
about what they get. They need no scale apart from their surroundings: such a layer
*passes* gradients on at the scale that its outputs' group travels at, which is then its
own, and the optimizer holds that to those of the consumers. Where nothing else takes its
input, that belongs to the same group.

A plan is derived from the graph of one model, by `planning`, and holds only while that
model runs it: see `running`.
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
    """Tensors whose gradients travel at one scale.

    Args:
        layers: Tuple of `LossScaled` layers, of whose scales it is the smallest. Without
            any it is S, the scale of the surroundings.
    """

    layers: tuple[Any, ...] = ()


AT_S = ScaleGroup()


@dataclasses.dataclass(frozen=True)
class Route:
    """The groups of the tensors at the border of one call of a `LossScaled` layer.

    Args:
        args, kwargs, outputs: The groups of the leaves of each.
        passes_from: The layers that gradients come from which the layer passes on at the
            scale they come at; empty if it does not.
    """

    args: tuple["ScaleGroup", ...] = ()
    kwargs: dict[str, tuple["ScaleGroup", ...]] = dataclasses.field(default_factory=dict)
    outputs: tuple["ScaleGroup", ...] = ()
    passes_from: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class ScalePlan:
    """Routes of the layers of a graph; `planning` makes them.

    Args:
        layers: The `LossScaled` layers that have a route, and
        routes: the `Route` of each, by its `id`.
        models: The model and those nested in it that are planned with it, each
            with the graph that the plan was derived from.
        calls: What the graph computes, in an order in which it can: an operation, and the keys
            of the tensors that it takes and returns.
        inputs: The keys of the inputs of the model.
        order: The layers that have a route, in the order in which they are called, if it is to be
            checked.
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
        """Whether the models still have the graphs that were planned."""
        return all(graph_of(model) is graph for model, graph in self.models)


class _Run:
    """One run of a planned graph; computes the factors of a layer or group once."""

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
        """Whether what is trained, or an input, comes to a layer through the graph."""
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
            # What reads a layer's own variable, not one of many in a vector, XLA on a CPU compiles
            # once for all layers alike. Elsewhere fewer operations, for all layers, count.
            return _factors_of(layer)
        if self._of_layers is None:
            layers = self.plan.layers
            factors = factor_of(ops.stack([each.loss_scale.value for each in layers]))
            ups, downs = (ops.unstack(each, len(layers)) for each in (factors, 1 / factors))
            self._of_layers = dict(zip(map(id, layers), zip(ups, downs, strict=True), strict=True))
        return self._of_layers[id(layer)]


def _is_trained(operation: Any) -> bool:
    layer = getattr(operation, "layer", operation)  # inside a `LossScaled` one
    return bool(getattr(layer, "trainable_variables", ()))


@contextlib.contextmanager
def running(plan: ScalePlan | None, from_inputs: bool = True) -> Iterator[None]:
    """Makes a plan hold for the `LossScaled` layers called inside.

    Args:
        plan: The `ScalePlan`, `None` for none.
        from_inputs: Whether anybody may want gradients by the inputs of the model.
    """
    token = _running.set(None if plan is None else _Run(plan, from_inputs))
    try:
        yield
    finally:
        _running.reset(token)


def note_call(layer: keras.layers.Layer) -> None:
    """Notes that a layer is called in the run of a plan that has a route for it."""
    run = _running.get()
    if run is not None and run.plan.order is not None and id(layer) in run.plan.routes:
        run.called.append(layer)


def was_kept() -> bool:
    """Whether layers have been called in the order that the running plan expects."""
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
    """Whether the plan that holds includes the graph of `model`."""
    run = _running.get()
    return run is not None and run.plan.covers(model)


def route_of(layer: keras.layers.Layer) -> Route | None:
    """The `Route` of `layer` under the plan that holds, `None` if there is none."""
    run = _running.get()
    return None if run is None else run.plan.routes.get(id(layer))


def may_be_passed(layer: keras.layers.Layer) -> bool:
    """Whether gradients that pass a layer may be of use to anybody before it."""
    run = _running.get()
    return run is None or route_of(layer) is None or run.reaches(layer)


def factors(group: ScaleGroup) -> tuple[Tensor, Tensor]:
    """2**r and 2**-r of a `ScaleGroup`, float32 scalars in the running computation.

    Args:
        group: One with layers. Only a single one need not be in the plan that holds.
    """
    run = _running.get()
    if run is not None and route_of(group.layers[0]):
        return run.factors(group)
    return _factors_of(group.layers[0])


def _factors_of(layer: keras.layers.Layer) -> tuple[Tensor, Tensor]:
    factor = factor_of(layer.loss_scale.value)
    return factor, 1 / factor
