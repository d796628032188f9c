"""`LossScaleMonitor`: records a run, and ends it with a reason when it is stuck."""

import collections
import contextlib
import os
import warnings
from typing import Any, TypeAlias

import keras

from tf_adaptive_ls.numerics import backend
from tf_adaptive_ls.observe.named_layers import scaled_layers
from tf_adaptive_ls.observe.nonfinite import Explanation, explain_nonfinite
from tf_adaptive_ls.observe.run_record import RunWriter, check_path
from tf_adaptive_ls.observe.snapshot import Snapshot
from tf_adaptive_ls.observe.tensorboard import TensorBoardWriter
from tf_adaptive_ls.training.optimizer import AdaptiveLossScaleOptimizer

_RECENT = 6

# Of so many steps at least a share is told of, and which is worth a word.
_SKIPS_SEEN_OVER = 300
_MANY_SKIPS = 0.05

Logs: TypeAlias = dict[str, Any]


class StuckTrainingError(RuntimeError):
    """Training skips every step.

    Attributes:
        explanation: An `Explanation` of the batch after those, `None` if it could not
            be run.
    """

    def __init__(self, message: str, explanation: Explanation | None = None):
        super().__init__(message)
        self.explanation = explanation


class LossScaleMonitor(keras.callbacks.Callback):
    """Shows and records loss scales while a model trains, and never lets it get stuck.

    To the `logs` of Keras it adds

        loss_scale      S
        skipped_steps   how many steps were skipped so far
        underflow       share of its gradients that the worst layer loses to underflow
        float8_flushed  the same of those that it rounds to float8, if any layer does

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
        tensorboard: Directory for TensorBoard: scalars per layer, and histograms of
            log2 of its gradients.
        stuck_after: Int >= 1, or `None` for never. After so many steps skipped in a row
            the next batch is not trained on but looked into, and `fit` raises a
            `StuckTrainingError` that says what is not finite and since when. Weights
            are then as they were after the last step that was not skipped.

    Raises:
        ValueError: If an argument is not as said; from `fit`, if the model is not
            compiled with an `AdaptiveLossScaleOptimizer`.
    """

    # Batches end here without waiting for the device.
    async_safe = True

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 100,
        tensorboard: str | os.PathLike[str] | None = None,
        stuck_after: int | None = 100,
    ):
        super().__init__()
        check_steps("every", every)
        if stuck_after is not None:
            check_steps("stuck_after", stuck_after)
        for name, value in (("path", path), ("tensorboard", tensorboard)):
            if value is not None:
                check_path(name, value)
        self.path, self.every = path, every
        self.tensorboard, self.stuck_after = tensorboard, stuck_after
        self._look_every = every if stuck_after is None else min(every, stuck_after)
        self._figures: Logs = {}

    def on_train_begin(self, logs: Logs | None = None) -> None:
        if not isinstance(self.model.optimizer, AdaptiveLossScaleOptimizer):
            raise ValueError(
                "Expected a model compiled with an AdaptiveLossScaleOptimizer. Received: model "
                f"'{self.model.name}' with {type(self.model.optimizer).__name__}. Leave out "
                "LossScaleMonitor, or compile the model with that optimizer."
            )
        self._epoch = 0
        self._logs: Logs = {}
        self._recent: collections.deque[Snapshot] = collections.deque(maxlen=_RECENT)
        # What a callback after this one may restore is known with the first batch.
        self._begun = self._stuck = False

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        self._epoch = epoch
        self._batches_done = 0

    # Records are made before a batch, not after: Keras may call what is after one in
    # another thread, while the next is being trained on.
    def on_train_batch_begin(self, batch: int, logs: Logs | None = None) -> None:
        if not self._begun:
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
        if not self._begun:
            return
        self._look(end=True)
        self._writers.write("close")
        if self._stuck:
            raise StuckTrainingError(
                f"{self._complaint()}\nTo find out where, call "
                "`tf_adaptive_ls.explain_nonfinite(model, x, y)` with a batch of the data."
            )

    def _begin(self):
        self._layers = scaled_layers(self.model)
        snapshot = self._take_snapshot()
        self._unseen, self._last_recorded = 0, snapshot.step
        self._skips_since, self._skips_told = snapshot, False
        self._overflows = [layer_snapshot.overflows for layer_snapshot in snapshot.layers]
        self._writers = Writers("LossScaleMonitor")
        if backend.is_first_process():
            self._writers.open(RunWriter.shared, self.path, self._layers, snapshot.step)
            self._writers.open(TensorBoardWriter, self.tensorboard, self._layers, snapshot.step)
        self._begun = True

    def _take_snapshot(self):
        backend.sync_state(self.model)
        snapshot = Snapshot.of([layer for _, layer in self._layers], self.model.optimizer)
        self._figures = {
            "loss_scale": 2.0**snapshot.log2_loss_scale,
            "skipped_steps": snapshot.skipped_steps,
            "underflow": snapshot.worst_underflow,
        }
        if snapshot.worst_flushed is not None:
            self._figures["float8_flushed"] = snapshot.worst_flushed
        return snapshot

    def _look(self, end=False):
        """Reads the scales; notices if training is stuck; records them if it is time."""
        snapshot = self._take_snapshot()
        self._unseen = 0
        self._recent.append(snapshot)
        stuck_after = self.stuck_after
        self._stuck = stuck_after is not None and snapshot.skipped_in_a_row >= stuck_after
        self._look_at_skips(snapshot)
        new = snapshot.step - self._last_recorded
        if new >= self.every or (new > 0 and (end or self._stuck)):
            self._last_recorded = snapshot.step
            self._writers.write("add", snapshot, self._epoch, self._logs)

    def _look_at_skips(self, snapshot):
        """Warns, once, if many steps are skipped, though never many in a row."""
        steps = snapshot.step - self._skips_since.step
        if steps < _SKIPS_SEEN_OVER or self._skips_told:
            return
        skipped = snapshot.skipped_steps - self._skips_since.skipped_steps
        self._skips_since = snapshot
        if skipped > _MANY_SKIPS * steps:
            self._skips_told = True
            warnings.warn(
                f"{skipped} of the last {steps} steps were skipped, since their gradients were not "
                f"finite.{self._blamed()} Call `scale_table(model)` to see how near to overflow "
                "layers are; layers without a loss scale of their own are not in it.",
                stacklevel=2,
            )

    def _look_into_next_batch(self):
        """Makes `fit` explain the next batch instead of training on it."""
        train_function = self.model.train_function

        def look(*args):
            self.model.train_function = train_function
            batch = backend.joined_batch(self.model, next(args[-1]))
            batch = keras.utils.unpack_x_y_sample_weight(batch)
            try:
                explanation = explain_nonfinite(self.model, *batch)
            except Exception as error:  # a step of its own that cannot be run like this
                raise StuckTrainingError(
                    f"{self._complaint()}\nTo find out where, the next batch could not be run "
                    f"again: {error}"
                ) from error
            if explanation.first is None:
                warnings.warn(
                    f"{self._complaint()} All is finite with the next batch, which was looked "
                    "into and not trained on: training goes on.",
                    stacklevel=2,
                )
                return backend.no_step(self.model, args)
            raise StuckTrainingError(f"{self._complaint()}\n{explanation}", explanation)

        self._stuck = False
        self.model.train_function = look

    def _complaint(self):
        last = self._recent[-1]
        since = last.step - last.skipped_in_a_row
        scales = ", ".join(f"2^{m.log2_loss_scale} at {m.step}" for m in self._recent)
        text = (
            f"Training is stuck: the last {last.skipped_in_a_row} steps were skipped, all since "
            f"step {since}, since their gradients were not finite. Weights are as they were "
            f"then. Loss scale S: {scales}."
        )
        return text + self._blamed()

    def _blamed(self):
        """A sentence, or nothing."""
        blamed = [
            f"'{name}' ({layer_snapshot.overflows - before})"
            for (name, _), layer_snapshot, before in zip(
                self._layers, self._recent[-1].layers, self._overflows, strict=True
            )
            if layer_snapshot.overflows > before
        ]
        return f" Layers blamed in this run: {', '.join(blamed)}." if blamed else ""


class Writers:
    """What a callback writes to: where that fails, it warns and leaves it at that.

    Args:
        callback: The name of the callback.
    """

    def __init__(self, callback):
        self._callback = callback
        self._writers = []

    def open(self, kind, path, layers, step):
        """Adds `kind(path, layers, step)`, if there is a path."""
        if path is not None:
            with self._only_warning(path):
                self._writers.append(kind(path, layers, step))

    def write(self, method, *args):
        """Calls a method of all of them."""
        for writer in tuple(self._writers):
            self._writers.remove(writer)
            with self._only_warning(writer.path):
                getattr(writer, method)(*args)
                self._writers.append(writer)

    @contextlib.contextmanager
    def _only_warning(self, path):
        try:
            yield
        except OSError as error:
            warnings.warn(
                f"{self._callback} cannot write to '{path}' and leaves it at that: {error}. "
                "Training goes on.",
                stacklevel=2,
            )


def check_steps(name, value):
    """Raises a `ValueError` if `value` is no number of steps."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"Expected `{name}` to be a whole number of steps, at least 1. "
            f"Received: {name}={value!r}."
        )
