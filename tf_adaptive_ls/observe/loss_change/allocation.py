"""`loss_change`: divides the change of the loss among weights.

Loss Change Allocation (Lan, Liu, Zhou, Yosinski 2019, arXiv 1909.01440) divides the change
of the loss between two points of a training run among the weights. On the straight path from
`before` to `after`, with D = after - before, the share of weight i is

    A_i = D_i * integral over s from 0 to 1 of g_i(before + s D)

It is negative if the change of the weight has lowered the loss. Here g is the exact gradient of
the loss, so all shares add up to the change of the loss. With the gradients of float16 training
instead, the difference is what underflow has lost.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import keras
import numpy as np
from keras import ops, tree

from tf_adaptive_ls.backend import autodiff, functions, keras_internals
from tf_adaptive_ls.backend.arguments import is_number, is_whole
from tf_adaptive_ls.backend.batches import batches_of
from tf_adaptive_ls.backend.tables import Shown, Table
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.observe.checks import check_ready
from tf_adaptive_ls.observe.loss_change.quadrature import RULES
from tf_adaptive_ls.observe.named_layers import named_layers, owners_of_variables
from tf_adaptive_ls.training.given_variables import is_scaled_weight
from tf_adaptive_ls.training.neutral_scales import neutral_scales

DTYPES = ("float32", "as trained")


class NonfiniteLossError(ValueError):
    """The loss or its gradient is not finite at some point of the path."""


@dataclasses.dataclass(frozen=True, eq=False)
class Allocation(Shown):
    """The change of a loss, divided among the weights of a model. Prints as a table.

    All figures are in units of the loss. A negative share has lowered the loss. Notebooks show the
    table as HTML.

    Attributes:
        loss_before, loss_after: The loss at both ends of the path, in float32.
        error: |change of the loss - sum of all shares|.
        layers: Dict of the shares of layers (of their trainable weights), by name as in
            `scale_table`.
        standard_errors: Dict of their standard errors, as estimates for all data that the batches
            were drawn from. NaN if there was only one batch.
        statistics: Share of all other weights: the moving statistics of normalization, which
            gradients do not move.
        helping: Share of trainable weights that have lowered the loss, among those with a non-zero
            share. NaN if there are none.
        weights: Dict of arrays with the share of every single weight, by the path of its tensor.
        intervals: Largest number of intervals that any batch needed.
        batches: Number of batches.
    """

    loss_before: float
    loss_after: float
    error: float
    layers: dict[str, float]
    standard_errors: dict[str, float]
    statistics: float
    helping: float
    weights: dict[str, np.ndarray]
    intervals: int
    batches: int

    @property
    def tensors(self) -> dict[str, float]:
        """Dict of the shares of weight tensors, by path."""
        return {path: float(values.sum()) for path, values in self.weights.items()}

    @property
    def units(self) -> dict[str, np.ndarray]:
        """Dict of the shares of units: arrays of sums over all axes but the last.

        The key is the path of the layer. Tensors of one layer with the same last axis, such as a
        kernel and its bias, are added.
        """
        units: dict[str, np.ndarray] = {}
        for path, values in self.weights.items():
            owner = path.rpartition("/")[0]
            by_unit = values.reshape(-1, values.shape[-1] if values.ndim else 1).sum(axis=0)
            if owner in units and units[owner].shape != by_unit.shape:
                owner = path
            units[owner] = units.get(owner, 0.0) + by_unit
        return units

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values except `weights`, for JSON.

        `pandas.Series` accepts the value of "layers".
        """
        names = [field.name for field in dataclasses.fields(self) if field.name != "weights"]
        return {name: getattr(self, name) for name in names}

    def _parts(self) -> list[str | Table]:
        change = self.loss_after - self.loss_before
        columns = {"layer": "left", "allocated": "right", "standard error": "right"}
        rows = [
            (name, f"{value:+.3g}", f"{self.standard_errors[name]:.2g}")
            for name, value in self.layers.items()
        ]
        if self.statistics:
            rows.append(("(moving statistics)", f"{self.statistics:+.3g}", ""))
        text = (
            f"Loss {self.loss_before:.6g} to {self.loss_after:.6g}, a change of {change:+.3g}, "
            f"allocated but for {self.error:.1g} (batches: {self.batches}, intervals: "
            f"{self.intervals}). {self.helping:.1%} of weights have helped."
        )
        return [text, Table(columns, rows)]


