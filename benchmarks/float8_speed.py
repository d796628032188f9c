"""Are float8 matmuls faster on this device? Steps of a network of wide dense layers, on JAX.

All layers use float8. Plain Keras in bfloat16 and in float16 is compared with

    emulated   float8 numbers in 16-bit tensors, which works on every device
    native     operands cast to float8, so that XLA calls float8 matmuls; the library does so by
               itself on devices that have them, with the XLA flag that this benchmark sets

The ways take turns, a step each. The table has the median time, the ratio to plain bfloat16 within
rounds (with quartiles), the number of float8 matmul calls in the compiled step, and the loss after
the last step. On a device without float8 matmuls, "native" only casts, and there are no calls.
"""

import argparse
import os
import statistics
import time
from unittest import mock

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks import compute, report
from tf_adaptive_ls.backend import devices

FLAG = "--xla_gpu_enable_triton_gemm=false"
DEPTH = 4
CALL = "__cublas$lt$matmul$f8"


class Way:
    """A compiled model under one way, and its state.

    Args:
        policy: A dtype policy.
        float8: A `Float8`, or `None` for plain Keras.
        native: Whether operands are cast.
        batch: A pair of arrays.
    """

    def __init__(self, policy, float8, native, batch):
        import jax

        keras.config.set_dtype_policy(policy)
        keras.utils.set_random_seed(0)
        inputs = x = keras.Input(batch[0].shape[1:])
        for _ in range(DEPTH):
            x = layers.Dense(x.shape[-1], "relu", kernel_initializer="he_normal")(x)
        model = keras.Model(inputs, x)
        inner = keras.optimizers.SGD(1e-3)
        if float8 is not None:
            model = als.wrap_model(model, float8=float8)
            optimizer = als.AdaptiveLossScaleOptimizer(inner)
        elif policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(inner)
        else:
            optimizer = inner
        model.compile(optimizer, "mse", auto_scale_loss=False)
        model.optimizer.build(model.trainable_variables)
        kinds = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        self._state = tuple([keras.ops.copy(v.value) for v in kind] for kind in kinds)
        self._batch = jax.device_put(batch)
        step = jax.jit(model.train_step, donate_argnums=0)
        with mock.patch.object(devices, "has_products_of_8_bits", lambda: native):
            start = time.perf_counter()
            self._step = step.lower(self._state, self._batch).compile()
            self.seconds_to_compile = time.perf_counter() - start
        self.calls = self._step.as_text().count(f'custom_call_target="{CALL}"')
        self.seconds = []

    def take(self):
        """Takes a step."""
        start = time.perf_counter()
        logs, self._state = self._step(self._state, self._batch)
        self.loss = float(logs["loss"])
        self.seconds.append(time.perf_counter() - start)


def measure(width, rounds, policies):
    """Rows of the table."""
    rng = np.random.default_rng(0)
    batch = tuple(rng.normal(size=(width, width)).astype("float32") for _ in range(2))
    everything = als.Float8.hybrid(layer_filter=lambda layer: True)
    ways = {}
    for policy in policies:
        short = policy.removeprefix("mixed_")
        ways[f"{short}, plain Keras"] = Way(policy, None, False, batch)
        ways[f"{short}, float8 emulated"] = Way(policy, everything, False, batch)
        ways[f"{short}, float8 native"] = Way(policy, everything, True, batch)
    for _ in range(rounds + 3):
        for way in ways.values():
            way.take()
    plain = next(iter(ways.values())).seconds
    for name, way in ways.items():
        pairs = [a / b for a, b in zip(way.seconds[3:], plain[3:], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        yield (
            name,
            f"{1000 * statistics.median(way.seconds[3:]):.2f}",
            f"{middle:.2f} ({low:.2f} … {high:.2f})",
            way.calls,
            f"{way.seconds_to_compile:.1f}",
            f"{way.loss:.6g}",
        )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "float8_speed")
    parser.add_argument("--widths", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--rounds", type=int, default=30, help="default: %(default)s")
    args = parser.parse_args(argv)
    if not compute.ON_JAX:
        raise SystemExit("Products of 8 bits are on JAX only. Run it with --backend jax.")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}".strip()
    widths, rounds = ([256], 5) if args.quick else (args.widths, args.rounds)
    parts = [f"# Steps in float8\n\n{DEPTH} dense layers, `XLA_FLAGS={FLAG}`.\n"]
    for width in widths:
        header = (
            f"width and batch {width}",
            "ms per step",
            "ratio",
            "products of 8 bits",
            "s to compile",
            "loss",
        )
        rows = list(measure(width, rounds, ("mixed_bfloat16", "mixed_float16")))
        parts.append(report.markdown(header, rows) + "\n")
    result = {"name": "steps", "provenance": report.provenance()}
    parts.append(report.provenance_text([result]) + "\n")
    args.output.mkdir(parents=True, exist_ok=True)
    report.save_text(args.output, "\n".join(parts))


if __name__ == "__main__":
    main()
