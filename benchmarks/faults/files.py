"""Damaged files: saved models, checkpoints, records of runs.

What is damaged must be refused with an error, and leave all as it was, or be read as what it
says. Errors may come from Keras, h5py or zipfile; one that is raised here says what was expected.
"""

import contextlib
import io
import json
import random
import traceback
import warnings
import zipfile

import h5py
import keras
import numpy as np
from keras import layers

import tf_adaptive_ls as als
from benchmarks.faults import Outcome

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X[:, :2]
WEIGHTS = "model.weights.h5"
FLIPS = 3  # at most, and so many variables can be others
RESTARTED = "Skipping variable loading for optimizer"


def trained_model(callbacks=()):
    """Statistics, a nested model, and a few steps behind it."""
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.set_random_seed(0)
    x = inner_inputs = keras.Input((5,))
    inner = keras.Model(inner_inputs, layers.Dense(3)(x), name="inner")
    x = inputs = keras.Input((4,))
    x = layers.BatchNormalization()(layers.Dense(5, activation="relu")(x))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, dtype="float32")(inner(x))))
    model.compile(als.AdaptiveLossScaleOptimizer("adam"), loss="mse", jit_compile=False)
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=callbacks)
    return model


def everything(model):
    variables = [*model.variables, *(model.optimizer.variables if model.optimizer else ())]
    return [variable.numpy() for variable in variables]


# Ways to damage a file.


def flipped(content, rng):
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, FLIPS])):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut(content, rng):
    return content[: rng.randrange(len(content))]


def with_other_json(content, rng):
    """One value, or one branch, is another or gone."""
    root = json.loads(content)
    *way, last = rng.choice([path for path in _paths(root) if path])
    branch = root
    for key in way:
        branch = branch[key]
    if rng.random() < 0.3:
        del branch[last]
    else:
        branch[last] = rng.choice([None, -1, 0.5, 1e9, True, "x", [], {}])
    return json.dumps(root).encode()


def _paths(branch, path=()):
    yield path
    if isinstance(branch, dict):
        branch = branch.items()
    elif isinstance(branch, list):
        branch = enumerate(branch)
    else:
        return
    for key, value in list(branch):
        yield from _paths(value, (*path, key))


def with_other_array(content, rng):
    """One array is gone, of another shape, or of other numbers."""
    file = io.BytesIO(content)
    with h5py.File(file, "r+") as root:
        items: list[tuple] = []
        root.visititems(lambda *item: items.append(item))
        name = rng.choice([name for name, item in items if isinstance(item, h5py.Dataset)])
        shape, dtype = root[name].shape, root[name].dtype
        kind = rng.choice(["gone", "shape", "numbers", "numbers"])
        if kind == "numbers":
            value = rng.choice([np.nan, np.inf, -1, 0.3, 1e9]) if dtype.kind == "f" else -7
            root[name][...] = np.full(shape, value, dtype)
        else:
            del root[name]
            if kind == "shape":
                root.create_dataset(name, data=np.zeros((*shape, 2), dtype))
    return file.getvalue()


def damaged_members(members, rng):
    """Members of an archive `{name: content}`, of which one or two are not as they were."""
    members = dict(members)
    name, other = rng.sample(sorted(members), 2)
    kind = rng.choice(["flip", "cut", "remove", "swap", "json", "json", "json", "array", "array"])
    if kind == "remove":
        del members[name]
    elif kind == "swap":
        members[name], members[other] = members[other], members[name]
    else:
        name = {"json": "config.json", "array": WEIGHTS}.get(kind, name)
        damage = {
            "flip": flipped,
            "cut": cut,
            "json": with_other_json,
            "array": with_other_array,
        }[kind]
        members[name] = damage(members[name], rng)
    return members


# What must come of it.


class Archive:
    """A saved model, to be damaged again and again."""

    fault = "saved model (.keras) damaged"

    def __init__(self, directory):
        self._path = directory / "damaged.keras"
        model = trained_model()
        self._expected = everything(model)
        model.save(self._path)
        self._content = self._path.read_bytes()
        with zipfile.ZipFile(self._path) as archive:
            self._members = {name: archive.read(name) for name in archive.namelist()}

    def problem(self, rng):
        """Damages the file and loads it; returns what is not as it should be, or `None`."""
        kind = rng.choice(["flip", "cut", *["members"] * 8])
        if kind == "members":
            with zipfile.ZipFile(self._path, "w") as archive:
                for name, content in damaged_members(self._members, rng).items():
                    archive.writestr(name, content)
        else:
            damage = flipped if kind == "flip" else cut
            self._path.write_bytes(damage(self._content, rng))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = keras.saving.load_model(self._path)
        except Exception as error:
            return problem_with(error)
        restarted = any(RESTARTED in str(warning.message) for warning in caught)
        return self._problem_with_loaded(model, restarted)

    def _problem_with_loaded(self, model, restarted):
        found = everything(model)
        number = len(model.variables)
        if not model.optimizer or restarted:
            found, expected = found[:number], self._expected[:number]
        else:
            expected = self._expected
        if len(found) != len(expected):
            return f"{len(found)} variables instead of {len(expected)}"
        different = _number_of_different(found, expected)
        if different > FLIPS:
            return f"{different} variables are not what was saved"
        try:
            als.scale_table(model)
            model.predict(X, verbose=0)
            if model.compiled and model.loss:
                model.fit(X, Y, verbose=0)
        except Exception as error:
            return problem_with(error)
        return None


