"""Where the record of a run is to be written: full, not there, gone, slow, or taken.

Training is to go on to its last step, with one warning, and what stood there is to stay.
"""

import contextlib
import pathlib
import resource
import shutil
import subprocess
import sys
import time
import warnings

import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks.faults import Outcome
from tf_adaptive_ls.observe.record.exclusive_file import ExclusiveFile

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = X[:, :2]
EPOCHS, STEPS, EVERY = 10, 8, 2
HOLDER = (
    "import sys; from tf_adaptive_ls.observe.record.exclusive_file import ExclusiveFile; "
    "file = ExclusiveFile(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
)


def network(name):
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    x = layers.Dense(8, activation="relu", name=name)(inputs)
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, dtype="float32")(x)))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", jit_compile=False)
    return model


def problem_in_fit(path, expected_warning, *, at_epoch=lambda epoch: None, tensorboard=None):
    """Trains with a record; returns what is not as it should be, or `None`."""
    model = network("hidden")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(
            X,
            Y,
            batch_size=len(X) // STEPS,
            epochs=EPOCHS,
            verbose=0,
            callbacks=[
                als.LossScaleMonitor(path, every=EVERY, tensorboard=tensorboard),
                keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: at_epoch(epoch)),
            ],
        )
    told = [str(w.message) for w in caught if "LossScaleMonitor" in str(w.message)]
    if model.optimizer.steps != EPOCHS * STEPS:
        return f"training ended after {model.optimizer.steps} steps"
    expected = [] if expected_warning is None else [expected_warning]
    expected += ["cannot write"] * (tensorboard is not None)
    if len(told) != len(expected) or not all(e in t for e, t in zip(expected, told, strict=True)):
        return f"the warnings are {told}"
    return None


def full(directory):
    """A file system of 64 KB that something else fills up meanwhile."""
    with _small_file_system(directory) as fill:
        path = directory / "run.jsonl"
        tensorboard = directory / "board"
        problem = problem_in_fit(
            path,
            "Training goes on",
            at_epoch=lambda epoch: epoch == EPOCHS // 2 and fill(),
            tensorboard=tensorboard,
        )
        if problem is None and len(als.load_run(path).steps) < EPOCHS // 2 * STEPS // EVERY - 1:
            problem = "what had been written is gone"
    return problem


@contextlib.contextmanager
def _small_file_system(directory):
    """A tmpfs where that may be made, by root on Linux; a limit for the size of files otherwise."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        if not mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
            return
        with contextlib.suppress(OSError), open(directory / "filler", "wb", 0) as file:
            while True:
                file.write(bytes(512))

    try:
        yield fill
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        if mounted:
            subprocess.run(["umount", str(directory)], check=True)


def unwritable(directory):
    """The directory cannot be made."""
    directory.write_text("a file")
    problem = problem_in_fit(directory / "run.jsonl", "cannot write")
    return problem if directory.read_text() == "a file" else "the file is another"


def vanished(directory):
    """The directory is removed while the model trains."""
    return problem_in_fit(
        directory / "run.jsonl",
        "No such file",
        at_epoch=lambda epoch: epoch == EPOCHS // 2 and shutil.rmtree(directory),
    )


def slow(directory):
    """Every line takes a tenth of a second."""
    path, add = directory / "run.jsonl", ExclusiveFile.add

    def add_slowly(self, line):
        time.sleep(0.1)
        add(self, line)

    ExclusiveFile.add = add_slowly
    try:
        problem = problem_in_fit(path, None)
    finally:
        ExclusiveFile.add = add
    complete = len(als.load_run(path).steps) == EPOCHS * STEPS // EVERY
    return problem or (None if complete else "records are missing")


def taken(directory):
    """Another process writes the same record."""
    path = directory / "run.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=pathlib.Path(als.__path__[0]).parent,
    ) as process:
        process.stdout.readline()
        problem = problem_in_fit(path, "another process is writing it")
        process.kill()
    return problem or (f"{path} was written to" if path.read_bytes() else None)


def of_another_model(directory):
    """There is the record of another model."""
    path = directory / "run.jsonl"
    network("other").fit(X, Y, verbose=0, callbacks=[als.LossScaleMonitor(path)])
    before = path.read_bytes()
    problem = problem_in_fit(path, "it is the record of another model")
    return problem or (None if path.read_bytes() == before else "it was written to")


FAULTS = {
    "disk full": full,
    "record directory cannot be made": unwritable,
    "record directory vanishes": vanished,
    "slow disk": slow,
    "record written by another run": taken,
    "record of another model": of_another_model,
}


def outcomes(directory, quick, advance):
    for name, fault in FAULTS.items():
        outcome = Outcome(name, lost="nothing" if fault is slow else "records from then on")
        outcome.count(fault(directory / fault.__name__))
        advance()
        yield outcome
