"""`LossScaleMonitor`: records a run, and ends it with a reason when it is stuck."""

import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

import keras

from tf_adaptive_ls.backend import devices, trainer
from tf_adaptive_ls.backend.arguments import check_whole
from tf_adaptive_ls.backend.types import Tensor
from tf_adaptive_ls.models.found_optimizers import adaptive_optimizers
from tf_adaptive_ls.observe.checks import check_path
from tf_adaptive_ls.observe.forward_range.ranges import forward_range
from tf_adaptive_ls.observe.forward_range.room_watch import RoomWatch
from tf_adaptive_ls.observe.nonfinite import Explanation, explain_nonfinite
from tf_adaptive_ls.observe.optimizer_watch import OptimizerWatch
from tf_adaptive_ls.observe.record.writers import RunWriter
from tf_adaptive_ls.observe.sinks import Logs, Sinks
from tf_adaptive_ls.observe.tensorboard import TensorBoardWriter
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer

# How many parts of a model are named in a message.
_NAMED = 5


class StuckTrainingError(RuntimeError):
    """Training skips every step.

    Attributes:
        explanation: An `Explanation` of the batch after those, `None` if it could not
            be run.
    """

    def __init__(self, message: str, explanation: Explanation | None = None) -> None:
        super().__init__(message)
        self.explanation = explanation


