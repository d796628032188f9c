"""What does loss scaling add to a step on a GPU? Compiles steps on a machine without a GPU.

XLA compiles for a GPU from a description of it, and the optimized module shows what would be
launched. Nothing runs, so times are unknown. What XLA tunes on the device, such as algorithms of
matmuls, may differ there. Each model is in mixed float16, on JAX, under SGD with momentum:

    no scaling   plain float16
    Keras        `LossScaleOptimizer`
    ours         `wrap_model` and `AdaptiveLossScaleOptimizer`
    in float8    ours with `Float8()`
    saved in 8 bits  ours with `saved_activations`
    RematScope   Keras's, with all layers rematerialized

    kernels      launched in a step; for a conditional, those of the longer branch
    copies       the number of copies among them
    cond.        conditionals, at each of which the host waits for the device
    MiB          read and written by all kernels
    temp.        MiB of temporary memory at a time
    launches     by the host: of graphs of many kernels, and of kernels outside of graphs
    s            to trace and compile on this machine

and the kernels that compute only loss scaling, by the function that they come from.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

# What XLA dumps of the sequence of launches.
DUMPED = tempfile.TemporaryDirectory(prefix="kernels")
os.environ["KERAS_BACKEND"] = "jax"
# Only the compiler of the GPU plugin is used, which must not time kernels on a device.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false "
    f"--xla_dump_to={DUMPED.name} --xla_dump_hlo_module_re=jit_train_step"
)

import jax  # noqa: E402
import keras  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from keras import layers  # noqa: E402

import tf_adaptive_ls as als  # noqa: E402
from benchmarks import hlo, overhead, report, zoo  # noqa: E402
from tf_adaptive_ls.backend import devices  # noqa: E402

PLAIN, KERAS, OURS, FLOAT8, SAVED, BOTH, REMAT = WAYS = (
    "no scaling",
    "Keras",
    "ours",
    "in float8",
    "saved in 8 bits",
    "in float8, saved in 8 bits",
    "RematScope",
)
# Bytes that cuBLAS reserves, whatever the model.
WORKSPACE = 32 * 2**20

# What XLA must know of a GPU, from NVIDIA's data sheets.
GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {core_count}
  fpus_per_core: {fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_bandwidth}
  l2_cache_size: {l2_cache_size}
  clock_rate_ghz: {clock_rate_ghz}
  device_memory_size: {device_memory_size}
  shared_memory_per_block_optin: {shared_memory_per_block}
  cuda_compute_capability {{ major: {major} minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "NVIDIA {name}"
"""
GPUS = {
    "H200": {
        "major": 9,
        "core_count": 132,
        "fpus_per_core": 128,
        "shared_memory_per_core": 233472,
        "shared_memory_per_block": 232448,
        "memory_bandwidth": 4_800_000_000_000,
        "l2_cache_size": 52428800,
        "clock_rate_ghz": 1.98,
        "device_memory_size": 151397597184,
    },
    "A100": {
        "major": 8,
        "core_count": 108,
        "fpus_per_core": 64,
        "shared_memory_per_core": 167936,
        "shared_memory_per_block": 166912,
        "memory_bandwidth": 2_039_000_000_000,
        "l2_cache_size": 41943040,
        "clock_rate_ghz": 1.41,
        "device_memory_size": 85899345920,
    },
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and one batch of data.

    Args:
        build: `() -> keras.Model`.
        batch: `batch_size -> (x, y)`.
        batch_size: Number of examples.
        left_out: The ways in which it cannot be trained.
    """

    build: Callable
    batch: Callable
    batch_size: int
    left_out: tuple = ()


def mlp(depth=20, width=1024):
    x = inputs = keras.Input((width,))
    for _ in range(depth):
        x = layers.Dense(width, "relu")(x)
    return keras.Model(inputs, layers.Dense(10, dtype="float32")(x))


def colors(batch_size):
    """Gray images, and one of three colors for each pixel."""
    gray, _ = overhead.floats(32, 32, 1)(batch_size)
    return gray, np.zeros((batch_size, 32, 32), "int32")


# On JAX, Keras cannot rematerialize a BatchNormalization: its `training` becomes a tracer.
CASES = {
    "ResNet-20": Case(zoo.resnet, overhead.floats(32, 32, 3), 512, left_out=(REMAT,)),
    "transformer": Case(lambda: overhead.bert(2, 128, 4, 64, 1000), overhead.tokens(64, 1000), 128),
    "MLP 20 x 1024": Case(mlp, overhead.floats(1024), 512),
    "BERT-small": Case(overhead.bert, overhead.tokens(128), 32),
    "U-Net": Case(zoo.unet, colors, 512),
    "ResNet-50": Case(
        lambda: keras.applications.ResNet50(weights=None, classes=1000, classifier_activation=None),
        overhead.floats(224, 224, 3),
        64,
        left_out=(REMAT,),
    ),
}


def gpu(name):
    """A JAX device that need not exist."""
    config = GPU.format(name=name, **GPUS[name])
    topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
    return topology.devices[0]


def model_of(case, way):
    """A model to train in one of `WAYS`."""
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16")
    with keras.RematScope("full") if way == REMAT else contextlib.nullcontext():
        model = case.build()
    optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
    if way in (OURS, FLOAT8, SAVED, BOTH):
        model = als.wrap_model(
            model,
            float8=als.Float8() if way in (FLOAT8, BOTH) else None,
            saved_activations="float8_e5m2" if way in (SAVED, BOTH) else None,
        )
        optimizer = als.AdaptiveLossScaleOptimizer(optimizer)
    elif way in (KERAS, REMAT):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, jit_compile=True, auto_scale_loss=False)
    return model


def compiled(case, way, device):
    """The step of a model, compiled for a device, and the seconds it took."""
    # Functions that ask for the device that runs a step, which is another one here.
    devices.on_gpu = lambda: True
    capability = device.compute_capability
    devices.has_products_of_8_bits = lambda: float(capability) >= 8.9
    model, batch = model_of(case, way), case.batch(case.batch_size)
    model._symbolic_build(data_batch=batch)
    model.optimizer.build(model.trainable_variables)
    state = model._get_jax_state(
        trainable_variables=True,
        non_trainable_variables=True,
        optimizer_variables=True,
        metrics_variables=True,
    )
    sharding = jax.sharding.SingleDeviceSharding(device)
    state, batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (state, batch)
    )
    start = time.perf_counter()
    step = jax.jit(model.train_step, donate_argnums=0).trace(state, batch).lower().compile()
    return step, time.perf_counter() - start


def figures_of(case, way, device):
    """What a step of a model launches."""
    step, seconds = compiled(case, way, device)
    (module,) = step.runtime_executable().hlo_modules()
    program = hlo.Program(module.as_serialized_hlo_module_proto())
    of_scaling = collections.Counter()
    for kernel in filter(lambda each: each.is_of_scaling, program.kernels):
        ((_, function), _), *_ = kernel.owners.most_common(1)
        of_scaling[function] += 1
    return {
        "kernels": len(program.kernels),
        "copies": sum(kernel.is_copy for kernel in program.kernels),
        "conditionals": len(program.conditionals),
        "bytes": sum(kernel.bytes for kernel in program.kernels),
        "temporary": step.memory_analysis().temp_size_in_bytes,
        "launches": _launches(),
        "seconds": round(seconds, 1),
        "of_scaling": dict(of_scaling.most_common()),
    }


def _launches():
    """The number of launches by kind in the step that was compiled last."""
    (path,) = pathlib.Path(DUMPED.name).glob("*thunk_sequence_after_thunk_passes.txt")
    found = hlo.launches(path.read_text())
    path.unlink()
    return found


def rows(result):
    """Rows of the table for one model."""
    base = result["ways"].get(KERAS)
    for way, figures in result["ways"].items():

        def with_ratio(name, unit=1, less=0, figures=figures, way=way):
            text = f"{figures[name] / unit:,.0f}"
            if base is None or way == KERAS:
                return text
            return f"{text} ({(figures[name] - less) / (base[name] - less):.2f})"

        yield (
            way,
            with_ratio("kernels"),
            figures["copies"],
            figures["conditionals"],
            with_ratio("bytes", 2**20),
            with_ratio("temporary", 2**20, less=WORKSPACE),
            sum(figures["launches"].values()),
            f"{figures['seconds']:.0f}",
        )


HEADER = ["", "kernels", "copies", "cond.", "MiB", "temp.", "launches", "s"]
INTRODUCTION = """# What scaling adds to a step on a GPU

Training steps, compiled for a GPU on a machine without one, and not run. `kernels`: number of
kernels that a step launches (for a conditional, those of its longer branch); `copies`: number of
copies among them; `cond.`: number of conditionals, at which the host waits; `MiB`: bytes read and
written; `temp.`: temporary memory in MiB; `launches`: number of launches by the host, of graphs and
of kernels outside of graphs; `s`: seconds to trace and compile. In brackets: relative to Keras
(temporary memory without the 32 MiB of cuBLAS).
"""


def plot_memory(results, title):
    """A bar per way and model: temporary memory relative to Keras's."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    ways = (OURS, SAVED, REMAT)
    for i, way in enumerate(ways):
        places, heights = [], []
        for place, ways_of_model in enumerate(each["ways"] for each in results):
            if way in ways_of_model and KERAS in ways_of_model:
                memory = [ways_of_model[w]["temporary"] - WORKSPACE for w in (way, KERAS)]
                places.append(place + (i - 1) * 0.27)
                heights.append(memory[0] / memory[1])
        bars = axes.bar(places, heights, 0.25, label=way)
        axes.bar_label(bars, fmt="%.2f", fontsize="small")
    axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(results)), [each["name"].split(", ")[0] for each in results])
    axes.set(ylabel="temporary memory, relative to Keras's", title=title)
    axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.25))
    return figure


