"""Tests of Keras that fail with this library in the place of Keras's classes, and why."""

import re

FROZEN = (
    "a frozen layer has a scale, which SGD finds no gradient of: plain Keras has nothing to train"
)
FLOAT8 = "its factors and histories are measured at the scale of the layer"
DTYPE = "a wrapper computes in float32, as Keras sees it: the layer inside casts"
KNOWN: dict[str, str] = {
    r"dense_test.py::\w+::test_quantize_dtype_argument_float8": FLOAT8,
    r"identity_test.py::IdentityTest::test_identity_basics": DTYPE,
    r"embedding_test.py::\w+::test_quantize_dtype_argument_int": FROZEN,
}


def reason_for(nodeid):
    """Why a test is left out, `None` if it is not."""
    for pattern, reason in KNOWN.items():
        if re.search(pattern, nodeid):
            return reason
    return None
