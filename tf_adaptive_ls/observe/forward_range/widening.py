"""`widen`: makes the parts of a model that overflow in the forward pass compute in float32."""

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import keras

from tf_adaptive_ls.backend import keras_internals
from tf_adaptive_ls.backend.batches import batches_of
from tf_adaptive_ls.numerics.float_format import is_narrow_dtype
from tf_adaptive_ls.observe.checks import check_built
from tf_adaptive_ls.observe.forward_range.parts import Part, parts_of_model
from tf_adaptive_ls.observe.forward_range.ranges import ranges_of
from tf_adaptive_ls.observe.forward_range.result import ForwardRange, PartRange
from tf_adaptive_ls.training.layer_scaling import LayerScaling

# If a widened tensor reaches another part, the next round finds it; few parts are left then.
_MOST_ROUNDS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class Widening:
    """What `widen` has changed in a model.

    ```python
    widening = als.widen(model, [x])
    print(widening.names)
    widening.undo()
    ```

    Attributes:
        reasons: Dict of reasons, by the name of each part that computes in float32 now.
        remaining: Dict of reasons, by the name of each part that still overflows.
        rounds: Number of times that the model was searched.
        share_narrow: Share of the multiplications by weights and in attention that are still
            computed in a narrow dtype, of those that were. From 0 to 1; `None` if parts were
            widened by name.
    """

    reasons: dict[str, str]
    remaining: dict[str, str]
    rounds: int
    share_narrow: float | None
    _undo: list[Callable[[], None]] = dataclasses.field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The parts that compute in float32 now, for `widen(model, names=…)`."""
        return tuple(self.reasons)

    def undo(self) -> None:
        """Restores the dtypes of all parts."""
        while self._undo:
            self._undo.pop()()
        self.reasons.clear()

    def __str__(self) -> str:
        lines = [f"  {name}: {reason}" for name, reason in self.reasons.items()]
        if not lines:
            lines = ["Nothing was widened."]
        else:
            lines = ["Computed in float32:", *lines]
            if self.share_narrow is not None:
                lines.append(f"{100 * self.share_narrow:.0f} % of multiplications stay narrow.")
        if self.remaining:
            lines.append("Not repaired:")
            lines += [f"  {name}: {reason}" for name, reason in self.remaining.items()]
        return "\n".join(lines)


def widen(
    model: keras.Model,
    batches: Any = None,
    room: float = 2,
    *,
    names: Iterable[str] | None = None,
    training: bool = True,
) -> Widening:
    """Makes the parts of a model that overflow in the forward pass compute in float32.

    It calls `forward_range` repeatedly until no part is flagged. All other parts stay as they are.
    A Keras layer is widened with everything inside of it. For an operation between layers, the
    input layer with the fewest multiplications is widened. For your own layer that computes between
    its sublayers, the cheapest sufficient sublayers are widened.

    Layers are changed in place, by dtype policies. Weights, the optimizer and loss scales stay the
    same, and the policies are saved with the model. One exception: layers that your own layer
    creates in its constructor without a `dtype` have the global policy again when the model is
    loaded; widen them by name then.

    ```python
    widening = als.widen(model, [(x[:32], y[:32])])
    print(widening)
    ```

    Args:
        model: A built `keras.Model`, wrapped or not, compiled or not.
        batches: Data as for `fit`: arrays `(x, y)`, or an iterable of batches.
        room: Number of binades by which values must be able to grow, from 0 to 16.
        names: Instead of `batches`: names of the parts to widen, as in `Widening.names`.
        training: Whether layers run as in training.

    Returns:
        A `Widening`, which can undo all changes.

    Raises:
        ValueError: If an argument is not as described. The model is then unchanged.
    """
    check_built(model, "widen")
    if (names is None) == (batches is None):
        received = "neither" if names is None else "both"
        raise ValueError(f"Expected either `batches` or `names`. Received: {received}.")
    work = _Work(model)
    try:
        if names is not None:
            work.widen_by_names(list(names))
            return work.result(None, 0)
        kept = list(batches_of(batches))
        return work.widen_by_ranges(
            lambda only=None: ranges_of(model, kept, room, training, only=only)
        )
    except BaseException:
        work.undo()
        raise


class _Work:
    """The changes made to a model.

    Args:
        model: The model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._parts = {part.name: part for part in parts_of_model(model)}
        self._names = {id(part.operation): name for name, part in self._parts.items()}
        self._reasons: dict[str, str] = {}
        self._unmended: dict[str, str] = {}
        self._undo: list[Callable[[], None]] = []
        self._costs: dict[str, float] = {}

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()

    def result(self, first: ForwardRange | None, rounds: int) -> Widening:
        """The `Widening`. `first` is the `ForwardRange` of the model before."""
        share = None
        if first is not None:
            were = [part for part in first.parts if is_narrow_dtype(part.float_format)]
            total = sum(part.multiplications for part in were)
            narrow = sum(
                part.multiplications for part in were if is_narrow(self._parts[part.name].operation)
            )
            share = narrow / total if total else 1.0
        return Widening(self._reasons, self._unmended, rounds, share, self._undo)

    def widen_by_names(self, names: list[str]) -> None:
        unknown = [name for name in names if name not in self._parts]
        if unknown:
            raise ValueError(
                "Expected names of parts of the model, as of `Widening.names`. Received: "
                f"{unknown[:5]}, which it does not have. It has for example "
                f"{list(self._parts)[1:6]}."
            )
        for name in names:
            self._widen(name, "asked for")

    def widen_by_ranges(self, look: Callable[..., ForwardRange]) -> Widening:
        """Widens parts until none is flagged.

        Args:
            look: Function from the name of one part, or `None` for all, to a `ForwardRange`.
        """
        result = first = look()
        rounds = 1
        while rounds < _MOST_ROUNDS:
            self._costs = {part.name: part.multiplications for part in result.parts}
            # Parts that contain parts come last: fixing the inner ones may be enough.
            flagged = sorted(result.flagged, key=lambda part: self._parts[part.name].is_open)
            if not any([self._fix(part, look) for part in flagged]):
                break
            result, rounds = look(), rounds + 1
        for part in result.flagged:
            self._unmended.setdefault(part.name, ", ".join(part.verdicts))
        if not result.flagged and not result.finite:
            self._unmended[self._model.name] = "outputs are not finite, for no part by itself"
        return self.result(first, rounds)

    def _fix(self, found: PartRange, look: Callable[..., ForwardRange]) -> bool:
        """Widens what removes the verdicts of a part. Returns whether anything was widened."""
        part, verdicts = self._parts[found.name], ", ".join(found.verdicts)
        if found.name in self._unmended:
            return False
        if not isinstance(part.operation, keras.layers.Layer):
            feeder = self._cheapest_feeder(part)
            return feeder is not None and self._widen(feeder, f"feeds {part.name}: {verdicts}")
        if part.is_graph:
            return self._widen(part.name, verdicts)
        around = part if part.is_open else self._user_part_around(part)
        if around is None:
            return self._widen(part.name, verdicts)
        return self._widen_least([part.name], around, part, verdicts, look)

    def _user_part_around(self, part: Part) -> Part | None:
        """The innermost user-defined layer or model that contains a part, or `None`."""
        around = [
            each
            for each in self._parts.values()
            if not each.is_graph and part.name in self._below(each)
        ]
        return max(around, key=lambda each: each.name.count("/"), default=None)

    def _widen_least(
        self, first: list[str], around: Part, part: Part, verdicts: str, look: Callable[..., Any]
    ) -> bool:
        """Widens the cheapest layers that suffice for a part. Returns whether anything was widened.

        If a user-defined layer computes from tensors of two dtypes, the result has the wider dtype,
        or, on TensorFlow, it fails.

        Args:
            first: The names to begin with.
            around: The `Part` that contains the layers.
            part: The name of the part to fix.
            verdicts: The verdicts of that part.
            look: As in `widen_by_ranges`.
        """

        def suffice(names: list[str]) -> bool:
            before, reasons = len(self._undo), dict(self._reasons)
            for name in names:
                self._widen(name, verdicts)
            try:
                return not look(part.name).flagged
            except Exception:  # such a layer may raise anything
                return False
            finally:
                while len(self._undo) > before:
                    self._undo.pop()()
                self._reasons = reasons

        if suffice([]):
            return False
        others = [name for name in self._below(around) if name not in first]
        names = [*first, *sorted(others, key=lambda name: self._costs.get(name, 0.0))]
        if suffice(first):
            needed = first
        elif suffice(names):
            number = bisect.bisect_left(range(len(names)), True, key=lambda n: suffice(names[:n]))
            needed = names[:number]
            for name in reversed(needed):
                fewer = [each for each in needed if each != name]
                needed = fewer if suffice(fewer) else needed
        else:
            self._unmended[part.name] = f"{verdicts}, also if all of '{around.name}' is widened"
            return False
        reason = f"feeds {part.name}: {verdicts}"
        return any([self._widen(n, verdicts if n == part.name else reason) for n in needed])

    def _below(self, part: Part) -> list[str]:
        """Names of the layers inside of a part that are widened as a whole."""
        if not part.is_open:
            return []
        prefix = "" if part.operation is self._model else f"{part.name}/"
        return [
            name
            for name, each in self._parts.items()
            if name.startswith(prefix) and not each.is_open and is_narrow(each.operation)
        ]

    def _cheapest_feeder(self, part: Part) -> str | None:
        """The layer with the fewest multiplications among the inputs of an operation."""
        found: dict[str, float] = {}
        queue, seen = [part.operation], set()
        while queue:
            for node in keras_internals.calls_of(queue.pop()):
                for tensor in node.input_tensors:
                    source: Any = keras_internals.node_of(tensor)
                    operation = None if source is None else source.operation
                    if operation is None or id(operation) in seen:
                        continue
                    seen.add(id(operation))
                    if isinstance(operation, LayerScaling):
                        operation = operation.layer
                    name = self._names.get(id(operation))
                    if not isinstance(operation, keras.layers.Layer):
                        queue.append(operation)
                    elif name is not None and is_narrow(operation):
                        found[name] = self._costs.get(name, 0.0)
        return min(found, key=lambda name: found[name], default=None)

    def _widen(self, name: str, reason: str) -> bool:
        part = self._parts[name]
        undo = keras_internals.make_float32(
            [layer for layer in part.inside if is_narrow(layer)], self._model
        )
        if part.is_graph:
            undo += keras_internals.make_inputs_float32(part.operation)
        if not undo:
            return False
        self._undo += undo
        self._reasons.setdefault(name, reason)
        keras_internals.forget_compiled_functions(self._model)
        return True


def is_narrow(operation: Any) -> bool:
    """Whether an operation is a layer that computes in a dtype with less range than float32."""
    return isinstance(operation, keras.layers.Layer) and is_narrow_dtype(operation.compute_dtype)
