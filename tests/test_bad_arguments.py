"""Whatever a public function is given, it works or says what it expected.

Each is called with right arguments but one, which may be anything. Errors may come from Keras,
NumPy or Python; one that is raised here says what was expected, and leaves the model as it was.
"""

import functools
import inspect
import tempfile

import keras
import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers

import tf_adaptive_ls as als
from benchmarks.faults.files import everything, problem_with, trained_model, whole_tracebacks
from tests.graphs import floats
from tf_adaptive_ls import plots

X, Y = floats(4, 4), floats(4, 2)
WEIGHTS = np.ones(4, "float32")


@functools.cache
def model():
    return trained_model()


@functools.cache
def plain_model():
    return als.plain_copy(model(), dtype="float32")


@functools.cache
def quantization_report():
    return als.quantize_weights(plain_model(), X, method="mse", verbose=False)[1]


@functools.cache
def run():
    return als.snapshot_run(model())


@functools.cache
def run_with_changes():
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/run.jsonl"
        monitor = als.LossChangeMonitor([(X, Y)], path)
        trained_model().fit(X, Y, verbose=0, callbacks=[monitor])
        return als.load_run(path)


@functools.cache
def run_with_rooms():
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/run.jsonl"
        monitor = als.LossScaleMonitor(path, batch=X)
        trained_model().fit(X, Y, verbose=0, callbacks=[monitor])
        return als.load_run(path)


CALLS = {
    als.LossScaled: lambda: {
        "layer": layers.Dense(2),
        "name": "d",
        "trainable": True,
        "saved_activations": None,
        "float8": als.Float8(),
    },
    als.Float8: lambda: {
        "forward": "float8_e5m2",
        "backward": "float8_e5m2",
        "rounding": "stochastic",
        "layer_filter": None,
        "block_size": 32,
    },
    als.AdaptiveLossScaleOptimizer: lambda: {
        "inner_optimizer": "sgd",
        "initial_scale": 8.0,
        "rule": als.FixedRule(),
        "sample_every": 3,
        "stochastic_rounding": True,
        "name": "o",
    },
    als.QuantileRule: lambda: {"underflow": 0.1, "headroom": 2, "forget": 0.1},
    als.GaussianRule: lambda: {"underflow": 0.1, "headroom": 2},
    als.RisingMinimumRule: lambda: {"minimums": ((0, 2.0),), "growth_steps": 3},
    als.FloatFormat: lambda: {"name": "float16"},
    als.LossScaleMonitor: lambda: {
        "path": None,
        "every": 3,
        "batch": X,
        "tensorboard": None,
        "stuck_after": 3,
        "optimizer": None,
    },
    als.LossChangeMonitor: lambda: {
        "data": [(X, Y)],
        "path": None,
        "every": 3,
        "tensorboard": None,
        "single_steps": False,
        "as_trained": True,
        "tolerance": 0.1,
        "max_intervals": 2,
        "batch_size": 2,
    },
    als.loss_change: lambda: {
        "model": model(),
        "before": model().get_weights(),
        "after": model().get_weights(),
        "data": [(X, Y)],
        "tolerance": 0.1,
        "max_intervals": 2,
        "dtype": "as trained",
        "rule": "trapezoid",
        "batch_size": 2,
    },
    als.wrap_model: lambda: {
        "model": model(),
        "layer_filter": None,
        "float8": None,
        "plan": True,
        "saved_activations": "float8_e5m2",
    },
    als.strip_model: lambda: {"model": model()},
    als.plain_copy: lambda: {"model": model(), "dtype": "float32"},
    als.quantize_weights: lambda: {
        "model": plain_model(),
        "calibration": X,
        "bits": 4,
        "method": "adaround",
        "budget": 0.1,
        "first_and_last_bits": 8,
        "layer_filter": None,
        "steps": 2,
        "verbose": False,
    },
    als.BitCentered: lambda: {
        "learning_rate": 0.1,
        "bits": 8,
        "mu": 0.1,
        "momentum": 0.0,
        "seed": None,
        "name": "halp",
    },
    als.Recenter: lambda: {"data": [(X, Y)], "every": 3, "batch_size": 2, "verbose": False},
    als.scale_table: lambda: {"model": model(), "optimizer": model().optimizer},
    als.calibrate: lambda: {"model": model(), "batches": [(X, Y)], "batch_size": 2},
    als.forward_range: lambda: {"model": model(), "batches": [X], "room": 2, "training": True},
    als.widen: lambda: {
        "model": model(),
        "batches": [X],
        "room": 2,
        "names": None,
        "training": True,
    },
    plots.plot_forward_range: lambda: {"result": als.forward_range(model(), [X]), "dark": True},
    plots.plot_quantization: lambda: {"report": quantization_report(), "dark": True},
    plots.plot_forward_rooms: lambda: {"run": run_with_rooms(), "dark": True},
    als.explain_nonfinite: lambda: {
        "model": model(),
        "x": X,
        "y": Y,
        "sample_weight": WEIGHTS,
    },
    als.load_run: lambda: {"path": "run.jsonl", "max_snapshots": 3},
    als.snapshot_run: lambda: {"model": model(), "optimizer": model().optimizer},
    plots.plot_scales: lambda: {"run": run(), "dark": True},
    plots.plot_spectra: lambda: {"run": run(), "step": None, "dark": True},
    plots.plot_training: lambda: {"run": run(), "dark": True},
    plots.plot_loss_change: lambda: {"run": run_with_changes(), "dark": True},
    plots.plot_loss_change_map: lambda: {"run": run_with_changes(), "dark": True},
    plots.plot_loss_change_layers: lambda: {"run": run_with_changes(), "dark": True},
}