def loss_change(
    model: keras.Model,
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    data: Any,
    *,
    tolerance: float = 1e-3,
    max_intervals: int = 32,
    dtype: Literal["float32", "as trained"] = "float32",
    rule: Literal["simpson", "trapezoid", "first order"] = "simpson",
    batch_size: int = 32,
) -> Allocation:
    """Divides the change of the loss between two points of training among the weights.

    This is Loss Change Allocation (Lan et al. 2019, arXiv 1909.01440). The loss is that of
    `model.compute_loss` at inference, with regularizers, without dropout, and with the moving
    statistics of `BatchNormalization`, which are also coordinates of the path. For the data that
    you pass, the allocation is exact; for other data, it is an estimate.

    The model and its optimizer do not change: weights, statistics, seeds, metrics, scales.

    ```python
    model.compile(optimizer, loss=loss_fn)
    before = model.get_weights()
    model.fit(x, y, epochs=2, verbose=0)
    print(als.loss_change(model, before, model.get_weights(), (x, y)))
    ```

    Args:
        model: A built and compiled `keras.Model`.
        before: Its weights at the first point, as `model.get_weights()` returns them.
        after: Its weights at the second point.
        data: As for `fit`: arrays `(x, y)` or `(x, y, sample_weight)`, or an iterable of such
            batches, such as a list, a `tf.data.Dataset` or a `keras.utils.PyDataset`. Batches are
            weighted by their number of examples.
        tolerance: Float > 0. For each batch, the path is divided into 2, 4, 8 … intervals until the
            sum of all shares differs from the change of the loss by no more than this.
        max_intervals: Int, a power of two, at least 2. Largest number of intervals.
        dtype: "float32", or "as trained" for gradients of trainable weights in the precision and at
            the scales of training. The difference between both was lost to underflow. The loss is
            taken in float32 in either case.
        rule: Quadrature along the path: "simpson", as in the paper, or for comparison "trapezoid"
            or "first order", both with one interval.
        batch_size: Int. The batch size, if `data` are arrays.

    Returns:
        An `Allocation`, which prints as a table.

    Raises:
        ValueError: If an argument is not as described, or if the loss or a gradient is not finite
            at some point of the path.
    """
    check_settings(tolerance, max_intervals)
    for name, value, choices in (("dtype", dtype, DTYPES), ("rule", rule, tuple(RULES))):
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"Expected `{name}` to be one of {choices}. Received: {value!r}.")
    check_ready(model)
    batches = batches_of(data, batch_size)
    path = LossPath(model, tolerance, max_intervals, rule)
    return path.allocate(before, after, batches, as_trained=dtype == DTYPES[1])[-1]


