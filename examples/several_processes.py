"""Trains the network of digits.py on several processes, with Keras on JAX.

Each process runs this file with Keras's environment variables, which say where the first process
is, how many there are, and which one this is:

    KERAS_BACKEND=jax
    KERAS_DISTRIBUTION_JOB_ADDRESSES=10.0.0.1:1234
    KERAS_DISTRIBUTION_NUM_PROCESSES=2
    KERAS_DISTRIBUTION_PROCESS_ID=0

`--demo 2` starts two of them on this machine. All processes compute the same scales from the
gradients of all; each prints its scales at the end, which are equal.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys


def start_processes(number, arguments):
    """Runs this file in `number` processes. If one of them fails, stops the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for process in range(number):
        environment = {
            "KERAS_BACKEND": "jax",
            "JAX_PLATFORMS": "cpu",
            "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
            "KERAS_DISTRIBUTION_NUM_PROCESSES": str(number),
            "KERAS_DISTRIBUTION_PROCESS_ID": str(process),
        }
        command = [sys.executable, __file__, *arguments]
        processes.append(subprocess.Popen(command, env=os.environ | environment))
    try:
        while any(process.poll() is None for process in processes):
            for process in processes:
                try:
                    process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
                if process.returncode:
                    sys.exit(f"A process ended with {process.returncode}.")
    finally:
        for process in processes:
            process.kill()


def train(epochs, batch_size, record):
    """Trains in one of the processes."""
    import keras
    from digits import build_model, load_data

    import tf_adaptive_ls as als

    number = int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1))
    process = int(os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", 0))
    if number > 1:
        keras.distribution.initialize()
    # Each process reads its own part of the data.
    parallel = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(parallel)

    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy("mixed_float16")
    x, _, y, _ = load_data()
    whole = len(x) // batch_size * batch_size
    x, y = x[:whole][process::number], y[:whole][process::number]

    model = als.wrap_model(build_model())
    model.compile(
        als.AdaptiveLossScaleOptimizer(keras.optimizers.Adam(2e-3)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        x,
        y,
        batch_size // number,
        epochs,
        verbose=2 if process == 0 else 0,
        # Only the first process writes it.
        callbacks=[als.LossScaleMonitor(record, every=10)],
    )
    total = [
        f"{row.name} 2^{row.log2_scale}"
        for row in als.scale_table(model)
        if row.log2_scale is not None
    ]
    print(f"Process {process}: S = {model.optimizer.loss_scale:g}, {', '.join(total)}", flush=True)
    if process == 0:
        print(f"Skipped steps: {model.optimizer.skipped_steps} of {model.optimizer.steps}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", type=int, metavar="N", help="start N processes here")
    parser.add_argument("--epochs", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=64, help="of all; default: %(default)s")
    parser.add_argument(
        "--record", type=pathlib.Path, metavar="FILE", help="where to write what gradients do"
    )
    args = parser.parse_args(argv)
    if args.demo is None:
        train(args.epochs, args.batch_size, args.record)
        return
    options = ["--epochs", str(args.epochs), "--batch-size", str(args.batch_size)]
    if args.record is not None:
        options += ["--record", str(args.record)]
    start_processes(args.demo, options)


if __name__ == "__main__":
    main()