def write_report(directory):
    names = [f"{name}, {gpu_name}" for name in CASES for gpu_name in GPUS]
    results = report.load_results(directory, names)
    for gpu_name in GPUS:
        of_gpu = [each for each in results if each["name"].endswith(f", {gpu_name}")]
        if of_gpu:
            report.save_plot(directory, f"memory_{gpu_name.lower()}", plot_memory(of_gpu, gpu_name))
    parts = [INTRODUCTION]
    for result in results:
        parts.append(f"## {result['name']}\n\nBatches of {result['batch_size']}.\n")
        parts.append(report.markdown(HEADER, rows(result)) + "\n")
        of_scaling = result["ways"].get(OURS, {}).get("of_scaling")
        if of_scaling:
            told = ", ".join(f"{number} `{name}`" for name, number in of_scaling.items())
            parts.append(f"Ours, kernels of scaling alone: {told}.\n")
    parts.append(report.provenance_text(results) + "\n")
    report.save_text(directory, "\n".join(parts))


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "kernels")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="MODEL")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, metavar="WAY")
    parser.add_argument("--gpu", choices=GPUS, default="H200", help="default: %(default)s")
    args = parser.parse_args(argv)
    # Full stack traces, to see whose code a kernel is.
    jax.config.update("jax_traceback_in_locations_limit", -1)
    device = gpu(args.gpu)
    names = args.only or (["MLP 20 x 1024"] if args.quick else list(CASES))
    with report.progress() as progress:
        task = progress.add_task("", total=len(names) * len(args.ways))
        for name in names:
            case, title = CASES[name], f"{name}, {args.gpu}"
            # Figures of the same case from earlier runs stay.
            found = report.load_results(args.output, [title])
            before = found[0] if found else {}
            ways = before.get("ways", {})
            earlier = [before["provenance"]] if before else []
            for way in args.ways:
                progress.update(task, description=f"{name}, {way}")
                if way not in case.left_out:
                    ways[way] = figures_of(case, way, device)
                progress.advance(task)
            ways = {way: ways[way] for way in WAYS if way in ways}
            result = {"name": title, "batch_size": case.batch_size, "ways": ways}
            result["earlier"] = before.get("earlier", []) + earlier
            report.save_result(args.output, result)
    write_report(args.output)


if __name__ == "__main__":
    main()
