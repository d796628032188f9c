"""`explain_nonfinite`: finds the first Inf or NaN of a training step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from tf_adaptive_ls.backend import arrays, autodiff, routes
from tf_adaptive_ls.backend.keras_internals import parts_of
from tf_adaptive_ls.backend.routes import Route
from tf_adaptive_ls.backend.tables import Shown, Table
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.numerics.float_format import FloatFormat
from tf_adaptive_ls.numerics.gradient_tap import gradient_tap
from tf_adaptive_ls.observe.checks import check_ready
from tf_adaptive_ls.observe.named_layers import named_layers, owners_of_variables
from tf_adaptive_ls.training.call_tensors import CallTensors, is_inexact
from tf_adaptive_ls.training.given_variables import is_scaled_weight

# How many of the tensors before the first non-finite one are printed.
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class TensorReading:
    """One tensor of a training step.

    Attributes:
        phase: "input", "weights", "forward", "loss" or "backward".
        layer: Name of the layer, as in `scale_table`. Empty if there is none.
        tensor: What the tensor is to that layer.
        dtype: Name of its dtype.
        largest: Its largest finite magnitude. For gradients, this includes the loss scale.
        infs, nans: Number of infinite elements, and of NaN.
    """

    phase: str
    layer: str
    tensor: str
    dtype: str
    largest: float
    infs: int
    nans: int

    @property
    def kind(self) -> str:
        """Which of "Inf", "NaN" or "Inf and NaN" it contains. Empty if all elements are finite."""
        return " and ".join(name for name, n in (("Inf", self.infs), ("NaN", self.nans)) if n)


@dataclasses.dataclass(frozen=True)
class Explanation(Shown):
    """The first tensor of a training step that contains Inf or NaN. Prints as advice and a table.

    ```python
    model.compile(optimizer, loss=loss_fn)
    explanation = als.explain_nonfinite(model, x, y)
    assert explanation.first is None  # all tensors are finite
    ```

    Attributes:
        first: Its `TensorReading`, or `None` if all tensors are finite.
        trail: The `TensorReading`s before it, in the order of computation.
    """

    first: TensorReading | None
    trail: tuple[TensorReading, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, for JSON.

        `pandas.DataFrame` accepts the value of "trail".
        """
        return dataclasses.asdict(self)

    def _parts(self) -> list[str | Table]:
        if self.first is None:
            return ["Every tensor of this training step is finite."]
        text = f"{_sentence(self.first)}\n{_advice(self.first)}"
        readings = [*self.trail[-_SHOWN:], self.first]
        columns = {"phase": "left", "layer": "left", "tensor": "left", "dtype": "left"}
        columns |= {"largest": "right", "Inf": "right", "NaN": "right"}
        rows = [
            (r.phase, r.layer, r.tensor, r.dtype, f"{r.largest:.3g}", f"{r.infs}", f"{r.nans}")
            for r in readings
        ]
        return [text, Table(columns, rows)]


def _sentence(first: TensorReading) -> str:
    count = first.infs + first.nans
    text = f"{count} {'value' if count == 1 else 'values'}"
    where = {
        "input": f"the input data: {first.tensor}",
        "weights": f"the weights: {first.tensor} of layer '{first.layer}'",
        "forward": f"the forward pass: {first.tensor} of layer '{first.layer}'",
        "loss": "the loss",
        "backward": f"the backward pass: {first.tensor} of layer '{first.layer}'",
    }[first.phase]
    return f"The first {first.kind} is in {where} ({text})."


def _advice(first: TensorReading) -> str:
    if first.phase == "input":
        return "Find these examples, and repair or remove them before they reach the model."
    if first.phase == "weights":
        return (
            "Load an earlier checkpoint. A skipped step changes no weight, so something else "
            "did: for example a constraint, or a learning rate so large that an update "
            "overflowed."
        )
    if first.phase == "forward":
        text = (
            "Look for a division by zero, the logarithm or root of a value that can be zero or "
            "negative, or an exponential."
        )
        float_format = FloatFormat(first.dtype)
        if float_format.is_narrow:
            text += (
                f" Or its values grew beyond {float_format.largest:g}, the largest "
                f"{float_format.name}: `tf_adaptive_ls.widen(model, batches)` makes layers that "
                "overflow compute in float32."
            )
        return text
    if first.phase == "loss":
        return (
            "All outputs of the model are finite: look for a logarithm of zero (compute "
            "losses from_logits), a division by zero, or targets out of range."
        )
    return (
        "Everything before it is finite. If gradients have just grown, the step is skipped and "
        "the scale at fault is lowered. If that does not help, the derivative itself is "
        "infinite there, like that of a root or a norm at zero."
    )