class Checkpoint:
    """Weights saved by `BackupAndRestore`, to be damaged again and again."""

    fault = "checkpoint (.weights.h5) damaged"

    def __init__(self, directory):
        self._path = directory / "damaged.weights.h5"
        self._model = trained_model()
        self._model.save_weights(self._path)
        self._content = self._path.read_bytes()
        self._saved = everything(self._model)
        self._model.fit(X, Y, batch_size=4, verbose=0)
        self._now = [(v, v.numpy()) for v in self._variables()]

    def _variables(self):
        return [*self._model.variables, *self._model.optimizer.variables]

    def problem(self, rng):
        """Damages the file and loads it; returns what is not as it should be, or `None`."""
        damage = rng.choice([flipped, cut, with_other_array, with_other_array])
        self._path.write_bytes(damage(self._content, rng))
        now = [value for _, value in self._now]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self._model.load_weights(self._path)
        except Exception as error:
            if _number_of_different(everything(self._model), now):
                return f"partly loaded, then {error!r}"
            return problem_with(error)
        else:
            restarted = any(RESTARTED in str(warning.message) for warning in caught)
            number = len(self._model.variables) if restarted else None
            different = _number_of_different(everything(self._model)[:number], self._saved[:number])
            return None if different <= FLIPS else f"{different} variables are not what was saved"
        finally:
            for variable, value in self._now:
                variable.assign(value)


class Record:
    """The record of a run, to be damaged again and again."""

    fault = "record of a run (.jsonl) damaged"

    def __init__(self, directory):
        self._path = directory / "damaged.jsonl"
        trained_model([als.LossScaleMonitor(self._path, every=1)])
        self._content = self._path.read_bytes()
        self._expected = als.load_run(self._path)

    def problem(self, rng):
        """Damages the file and reads it; returns what is not as it should be, or `None`."""
        damage = rng.choice([flipped, flipped, cut, _lines_swapped, _line_gone, _line_damaged])
        self._path.write_bytes(damage(self._content, rng))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run = als.load_run(self._path)
        except Exception as error:
            return problem_with(error)
        expected = self._expected
        places = np.searchsorted(expected.steps, run.steps)
        for name in ("steps", "log2_scales", "spectra", "overflows", "log2_loss_scale"):
            if not np.array_equal(getattr(run, name), getattr(expected, name)[places]):
                return f"{name} are not what was recorded"
        return None


def _lines_swapped(content, rng):
    start, *lines = content.splitlines(keepends=True)
    rng.shuffle(lines)
    return b"".join([start, *lines])


def _line_gone(content, rng):
    lines = content.splitlines(keepends=True)
    del lines[rng.randrange(len(lines))]
    return b"".join(lines)


def _line_damaged(content, rng):
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    lines[place] = with_other_json(lines[place], rng) + b"\n"
    return b"".join(lines)


def _number_of_different(found, expected):
    pairs = zip(found, expected, strict=True)
    return sum(not np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def problem_with(error):
    """What is wrong with an error: it comes from our inside, and does not say what it is."""
    *_, last = traceback.extract_tb(error.__traceback__)
    ours = als.__path__[0] in last.filename
    told = isinstance(error, OSError) or (isinstance(error, ValueError) and "xpected" in str(error))
    if ours and not told:
        return f"{error!r} in {last.name}, line {last.lineno}"
    return None


KINDS = (Archive, Checkpoint, Record)


@contextlib.contextmanager
def whole_tracebacks():
    """Keras leaves its own frames out of them, which tell where an error comes from."""
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        keras.config.enable_traceback_filtering()


def outcomes(directory, quick, advance):
    """An `Outcome` for each kind of file."""
    for kind in KINDS:
        file, outcome = kind(directory), Outcome(kind.fault)
        for seed in range(20 if quick else 300):
            with whole_tracebacks():
                problem = file.problem(random.Random(seed))
            outcome.count(problem and f"{problem} (seed {seed})")
            advance()
        yield outcome