# Made by the library, abstract, or, in lower case, of tensors inside a compiled step.
OTHERS = {
    als.NOTHING_SEEN,
    als.Allocation,
    als.Calibration,
    als.Explanation,
    als.ForwardRange,
    als.ForwardRooms,
    als.PartRange,
    als.QuantizationReport,
    als.QuantizedKernel,
    als.Widening,
    als.FixedRule,
    als.LayerRange,
    als.LayerSnapshot,
    als.LossChanges,
    als.Float8Record,
    als.NarrowReduction,
    als.Run,
    als.ScaleRow,
    als.ScaleRule,
    als.ScaleTable,
    als.Spectrum,
    als.StuckTrainingError,
    als.TensorReading,
    als.neutral_scales,
    als.nonzero_total,
    als.quantile_exponent,
    als.top_exponent,
}

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.sampled_from([10**30, -(10**30), 2.0**15, np.float16(2.0), np.int64(3)]),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from([object(), int, len, np.zeros(0), X, Y, [(X, Y)], [None], iter(())]),
    st.sampled_from(["adam", "float16", "float8_e5m2", als.FixedRule(), als.QuantileRule()]),
    st.builds(layers.ReLU),
    st.builds(keras.optimizers.SGD),
    st.builds(keras.Sequential),
)


def test_every_public_name_is_here():
    assert {getattr(als, name) for name in als.__all__} - OTHERS <= CALLS.keys()


def check(function, number):
    arguments = CALLS[function]
    assert arguments().keys() == inspect.signature(function).parameters.keys()

    @settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(name=st.sampled_from(sorted(arguments())), value=ANYTHING)
    def call(name, value):
        before = everything(model())
        try:
            function(**{**arguments(), name: value})
        except Exception as error:
            assert problem_with(error) is None
        finally:
            plt.close("all")
        if function is not als.calibrate:
            for a, b in zip(everything(model()), before, strict=True):
                np.testing.assert_array_equal(a, b)

    with whole_tracebacks():
        call()


NAMED = [pytest.param(function, id=function.__name__) for function in CALLS]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", NAMED)
def test_one_argument_is_anything(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(function, 6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", NAMED)
def test_one_argument_is_anything_often(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(function, 200)
