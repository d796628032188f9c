"""Processes killed while they train, or while they write a checkpoint.

One run is killed again and again, and started again each time; then it is left to end. It has to
end at the weights, scales and optimizer state of a run that nobody disturbed, bit for bit, and
its record has to say the same.
"""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np

import tf_adaptive_ls as als
from benchmarks.faults import Outcome
from benchmarks.faults.worker import STEPS

RECORDED = ("steps", "skipped_steps", "log2_loss_scale", "log2_scales", "overflows", "spectra")
DATASETS = 109  # as many as a checkpoint has


class Run:
    """A run in a directory of its own."""

    def __init__(self, directory):
        self._directory = directory
        directory.mkdir()

    def start(self, *arguments):
        root = pathlib.Path(__file__).parents[2]
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.faults.worker",
                str(self._directory),
                *map(str, arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    def finish(self):
        """Runs it to its end; returns what it complained of, `None` for nothing."""
        process = self.start()
        _, errors = process.communicate()
        return errors.strip().splitlines()[-1] if process.returncode else None

    def results(self):
        with np.load(self._directory / "final.npz") as arrays:
            values = [arrays[name] for name in arrays]
        record = als.load_run(self._directory / "run.jsonl")
        return values, [getattr(record, name) for name in RECORDED]


def killed_in_training(run, rng):
    """Starts the run and kills it after some steps."""
    with run.start() as process:
        for _ in range(rng.randint(1, 3 * STEPS)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.01))
        process.send_signal(signal.SIGKILL)


def killed_in_checkpoint(run, rng):
    """Starts the run and kills it while it writes a checkpoint.

    Not the first: Keras's `BackupAndRestore` cannot go on from a part of that.
    """
    with run.start(rng.randint(DATASETS + 1, 3 * DATASETS)) as process:
        process.communicate()


def outcomes(directory, quick, advance):
    undisturbed = Run(directory / "undisturbed")
    complaint = undisturbed.finish()
    if complaint:
        raise RuntimeError(f"The run that nobody disturbs fails: {complaint}")
    expected = undisturbed.results()
    for fault, kill, number in (
        ("killed while it trains", killed_in_training, 1 if quick else 20),
        ("killed while it writes a checkpoint", killed_in_checkpoint, 1 if quick else 5),
    ):
        run = Run(directory / kill.__name__)
        outcome = Outcome(fault, lost="the steps since the last checkpoint, taken again")
        rng = random.Random(0)
        for _ in range(number):
            kill(run, rng)
            advance()
        complaint = run.finish()
        if complaint is None:
            complaint = _difference(run.results(), expected)
        for _ in range(number):
            outcome.count(complaint)
        yield outcome


def _difference(found, expected):
    for what, a, b in zip(("its end", "its record"), found, expected, strict=True):
        if len(a) != len(b) or not all(map(np.array_equal, a, b)):
            return f"{what} is not that of the undisturbed run"
    return None
