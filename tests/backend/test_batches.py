"""Whatever takes data takes what `fit` takes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_adaptive_ls as als
from tests.graphs import floats
from tf_adaptive_ls.backend.batches import batches_of

X, Y, W = floats(10, 4), floats(10, 2, seed=1), np.ones(10, "float32")


class Dataset(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return X[4 * i : 4 * i + 4], Y[4 * i : 4 * i + 4]


DATA = {
    "arrays": (X, Y),
    "lists of arrays": ([X], {"scores": Y}),
    "tensors": (tf.constant(X), tf.constant(Y)),
    "batches": [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)],
    "a tuple of batches": tuple((X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)),
    "a generator": ((X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)),
    "tf.data": tf.data.Dataset.from_tensor_slices((X, Y)).batch(4),
    "PyDataset": Dataset(),
}


@pytest.mark.parametrize("kind", DATA)
def test_batches(kind):
    sizes = []
    for x, y in batches_of(DATA[kind], batch_size=4):
        (x,), (y,) = keras.tree.flatten(x), keras.tree.flatten(y)
        start = sum(sizes)
        sizes.append(len(x))
        np.testing.assert_array_equal(x, X[start : start + 4])
        np.testing.assert_array_equal(y, Y[start : start + 4])
    assert sizes == [4, 4, 2]


def test_weights_of_examples_and_nothing():
    assert [len(w) for _, _, w in batches_of((X, Y, W), 6)] == [6, 4]
    assert [y for _, y in batches_of((X, None), 6)] == [None, None]


@pytest.mark.parametrize("data", [3, None, "x.csv", X, {"x": X}, (X, Y[:3]), (X, 1.0)])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(ValueError, match=r"(?s)Expected (data as for `fit`|arrays with).*Received"):
        batches_of(data)


@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
def test_arrays_are_what_their_batches_are(mixed_float16):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="float32")])
    model = als.wrap_model(model)
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse")
    before = model.get_weights()
    model.fit(X, Y, verbose=0)
    ends = before, model.get_weights()
    found = [als.loss_change(model, *ends, data, batch_size=4) for data in ((X, Y), Dataset())]
    assert str(found[0]) == str(found[1]) and found[0].batches == 3
    assert als.calibrate(model, (X, Y), batch_size=2).batches == 5