def explain_nonfinite(
    model: keras.Model, x: Any, y: Any = None, sample_weight: Any = None
) -> Explanation:
    """Finds the first tensor of a training step that contains Inf or NaN.

    Runs one batch forward and backward, operation by operation, at the current scales. It checks
    the data, the weights, inputs and outputs of every layer, the loss, and all gradients, in this
    order. Nothing changes: neither weights nor statistics, seeds, metrics or scales. It cannot see
    overflows that only happen because a compiler fuses operations.

    ```python
    model.compile(optimizer, loss=loss_fn)
    print(als.explain_nonfinite(model, x, y))
    ```

    Args:
        model: A built and compiled `keras.Model`. The loss is that of its `compute_loss`.
        x: One batch of inputs, as for `fit`.
        y: The targets of that batch.
        sample_weight: The weights of its examples.

    Returns:
        An `Explanation`, which prints as a sentence, advice, and a table.

    Raises:
        ValueError: If `model` is not as described, or `x` is not one batch.
    """
    check_ready(model, "explain_nonfinite")
    batches = isinstance(x, Iterable) and not isinstance(x, Collection) and not hasattr(x, "shape")
    if batches or isinstance(x, keras.utils.PyDataset):
        raise ValueError(
            "Expected one batch of inputs, as arrays. Received: "
            f"x={x!r:.200} (of type {type(x).__name__}). Of a dataset pass one batch: "
            "`explain_nonfinite(model, *next(iter(data)))`."
        )
    x, y, sample_weight = tree.map_structure(
        lambda leaf: None if leaf is None else ops.convert_to_tensor(leaf), (x, y, sample_weight)
    )
    readings = [
        *_readings_of_data(x=x, y=y, sample_weight=sample_weight),
        *_readings_of_weights(model),
        *_readings_of_step(model, x, y, sample_weight),
    ]
    for i, reading in enumerate(readings):
        if reading.kind:
            return Explanation(reading, tuple(readings[:i]))
    return Explanation(None, tuple(readings))


def _readings_of_data(**data: Any) -> Iterator[TensorReading]:
    for name, structure in data.items():
        leaves = tree.flatten(structure)
        for i, leaf in enumerate(leaves):
            if is_inexact(leaf):
                tensor = name if len(leaves) == 1 else f"{name}, part {i + 1} of {len(leaves)}"
                yield _reading("input", "", tensor, leaf)


def _readings_of_weights(model: keras.Model) -> Iterator[TensorReading]:
    owners = owners_of_variables(model)
    for variable in model.variables:
        if keras.backend.is_float_dtype(variable.dtype) and not variable.overwrite_with_gradient:
            owner = owners.get(id(variable), "")
            yield _reading("weights", owner, variable.name, variable.value)


def _readings_of_step(
    model: keras.Model, x: Tensor, y: Tensor, sample_weight: Any
) -> Iterator[TensorReading]:
    variables = [v for v in model.trainable_variables if is_scaled_weight(v)]
    watched = list(_watched(model))

    def run(watch: "_Watch", values: Sequence[Tensor] = ()) -> Tensor:
        # The scope also discards updates of statistics and seeds.
        mapping = list(zip(variables, values, strict=False))
        with keras.StatelessScope(mapping), _intercepted(watched, watch):
            outputs = model(x, training=True)
            return model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight)

    # The first pass finds out which tensors there are. The second pass has a probe on each of them.
    watch = _Watch()
    loss = run(watch)
    for layer, place, tensor in watch.seen:
        reading = _reading("forward", layer, place, tensor)
        if place != _INPUT or reading.kind:  # a tensor that enters one layer has left another
            yield reading
    yield _reading("loss", "", "loss", loss)

    def scaled_loss(tensors: list[Tensor]) -> Tensor:
        values, probes = tensors[: len(variables)], tensors[len(variables) :]
        return model.optimizer.scale_loss(run(_Watch(probes), values))

    values = [ops.convert_to_tensor(v.value) for v in variables]
    _, gradients = autodiff.value_and_gradients(
        scaled_loss, values + [ops.zeros(3) for _ in watch.seen]
    )
    yield from _readings_of_gradients(model, watch, variables, gradients)


