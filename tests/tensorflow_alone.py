"""Tests that are for the TensorFlow backend alone, and why: the one place that says so."""

MODULES = {
    "test_rebuilding": "the registry of gradients is TensorFlow's",
    "test_strategies": "tf.distribute is TensorFlow's",
}
TESTS: dict[str, str] = {}
CASES = {
    ("test_forward_is_untouched_in_float16", "SpectralNormalization"): (
        "overflows while JAX traces it, the plain layer, too"
    ),
}


def reason(item):
    """Why a test, an item of pytest, is not for other backends; `None` if it is."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if parameters.get("mode") == "graph":
        return "only TensorFlow has graphs without XLA"
    name = getattr(item, "originalname", item.name)
    for value in parameters.values():
        if isinstance(value, str) and (name, value) in CASES:
            return CASES[name, value]
    return MODULES.get(item.module.__name__.rpartition(".")[2]) or TESTS.get(name)
