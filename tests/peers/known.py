"""Tests of Keras that fail with this library in the place of Keras's classes, and why."""

import re

ARGUMENTS = "of arguments and attributes that Keras's optimizer has and this library's has not"
COUNTS = "counts or lists the classes and variables that a file or a model has"
DTYPE = "a wrapper computes in float32, as Keras sees it: the layer inside casts"
FLOAT8 = "its factors and histories are measured at the scale of the layer"
FROZEN = (
    "a frozen layer has a scale, which SGD finds no gradient of: plain Keras has nothing to train"
)
LOSSES = "losses that a layer adds are the wrapper's"
REMAT = "it counts the calls of a function that the wrapper does not use"
UNSCALED = "it trains without a loss scale, in a model compiled with auto_scale_loss=False"
ASSIGNS = "it asks that variables are assigned to by methods of Keras's optimizer"
NO_FILE = "it reads a file that is not in the wheel"
PACKAGE = "it needs a package that Keras does not need"

KNOWN: dict[str, str] = {
    r"loss_scale_optimizer_test.py::\w+::test_(init|serialization|deserialization)": ARGUMENTS,
    r"loss_scale_optimizer_test.py::\w+::test_finite_step_with_inner_loss_scale": ARGUMENTS,
    r"loss_scale_optimizer_test.py::\w+::test_(up|down)scaling": ARGUMENTS,
    r"optimizer_sparse_test.py::\w+::test_sparse_gradients_loss_scale_optimizer": ASSIGNS,
    r"multi_optimizer_test.py::\w+::test_multi_optimizer_wrapped_in_loss_scale": ARGUMENTS,
    r"trainer_test.py::\w+::test_adds_loss_scaling_optimizer": COUNTS,
    r"trainer_test.py::\w+::test_loss_scaling_prevents_underflow": UNSCALED,
    r"trainer_test.py::\w+::test_fit_with_data_adapter_(grain|torch)": PACKAGE,
    r"saving_lib_test.py::\w+::test_saved_module_paths_and_class_names": COUNTS,
    r"saving_lib_test.py::\w+::test_legacy_load_skips_missing_nested_containers": NO_FILE,
    r"file_editor_test.py::\w+::test_scalar_weight": COUNTS,
    r"layer_test.py::\w+::test_quantized_layer_with_remat": REMAT,
    r"layer_test.py::\w+::test_stateless_call": LOSSES,
    r"stft_spectrogram_test.py::\w+::test_spectrogram_(basics|channels_first)": FROZEN,
    r"dense_test.py::\w+::test_quantize_dtype_argument_float8": FLOAT8,
    r"embedding_test.py::\w+::test_quantize_dtype_argument_int": FROZEN,
    r"(flatten|identity|permute|reshape)_test.py::.*_(basics|dense|sparse|channels)": DTYPE,
    r"(equalization|random_grayscale)_test.py::\w+::test_layer": DTYPE,
}


def reason_for(nodeid):
    """Why a test is left out, `None` if it is not."""
    for pattern, reason in KNOWN.items():
        if re.search(pattern, nodeid):
            return reason
    return None