def _readings_of_gradients(
    model: keras.Model, watch: "_Watch", variables: list[keras.Variable], gradients: list[Tensor]
) -> list[TensorReading]:
    owners = owners_of_variables(model)
    # In reverse order of the forward pass, which is the order of the backward pass.
    readings = []
    for variable, gradient in zip(variables, gradients, strict=False):
        if gradient is not None:
            gradient, *_ = arrays.dense_parts(gradient)[0]  # gradients of embeddings are sparse
            owner = owners.get(id(variable), "")
            reading = _reading("backward", owner, f"gradient of {variable.name}", gradient)
            readings.append((watch.entered.get(owner, 0) - 0.5, reading))
    probed = zip(watch.seen, gradients[len(variables) :], strict=True)
    for time, ((layer, place, tensor), summary) in enumerate(probed):
        if summary is not None:
            dtype = keras.backend.standardize_dtype(tensor.dtype)
            figures = _figures(ops.convert_to_numpy(summary))
            reading = TensorReading("backward", layer, f"gradient of the {place}", dtype, *figures)
            if place != _INPUT or reading.kind:
                readings.append((time, reading))
    return [reading for _, reading in sorted(readings, key=lambda pair: -pair[0])]


_INPUT, _OUTPUT, _LOGITS = "input", "output", "logits"


class _Watch:
    """Records every floating-point tensor that enters or leaves an operation.

    Args:
        probes: A tensor `[3]` for each of these tensors. The gradient of a probe is the summary of
            the tensor's gradient. `None` to record only.
    """

    def __init__(self, probes: list[Tensor] | None = None) -> None:
        self.seen: list[Any] = []  # (layer, place, tensor)
        # by layer: the number of recorded tensors when its call began
        self.entered: dict[str, int] = {}
        self._probes = probes

    def __call__(
        self,
        name: str,
        call: Callable[..., Any] | Route,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        args, kwargs = self._probed(name, _INPUT, (args, kwargs))
        self.entered.setdefault(name, len(self.seen))
        return self._probed(name, _OUTPUT, call(*args, **kwargs))

    def _probed(self, name: str, place: str, structure: Any) -> Any:
        found = CallTensors(structure, are_outputs=place == _OUTPUT)
        tensors = [self._see(name, place, tensor) for tensor in found.tensors]
        logits = dict(found.logits)
        if place == _OUTPUT:
            logits = {at: self._see(name, _LOGITS, tensor) for at, tensor in logits.items()}
        return found.replaced(tensors, logits=logits)

    def _see(self, name: str, place: str, tensor: Tensor) -> Tensor:
        probe = None if self._probes is None else self._probes[len(self.seen)]
        self.seen.append((name, place, tensor))
        if probe is None:
            return tensor
        (tapped,) = gradient_tap(
            [tensor], [None], [probe], lambda gradients, _: _summary(*gradients)
        )
        return tapped


@contextlib.contextmanager
def _intercepted(operations: list[tuple[str, Any]], watch: _Watch) -> Iterator[None]:
    """Context manager in which all calls of `operations`, pairs of a name and one, pass `watch`."""
    with contextlib.ExitStack() as undo:
        for name, operation in operations:
            undo.callback(routes.Route(operation, "call", functools.partial(watch, name)).end)
        yield


def _watched(model: keras.Model) -> Iterator[tuple[str, keras.layers.Layer]]:
    """Pairs of a name and an operation: layers, and operations between them."""
    # Keras layers may run the layers inside of them in loops, whose values cannot be read outside.
    closed: str | tuple[str, ...] = ()
    for name, layer in named_layers(model):
        if not name.startswith(closed):
            yield name, layer
            if type(layer).__module__.startswith("keras."):
                closed = f"{name}/"
    for part in parts_of(model):
        for operation in getattr(part, "operations", ()) if isinstance(part, keras.Model) else ():
            if not isinstance(operation, keras.layers.Layer):
                yield operation.name, operation


def _reading(phase: str, layer: keras.layers.Layer, tensor: str, value: Tensor) -> TensorReading:
    dtype = keras.backend.standardize_dtype(value.dtype)
    figures = _figures(ops.convert_to_numpy(_summary(value)))
    return TensorReading(phase, layer, tensor, dtype, *figures)


def _summary(x: Tensor) -> Tensor:
    """Largest finite magnitude, number of infinities, and number of NaNs: a tensor `[3]`."""
    x = ops.cast(arrays.real_numbers(x), "float32")
    magnitudes = ops.where(ops.isfinite(x), ops.abs(x), 0.0)
    infs, nans = (ops.sum(ops.cast(faults, "float32")) for faults in (ops.isinf(x), ops.isnan(x)))
    return ops.stack([ops.max(magnitudes, initial=0.0), infs, nans])


def _figures(summary: np.ndarray) -> tuple[float, int, int]:
    return float(summary[0]), int(summary[1]), int(summary[2])