class LossPath:
    """Allocates along paths of one model. Compiled functions are reused for all paths.

    The arguments are those of `loss_change`.
    """

    def __init__(
        self, model: keras.Model, tolerance: float, max_intervals: int, rule: str = "simpson"
    ) -> None:
        self._model, self._rule = model, RULES[rule]
        self._tolerance, self._max_intervals = tolerance, max_intervals
        self._weights = model.weights
        self._places = [i for i, v in enumerate(self._weights) if _is_coordinate(v)]
        self._variables = [self._weights[i] for i in self._places]
        self._trainable = [i for i, v in enumerate(self._variables) if is_scaled_weight(v)]
        self._untrained = sorted({*range(len(self._places))} - {*self._trainable})
        on_path = {id(v) for v in self._variables}
        self._others = [v for v in model.variables if id(v) not in on_path]
        self._in_float32 = functions.compiled(self._loss_and_gradients_in_float32)
        self._as_trained = functions.compiled(self._gradients_as_trained)
        names = [*(name for name, _ in named_layers(model)), model.name]
        owners = owners_of_variables(model)
        owner_of = {i: owners.get(id(self._variables[i]), model.name) for i in self._trainable}
        self._layers = {
            name: [i for i, owner in owner_of.items() if owner == name]
            for name in dict.fromkeys(names)
            if name in owner_of.values()
        }

    def allocate(
        self,
        before: Any,
        after: Any,
        batches: Any,
        as_trained: bool = False,
    ) -> list[Allocation]:
        """A list of `Allocation`s: in float32 and, if requested, as trained."""
        before, after = self._coordinates("before", before), self._coordinates("after", after)
        moves = _flat(after) - _flat(before)
        ends = [[ops.convert_to_tensor(w) for w in weights] for weights in (before, after)]
        total: Any = 0.0
        examples: list[int] = []
        losses, by_layer, most_intervals = [], [], 0
        for number, batch in enumerate(batches):
            batch, size = _as_tensors(batch)
            both, allocated, intervals = self._integral(ends, moves, batch, number, as_trained)
            examples.append(size)
            losses.append(both)
            by_layer.append([self._by_layer(each) for each in allocated])
            total = total + examples[-1] * allocated
            most_intervals = max(most_intervals, intervals)
        if not examples:
            raise ValueError("Expected at least one batch of data. Received: none.")
        shares = np.array(examples) / sum(examples)
        loss_before, loss_after = map(float, shares @ losses)
        found = []
        rows = zip(total / sum(examples), np.swapaxes(by_layer, 0, 1), strict=True)
        for allocated, of_layers in rows:
            divided = self._divided(allocated)
            allocation = Allocation(
                loss_before=loss_before,
                loss_after=loss_after,
                error=abs(loss_after - loss_before - float(allocated.sum())),
                layers=self._named(shares @ of_layers),
                standard_errors=self._named(_standard_errors(of_layers, shares)),
                statistics=float(sum(divided[i].sum() for i in self._untrained)),
                helping=_share_of_negative([divided[i] for i in self._trainable]),
                weights=dict(zip(self._paths(), divided, strict=True)),
                intervals=most_intervals,
                batches=len(examples),
            )
            found.append(allocation)
        return found

    def _by_layer(self, allocated: np.ndarray) -> list[np.ndarray]:
        sums = [values.sum() for values in self._divided(allocated)]
        return [sum(sums[i] for i in tensors) for tensors in self._layers.values()]

    def _named(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self._layers, values.tolist(), strict=True))

    def _coordinates(self, name: str, weights: Any) -> list[np.ndarray]:
        """The values, in a list for all weights, of those that are coordinates of the path."""
        expected = [tuple(v.shape) for v in self._weights]
        received = [np.shape(w) for w in weights] if isinstance(weights, Sequence) else None
        if received != expected:
            raise ValueError(
                f"Expected `{name}` to be a list of the {len(expected)} weights of model "
                f"'{self._model.name}', as its `get_weights` returns it. Received: "
                f"{self._difference(weights, received)}"
            )
        return [np.asarray(weights[i], "float32") for i in self._places]

    def _difference(self, weights: Any, shapes: list[tuple[int, ...]] | None) -> str:
        if shapes is None:
            return f"{weights!r:.100} (of type {type(weights).__name__})."
        if len(shapes) != len(self._weights):
            return f"{len(shapes)}."
        return next(
            f"one of shape {shape} for '{variable.path}', which has {tuple(variable.shape)}."
            for variable, shape in zip(self._weights, shapes, strict=True)
            if shape != tuple(variable.shape)
        )

    def _paths(self) -> Iterator[str]:
        """The path of each tensor, with a number if several tensors have the same path."""
        seen: collections.Counter[str] = collections.Counter()
        for variable in self._variables:
            seen[variable.path] += 1
            count = seen[variable.path]
            yield variable.path if count == 1 else f"{variable.path}_{count}"

    def _divided(self, flat: np.ndarray) -> list[np.ndarray]:
        """Splits a flat array into arrays of the shapes of all tensors."""
        shapes = [tuple(v.shape) for v in self._variables]
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        parts = np.split(flat, ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _integral(
        self, ends: list[list[Tensor]], moves: np.ndarray, batch: Any, number: int, as_trained: bool
    ) -> tuple[tuple[float, float], np.ndarray, int]:
        """The losses at both ends, the share of each weight, and the number of intervals.

        The shares are an array with one row, in float32, or two rows, the second as trained.
        """
        losses = {}

        def gradients(place: float) -> np.ndarray:
            losses[place], found = self._at(place, ends, batch, as_trained)
            if math.isfinite(losses[place]) and np.isfinite(found).all():
                return found
            raise NonfiniteLossError(
                "Expected the loss and its gradients to be finite along the path from `before` to "
                f"`after`. Received: a loss of {losses[place]:.4g}"
                + (", with gradients that are not," if math.isfinite(losses[place]) else "")
                + f" {place:.4g} of the way, for batch {number}."
            )

        for intervals, mean_gradients in self._rule(gradients):
            if 1.0 not in losses:
                gradients(1.0)  # for the loss at the start
            allocated = mean_gradients * moves
            missing = abs(allocated[0].sum() - (losses[1.0] - losses[0.0]))
            if missing <= self._tolerance or intervals >= self._max_intervals:
                break
        return (losses[0.0], losses[1.0]), allocated, intervals

    def _at(
        self, place: float, ends: list[list[Tensor]], batch: Any, as_trained: bool
    ) -> tuple[float, np.ndarray]:
        """The loss, and its gradients as rows, at a position on the path."""
        place = ops.convert_to_tensor(place, "float32")
        others = [ops.convert_to_tensor(v.value) for v in self._others]
        with keras_internals.computing_in_float32(self._model), neutral_scales():
            loss, gradients = self._in_float32(place, *ends, others, batch)
        rows = [gradients]
        if as_trained:
            scale = ops.cast(self._model.optimizer.scale_loss(ops.ones(())), "float32")
            rows.append(list(gradients))
            found = self._as_trained(place, *ends, others, batch, scale)
            for i, gradient in zip(self._trainable, found, strict=True):
                rows[1][i] = gradient
        return float(loss), np.stack([_flat(map(ops.convert_to_numpy, row)) for row in rows])

    def _loss_and_gradients_in_float32(
        self, place: Any, before: Any, after: Any, others: Any, batch: Any
    ) -> Any:
        values = _between(before, after, place)
        return autodiff.value_and_gradients(lambda v: self._loss(v, others, batch), values)

    def _gradients_as_trained(
        self, place: Any, before: Any, after: Any, others: Any, batch: Any, scale: Any
    ) -> Any:
        values = _between(before, after, place)

        def scaled_loss(trained: Any) -> Any:
            current = dict(enumerate(values)) | dict(zip(self._trainable, trained, strict=True))
            loss = self._loss([current[i] for i in range(len(values))], others, batch)
            return loss * ops.cast(scale, loss.dtype)

        _, gradients = autodiff.value_and_gradients(
            scaled_loss, [values[i] for i in self._trainable]
        )
        return [gradient / scale for gradient in gradients]

    def _loss(self, values: Any, others: Any, batch: Any) -> Any:
        x, y, sample_weight = batch
        variables = [*self._variables, *self._others]
        # The scope discards updates of metrics.
        with keras.StatelessScope(list(zip(variables, [*values, *others], strict=True))):
            outputs = self._model(x, training=False)
            return self._model.compute_loss(
                x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=False
            )


def _is_coordinate(variable: keras.Variable) -> bool:
    """Whether the loss depends on `variable`. False for the variables of loss scales."""
    return keras.backend.is_float_dtype(variable.dtype) and not variable.overwrite_with_gradient


def _between(before: Any, after: Any, place: Any) -> Any:
    """A point of the path: exactly `before` at 0, and exactly `after` at 1."""
    return [(1 - place) * b + place * a for b, a in zip(before, after, strict=True)]


def _flat(arrays: Any) -> np.ndarray:
    return np.concatenate([array.astype("float64").ravel() for array in arrays])


def _as_tensors(batch: Any) -> tuple[tuple[Tensor, Tensor, Tensor | None], int]:
    """A batch as `(x, y, sample_weight)`, and its number of examples."""
    parts = keras.utils.unpack_x_y_sample_weight(batch)
    parts = tree.map_structure(lambda x: None if x is None else ops.convert_to_tensor(x), parts)
    shapes = [ops.shape(leaf) for leaf in tree.flatten(parts[0]) if leaf is not None]
    if not shapes or not shapes[0] or not shapes[0][0]:
        raise ValueError(
            "Expected a batch `(x, y)` or `(x, y, sample_weight)` of one example or more. "
            f"Received: {batch!r:.200}"
        )
    return parts, int(shapes[0][0])


def _share_of_negative(arrays: list[np.ndarray]) -> float:
    """The share of negative numbers among the non-zero ones. NaN if there are none."""
    negative = sum(int(np.sum(array < 0)) for array in arrays)
    given = sum(np.count_nonzero(array) for array in arrays)
    return negative / given if given else math.nan


def _standard_errors(values: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Standard errors of `values @ shares`, means over batches of `values` `[batches, …]`."""
    if len(shares) == 1:
        return np.full(values.shape[1:], math.nan)
    deviations = (values - shares @ values) * shares[:, None]
    return np.sqrt(np.sum(deviations**2, axis=0) * len(shares) / (len(shares) - 1))


def check_settings(tolerance: float, max_intervals: int) -> None:
    """Raises a `ValueError` for invalid settings."""
    if not is_number(tolerance) or not tolerance > 0:
        raise ValueError(
            "Expected `tolerance` to be a difference of losses, above 0. Received: "
            f"tolerance={tolerance!r}. The default is 1e-3."
        )
    if not is_whole(max_intervals, 2) or max_intervals & (max_intervals - 1):
        raise ValueError(
            "Expected `max_intervals` to be a power of two, at least 2. Received: "
            f"max_intervals={max_intervals!r}. The default is 32."
        )
