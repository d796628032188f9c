"""Tests that are for the TensorFlow backend alone, and why: the one place that says so."""

SHAPES = "on JAX all shapes are known"
ATTENTION = "JAX has no float16 attention on a CPU, in plain Keras neither"
TAPES = "tapes are TensorFlow's"
STRATEGIES = "tf.distribute is TensorFlow's"
MODULES = {
    "test_rebuilding": "the registry of gradients is TensorFlow's",
    "test_reads_elsewhere": "JAX takes gradients by arguments of functions, whoever reads what",
    "test_strategies": STRATEGIES,
}
TESTS = {
    "test_sparse_gradients_stay_sparse": "JAX has no sparse gradients",
    "test_the_peak_of_a_tensor_that_turns_out_to_be_empty_is_zero": SHAPES,
    "test_a_sample_of_a_tensor_of_unknown_size": SHAPES,
    "test_two_gradients_of_a_persistent_tape": TAPES,
    "test_inference_graphs_hold_nothing_but_identities": "reads the nodes of a graph",
    "test_tables_say_it_once": ATTENTION,
    "test_it_is_run_again_where_keras_would": "counts runs in Python, which JAX only traces",
}
CASES = {
    ("test_the_examples_of_a_guide", "custom-loops"): TAPES,
    ("test_the_examples_of_a_guide", "gan"): TAPES,
    ("test_the_examples_of_a_guide", "distribution"): STRATEGIES,
    ("test_the_examples_of_a_guide", "deployment"): "exports a SavedModel",
    ("test_the_examples_of_a_docstring", "AdaptiveLossScaleOptimizer"): TAPES,
    ("test_the_examples_of_a_docstring", "neutral_scales"): TAPES,
    ("test_examples_run_and_say_what_was_seen", "gan"): "it uses TensorFlow's tape",
    ("test_examples_run_and_say_what_was_seen", "addition"): ATTENTION,
    ("test_other_dtypes_keep_their_precision", "float64"): "JAX has no float64 unless told to",
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
        value = getattr(value, "stem", value)  # of a path
        if isinstance(value, str) and (name, value) in CASES:
            return CASES[name, value]
    return MODULES.get(item.module.__name__.rpartition(".")[2]) or TESTS.get(name)
