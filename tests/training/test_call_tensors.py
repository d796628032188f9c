import keras
import numpy as np
import pytest
import tensorflow as tf
from graphs import floats
from keras import layers, ops

import tf_adaptive_ls as als
from tf_adaptive_ls.training import keras_internals
from tf_adaptive_ls.training.call_tensors import Arguments, is_float_tensor, is_narrow, with_mask_of
from tf_adaptive_ls.training.scale_plan import AT_S, Route, ScaleGroup


def tensor(dtype="float32"):
    return ops.convert_to_tensor(floats(2, 3), dtype)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (tensor(), True),
        (tensor("float16"), True),
        (ops.ones((2,), "int32"), False),
        (np.ones((2,), "float32"), False),
        (1.5, False),
        (None, False),
        (tf.sparse.from_dense([[1.0, 0.0]]), False),
        (tf.ragged.constant([[1.0], [2.0, 3.0]]), False),
    ],
    ids=["float32", "float16", "int32", "array", "number", "none", "sparse", "ragged"],
)
def test_what_may_have_a_gradient(value, expected):
    assert is_float_tensor(value) == expected


def test_formats_that_a_scale_matters_to():
    found = {dtype: is_narrow(tensor(dtype)) for dtype in ("float16", "bfloat16", "float32")}
    assert found == {"float16": True, "bfloat16": False, "float32": False}


def test_tensors_are_found_and_replaced_wherever_they_are():
    first, second, third = tensor(), tensor(), tensor()
    number, flag = ops.ones((2,), "int32"), True
    args, kwargs = ([first, number], None), {"state": {"h": second}, "training": flag, "k": third}
    arguments = Arguments(als.LossScaled(layers.Dense(2)), args, kwargs, None)
    assert [id(each) for each in arguments.tensors] == [id(first), id(second), id(third)]
    assert arguments.groups == [AT_S] * 3

    args, kwargs = arguments.replaced(["a", "b", "c"])
    assert args[0] == ["a", number] and args[1] is None
    assert kwargs == {"state": {"h": "b"}, "training": True, "k": "c"}


def test_groups_are_those_of_the_route():
    scaled = als.LossScaled(layers.Dense(2))
    group = ScaleGroup((scaled,))
    route = Route(args=[AT_S, group], kwargs={"k": [group]})
    values = {"k": tensor(), "not_planned": tensor()}
    # The integers have a place in the route, and no gradient.
    arguments = Arguments(scaled, (ops.ones((2,), "int32"), tensor()), values, route)
    assert arguments.groups == [group, group, AT_S]


@pytest.mark.parametrize(
    ("dtype", "autocast", "narrow", "seen_in"),
    [
        ("mixed_float16", True, [True, True], ["float16", "float32"]),
        ("float32", True, [True, False], ["float32", "float32"]),
        ("float32", False, [False, False], ["float16", "float32"]),
    ],
    ids=["narrow layer", "wide layer", "wide layer that casts nothing"],
)
def test_gradients_are_shifted_before_they_are_rounded(dtype, autocast, narrow, seen_in):
    scaled = als.LossScaled(layers.Dense(2, dtype=dtype, autocast=autocast))
    arguments = Arguments(scaled, (tensor("float16"), tensor()), {}, None)
    assert arguments.narrow == narrow
    assert [keras.backend.standardize_dtype(each.dtype) for each in arguments.tensors] == seen_in


def test_masks_stay_with_their_tensors():
    original, other, mask = tensor(), tensor(), ops.ones((2,), "bool")
    assert keras_internals.mask_of(with_mask_of(original, other)) is None
    keras_internals.set_mask(original, mask)
    assert keras_internals.mask_of(with_mask_of(original, other)) is mask
