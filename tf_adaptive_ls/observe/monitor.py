"""`LossScaleMonitor`: records a run, and ends it with an explanation if it is stuck."""

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

# The largest number of parts to name in a message.
_NAMED = 5


class StuckTrainingError(RuntimeError):
    """Raised by `LossScaleMonitor` when every step is skipped.

    ```python
    model.compile(optimizer, loss=loss_fn)
    try:
        model.fit(x, y, verbose=0, callbacks=[als.LossScaleMonitor(stuck_after=20)])
    except als.StuckTrainingError as error:
        print(error.explanation)
    ```

    Attributes:
        explanation: An `Explanation` of the batch after the skipped ones. `None` if it could not be
            run.
    """

    def __init__(self, message: str, explanation: Explanation | None = None) -> None:
        super().__init__(message)
        self.explanation = explanation


class LossScaleMonitor(keras.callbacks.Callback):
    """Shows and records loss scales during training, and ends training that only skips steps.

    It adds the following to the `logs` of Keras:

        loss_scale      the loss scale S
        skipped_steps   total number of skipped steps
        underflow       largest share of gradients that any layer loses to underflow
        float8_flushed  largest share of gradients that any layer rounds to zero in float8
        forward_room    with `batch`: by how many binades (factors of two) the largest value of the
                        forward pass can grow before it overflows

    The progress bar, `History`, and every callback after it in the list, such as `CSVLogger`, show
    these figures. The monitor reads them from the device between two steps, and otherwise never
    waits for the device.

    ```python
    model.compile(optimizer, loss=loss_fn)
    monitor = als.LossScaleMonitor("run.jsonl", every=1)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[monitor]).history
    print(history["loss_scale"], history["skipped_steps"])
    ```

    Args:
        path: File to append records to, for `load_run`, `plots` and `python -m tf_adaptive_ls`. A
            record takes about 150 bytes per layer. Default: no file. If the file cannot be written,
            is being written by another process, or is the record of a model with other layers,
            training continues without it, with a warning.
        every: Int >= 1. Number of steps between two records. There is one more record when `fit`
            ends.
        batch: One small batch of data, as for `fit`: inputs `x`, or `(x, y)`, such as
            `(x_train[:8], y_train[:8])`. With it, the monitor measures the room of the forward pass
            of every layer, and of every operation between layers. It warns about parts that have
            less than four binades of room or will overflow soon, and about overflows inside of
            layers, as `forward_range` does. Training does not change, bit for bit.
        tensorboard: Directory for TensorBoard: scalars per layer, and histograms of the log2 of its
            gradients.
        optimizer: The `AdaptiveLossScaleOptimizer` to monitor, or a dict of several by name. By
            default, the monitor finds all that are attributes of the model, or in lists or dicts
            that are: the one of `compile`, or `d_optimizer` and `g_optimizer` of a GAN. If there
            are several, their names become part of the names of figures, files and directories:
            `d_optimizer_loss_scale`, "run-d_optimizer.jsonl".
        stuck_after: Int >= 1, or `None` for never. After this many skipped steps in a row, `fit`
            does not train on the next batch, but raises a `StuckTrainingError` that says what is
            not finite, and since when. The weights are those after the last step that was not
            skipped.

    Raises:
        ValueError: If an argument is not as described. From `fit`, if the model has no
            `AdaptiveLossScaleOptimizer`, or if its outputs for `batch` are not finite in float32.
    """

    # Allows Keras to end batches without waiting for the device.
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
        """The optimizers by name. A single one has an empty name."""
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

    # Records are made before a batch, not after one: Keras may call `on_train_batch_end` in another
    # thread while the next batch is being trained on.
    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        # Started at the first batch, when later callbacks may have restored the model.
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
        """Starts an `OptimizerWatch` for each optimizer, and opens files."""
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
        """Reads the scales, and records them if it is time."""
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
            except Exception as error:  # a user-defined step that cannot be run like this
                raise StuckTrainingError(
                    f"{complaint}\nTo find out where, the next batch could not be run "
                    f"again: {error}"
                ) from error
            if explanation.first is None:
                warnings.warn(
                    f"{complaint} With the next batch, which was examined and not trained "
                    "on, all values are finite. Training continues.",
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
    """The inputs of a batch."""
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
    """A sentence that names parts that overflow in the forward pass, or an empty string."""
    try:
        flagged = forward_range(model, [x], room=0).flagged
    except Exception:  # a model that cannot be run like this; the rest of the message is enough
        return []
    if not flagged:
        return []
    names = ", ".join(f"'{part.name}'" for part in flagged[:_NAMED])
    more = f" and {len(flagged) - _NAMED} more" if len(flagged) > _NAMED else ""
    return [
        f"\nIn the forward pass {names}{more} overflow, which no loss scale can prevent: "
        "`tf_adaptive_ls.widen(model, batches)` makes them compute in float32."
    ]


def _path_of(path: str | os.PathLike[str] | None, name: str) -> str | os.PathLike[str] | None:
    """The path of the record of one of several optimizers."""
    if path is None or not name:
        return path
    path = pathlib.Path(path)
    return path.with_name(f"{path.stem}-{name}{path.suffix}")