class LossScaleMonitor(keras.callbacks.Callback):
    """Shows and records loss scales while a model trains, and never lets it get stuck.

    To the `logs` of Keras it adds

        loss_scale      S
        skipped_steps   how many steps were skipped so far
        underflow       share of its gradients that the worst layer loses to underflow
        float8_flushed  the same of those that it rounds to float8, if any layer does
        forward_room    with `batch`: by how many binades, or doublings, the largest value of
                        the forward pass may still grow before it overflows

    so that the progress bar and `History` show them, and every callback that comes
    after it in the list, such as `CSVLogger`. It reads figures off the device every so
    many steps, between two of them, and never waits for one otherwise.

    Args:
        path: File to append records to, for `load_run`, `plots` and
            `python -m tf_adaptive_ls`, about 150 bytes per layer each. None are kept by
            default. If it cannot be written, is written by another process, or is the
            record of a model with other layers, training goes on without it, with a
            warning.
        every: Int >= 1. Steps from one record to the next. There is one more when
            `fit` ends.
        batch: One small batch of data, as `fit` takes them: inputs `x`, or `(x, y)`, such as
            `(x_train[:8], y_train[:8])`. With it the room of the forward pass is measured and
            recorded, of every layer and operation between layers; a warning says what comes
            within four binades of overflow, or is heading for it, and what overflows inside, as
            `forward_range` says it. Training is the same with it as without, bit for bit. None
            is measured by default.
        tensorboard: Directory for TensorBoard: scalars per layer, and histograms of
            log2 of its gradients.
        optimizer: The `AdaptiveLossScaleOptimizer` to watch, or a dict of several by name. Those
            that are attributes of the model, or in lists or dicts that are, are found without:
            that of `compile`, or `d_optimizer` and `g_optimizer` of a GAN. Where there are
            several, names of figures, files and directories begin or end with theirs:
            `d_optimizer_loss_scale`, "run-d_optimizer.jsonl".
        stuck_after: Int >= 1, or `None` for never. After so many steps skipped in a row
            the next batch is not trained on but looked into, and `fit` raises a
            `StuckTrainingError` that says what is not finite and since when. Weights
            are then as they were after the last step that was not skipped.

    Raises:
        ValueError: If an argument is not as said; from `fit`, if the model has no
            `AdaptiveLossScaleOptimizer`, or its outputs for `batch` are not finite in float32.
    """

    # Batches end here without waiting for the device.
    async_safe = True

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 100,
        batch: Any = None,
        tensorboard: str | os.PathLike[str] | None = None,
        stuck_after: int | None = 100,
        optimizer: AdaptiveLossScaleOptimizer
        | Mapping[str, AdaptiveLossScaleOptimizer]
        | None = None,
    ) -> None:
        super().__init__()
        check_whole("every", every, " of steps")
        if stuck_after is not None:
            check_whole("stuck_after", stuck_after, " of steps")
        for name, value in (("path", path), ("tensorboard", tensorboard)):
            if value is not None:
                check_path(name, value)
        given = optimizer.values() if isinstance(optimizer, Mapping) else [optimizer]
        if optimizer is not None and not all(map(_is_adaptive, given)):
            raise ValueError(
                "Expected `optimizer` to be an AdaptiveLossScaleOptimizer, or a dict of them. "
                f"Received: optimizer={optimizer!r}."
            )
        self.path, self.every, self.batch = path, every, batch
        self._x = None if batch is None else _inputs_of(batch)
        self.tensorboard, self.stuck_after = tensorboard, stuck_after
        self.optimizer = optimizer
        self._look_every = every if stuck_after is None else min(every, stuck_after)
        self._figures: Logs = {}

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._optimizers = self._named_optimizers()
        self._epoch = self._unseen = 0
        self._logs: Logs = {}
        self._watches: dict[str, OptimizerWatch] = {}
        self._sinks: dict[str, Sinks] = {}
        self._room_watch: RoomWatch | None = None

    def _named_optimizers(self) -> dict[str, AdaptiveLossScaleOptimizer]:
        """By name; a single one has none."""
        named = self.optimizer
        if named is None:
            named = adaptive_optimizers(self.model)
        elif not isinstance(named, Mapping):
            named = {"": named}
        if not named:
            kind = type(getattr(self.model, "optimizer", None)).__name__
            raise ValueError(
                "Expected a model compiled with an AdaptiveLossScaleOptimizer, or with one among "
                f"its attributes. Received: model '{self.model.name}' with {kind}. Leave out "
                "LossScaleMonitor, compile the model with that optimizer, or hand it over: "
                "LossScaleMonitor(optimizer=…)."
            )
        return {"": next(iter(named.values()))} if len(named) == 1 else dict(named)

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._epoch = epoch
        self._batches_done = 0

    # Records are made before a batch, not after: Keras may call what is after one in
    # another thread, while the next is being trained on.
    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        # What a callback after this one may restore is known with the first batch.
        self._begin()
        self._unseen += batch - self._batches_done
        self._batches_done = batch
        if self._unseen >= self._look_every:
            self._look()
        if self._stuck:
            self._look_into_next_batch()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if logs is not None:
            self._logs = dict(logs)
            logs.update(self._figures)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        if logs is not None:
            self._logs = dict(logs)
        self._look()
        if logs is not None:
            logs.update(self._figures)

    def on_train_end(self, logs: Logs | None = None) -> None:
        if not self._watches:
            return
        self._look(end=True)
        for sinks in self._sinks.values():
            sinks.close()
        if self._stuck:
            raise StuckTrainingError(
                f"{self._complaint()}\nTo find out where, call "
                "`tf_adaptive_ls.explain_nonfinite(model, x, y)` with a batch of the data."
            )

    def _begin(self) -> None:
        """Watches what there is to be seen: which layers one of several scales it knows later."""
        several = len(self._optimizers) > 1
        for name, optimizer in self._optimizers.items():
            if name in self._watches or (several and not optimizer.built):
                continue
            trainer.sync_state(self.model)
            watch = OptimizerWatch(self.model, optimizer, name, self.every, self.stuck_after)
            self._watches[name] = watch
            self._figures.update(watch.figures)
            sinks = self._sinks[name] = Sinks("LossScaleMonitor")
            if devices.is_first_process():
                path, directory = _path_of(self.path, name), self.tensorboard
                if directory is not None and name:
                    directory = pathlib.Path(directory) / name
                sinks.open(RunWriter.shared, path, watch.layers, watch.first_step)
                sinks.open(TensorBoardWriter, directory, watch.layers, watch.first_step)
            if self._x is not None and self._room_watch is None and self.model.built:
                self._room_watch = RoomWatch(self.model, self._x)
                self._look_at_room(watch.first_step)

    @property
    def _stuck(self) -> bool:
        return any(watch.stuck for watch in self._watches.values())

    def _complaint(self) -> str:
        return " ".join(watch.complaint() for watch in self._watches.values() if watch.stuck)

    def _look(self, end: bool = False) -> None:
        """Reads the scales; records them if it is time."""
        trainer.sync_state(self.model)
        self._unseen = 0
        steps = []
        for name, watch in self._watches.items():
            snapshot = watch.look(end)
            self._figures.update(watch.figures)
            if snapshot is not None:
                self._sinks[name].add(snapshot, self._epoch, self._logs)
                steps.append(snapshot.step)
        if steps:
            self._look_at_room(max(steps))

    def _look_at_room(self, step: int) -> None:
        """Measures the room of the forward pass, and records it."""
        if self._room_watch is None:
            return
        rooms = self._room_watch.look(step)
        if rooms:
            self._figures["forward_room"] = self._room_watch.least
            for sinks in self._sinks.values():
                sinks.add_forward_rooms(step, self._epoch, rooms)

    def _look_into_next_batch(self) -> None:
        """Makes `fit` explain the next batch instead of training on it."""
        train_function, complaint = self.model.train_function, self._complaint()

        def look(*args: Any) -> dict[str, Tensor]:
            self.model.train_function = train_function
            batch = trainer.joined_batch(self.model, next(args[-1]))
            batch = keras.utils.unpack_x_y_sample_weight(batch)
            try:
                explanation = explain_nonfinite(self.model, *batch)
            except Exception as error:  # a step of its own that cannot be run like this
                raise StuckTrainingError(
                    f"{complaint}\nTo find out where, the next batch could not be run "
                    f"again: {error}"
                ) from error
            if explanation.first is None:
                warnings.warn(
                    f"{complaint} All is finite with the next batch, which was looked "
                    "into and not trained on: training goes on.",
                    stacklevel=2,
                )
                return trainer.no_step(self.model, args)
            raise StuckTrainingError(
                "\n".join([complaint, str(explanation), *_overflows(self.model, batch[0])]),
                explanation,
            )

        for watch in self._watches.values():
            watch.stuck = False
        self.model.train_function = look


