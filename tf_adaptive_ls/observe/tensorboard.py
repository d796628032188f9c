"""Writes what a run shows for TensorBoard."""

import contextlib

from tf_adaptive_ls.numerics import spectrum


class TensorBoardWriter:
    """Scalars and histograms per layer.

    A histogram shows how many gradients lie in each binade: its axis is log2 of their
    magnitude, without any scale.

    Args:
        path: Directory to write event files to.
        layers: Pairs of a name and a `LossScaled` layer.
        step: How many steps had been taken or skipped before.

    Raises:
        OSError: If they cannot be written, now or later.
    """

    def __init__(self, path, layers, step):
        # Here, so that only who asks for it needs TensorFlow on another backend.
        import tensorflow as tf

        self.path = path
        self._tf = tf
        self._names = [name for name, _ in layers]
        with self._as_os_errors():
            self._writer = tf.summary.create_file_writer(str(path))
            self._writer.init()

    def add(self, snapshot, epoch, logs):
        """Adds a `Snapshot`; Keras's own callback adds what it has logged."""
        values = [
            self._scalar("log2_loss_scale", snapshot.log2_loss_scale),
            self._scalar("skipped_steps", snapshot.skipped_steps),
        ]
        for name, layer in zip(self._names, snapshot.layers, strict=True):
            values += [
                self._scalar(f"log2_scale/{name}", snapshot.log2_loss_scale + layer.log2_scale),
                self._scalar(f"overflows/{name}", layer.overflows),
            ]
            if layer.spectrum.nonzero:
                values += [
                    self._scalar(f"underflow/{name}", layer.spectrum.underflow_share),
                    self._scalar(f"subnormal/{name}", layer.spectrum.subnormal_share),
                    self._histogram(f"gradient_binades/{name}", layer),
                ]
            if layer.operands is not None and layer.operands.nonzero:
                values += [
                    self._scalar(f"float8_saturations/{name}", layer.saturations),
                    self._scalar(f"float8_flushed/{name}", layer.flushed_share),
                ]
        self._write(snapshot.step, values)

    def add_loss_change(self, step, since, epoch, allocation, as_trained):
        """Adds what the weights of every layer were given, see `RunWriter.add_loss_change`."""
        values = [
            self._scalar("loss_change/error", allocation.error),
            self._scalar("loss_change/helping", allocation.helping),
        ]
        kinds = {"loss_change": allocation, "loss_change_as_trained": as_trained}
        for kind, found in kinds.items():
            if found is not None:
                values += [
                    self._scalar(f"{kind}/{name}", value) for name, value in found.layers.items()
                ]
        self._write(step, values)

    def close(self):
        with self._as_os_errors():
            self._writer.close()

    def _write(self, step, values):
        summary = self._tf.compat.v1.Summary(value=values).SerializeToString()
        with self._as_os_errors(), self._writer.as_default():
            self._tf.summary.experimental.write_raw_pb(summary, step)
            self._writer.flush()

    @contextlib.contextmanager
    def _as_os_errors(self):
        try:
            yield
        except self._tf.errors.OpError as error:
            raise OSError(error.message) from error

    def _scalar(self, tag, value):
        return self._value(tag, "scalars", self._tf.make_tensor_proto(value, "float32"))

    def _histogram(self, tag, layer):
        counts = layer.spectrum.counts[1 : spectrum.NONFINITE]
        exponents = layer.spectrum.float_format.exponents
        # Left and right edge and count of each bin: what TensorBoard's plugin stores
        # (tensorboard/plugins/histogram/summary_v2.py).
        bins = [
            (
                binade - layer.log2_sampled_at,
                binade + 1 - layer.log2_sampled_at,
                count,
            )
            for binade, count in zip(exponents, counts, strict=True)
        ]
        return self._value(tag, "histograms", self._tf.make_tensor_proto(bins, "float64"))

    def _value(self, tag, plugin, tensor):
        summary = self._tf.compat.v1.SummaryMetadata
        metadata = summary(plugin_data=summary.PluginData(plugin_name=plugin))
        return self._tf.compat.v1.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)
