"""Real data for the benchmarks: handwritten digits, CIFAR-10, source code, prices."""

import dataclasses
import pathlib
import sysconfig

import keras
import numpy as np
from matplotlib import cbook
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


@dataclasses.dataclass(frozen=True)
class Images:
    """Images float32 `[n, 32, 32, 3]` in [0, 1], and labels int32 `[n]` in 0 … 9."""

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    def batches(self, batch_size, seed):
        """Endless training batches `(images, labels)`, in an order given by `seed`."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.x_train))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                yield self.x_train[chosen], self.y_train[chosen]


def digits():
    """The 1,797 digits that come with scikit-learn, enlarged to 32 x 32 pixels."""
    x, y = load_digits(return_X_y=True)
    x = keras.ops.image.resize((x / 16).reshape(-1, 8, 8, 1).astype("float32"), (32, 32))
    x = np.repeat(np.array(x), 3, axis=-1)
    x_train, x_test, y_train, y_test = train_test_split(
        x, y.astype("int32"), test_size=360, random_state=0, stratify=y
    )
    return Images("digits", x_train, y_train, x_test, y_test)


def cifar10(path=None):
    """CIFAR-10 from an .npz file of `x_train`, `y_train`, `x_test`, `y_test`, or downloaded.

    Its name says if it is not the full dataset.
    """
    if path is None:
        (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    else:
        with np.load(path) as arrays:
            x_train, y_train, x_test, y_test = (
                arrays[name] for name in ("x_train", "y_train", "x_test", "y_test")
            )
    part = "" if len(x_train) == 50_000 else f", {len(x_train):,} images"
    return Images(
        f"CIFAR-10{part}",
        x_train.astype("float32") / 255,
        y_train.reshape(-1).astype("int32"),
        x_test.astype("float32") / 255,
        y_test.reshape(-1).astype("int32"),
    )


PACKAGES = (
    "asyncio",
    "concurrent",
    "ctypes",
    "email",
    "http",
    "importlib",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)


def source_code():
    """The source of ten packages of Python's standard library, as ASCII codes.

    Returns:
        A list of int32 arrays `[n]` with values in 0 … 127, in the order of `PACKAGES`.
    """
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    texts = [
        "".join(path.read_text("utf-8") for path in sorted((library / name).rglob("*.py")))
        for name in PACKAGES
    ]
    return [np.frombuffer(t.encode("ascii", "replace"), "uint8").astype("int32") for t in texts]


def prices():
    """The stock of Google from 2004 to 2008, which comes with Matplotlib.

    Returns:
        float32 array `[1047 days, 5]`: logarithms of open, high, low, close and volume,
        each with mean 0 and standard deviation 1.
    """
    days = cbook.get_sample_data("goog.npz")["price_data"]
    x = np.stack([np.log(days[name]) for name in ("open", "high", "low", "close", "volume")], -1)
    return ((x - x.mean(axis=0)) / x.std(axis=0)).astype("float32")