def _is_adaptive(optimizer: Any) -> bool:
    return isinstance(optimizer, AdaptiveLossScaleOptimizer)


def _inputs_of(batch: Any) -> Any:
    """The inputs in a batch."""
    x = batch[0] if isinstance(batch, tuple) and batch else batch
    leaves = keras.tree.flatten(x)
    if not leaves or not all(getattr(leaf, "shape", ()) and leaf.shape[0] for leaf in leaves):
        raise ValueError(
            "Expected `batch` to be one small batch of data: inputs `x`, or `(x, y)`, of arrays "
            "such as `x_train[:8]`. "
            f"Received: batch={batch!r:.200} (of type {type(batch).__name__})."
        )
    return x


def _overflows(model: keras.Model, x: Any) -> list[str]:
    """A line that names the parts of a model that overflow in the forward pass, if any does."""
    try:
        flagged = forward_range(model, [x], room=0).flagged
    except Exception:  # no model that can be run so: all else has been said
        return []
    if not flagged:
        return []
    names = ", ".join(f"'{part.name}'" for part in flagged[:_NAMED])
    more = f" and {len(flagged) - _NAMED} more" if len(flagged) > _NAMED else ""
    return [
        f"\nIn the forward pass {names}{more} overflow, which no loss scale can mend: "
        "`tf_adaptive_ls.widen(model, batches)` makes them compute in float32."
    ]


def _path_of(path: str | os.PathLike[str] | None, name: str) -> str | os.PathLike[str] | None:
    """The path of the record of one of several optimizers."""
    if path is None or not name:
        return path
    path = pathlib.Path(path)
    return path.with_name(f"{path.stem}-{name}{path.suffix}")
