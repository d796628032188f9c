"""Several devices and several processes on JAX train as if they were one.

Everything here runs in processes of their own: `jax_worker.py`.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

import tf_adaptive_ls as als

pytest.importorskip("jax")
WORKER = pathlib.Path(__file__).parent.parent / "jax_worker.py"


def start(output, *options, devices=1, processes=1):
    """Starts all processes of a run."""
    environment = os.environ | {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = ["--devices", devices, "--processes", processes, "--port", port, *options]
    started = []
    for process in range(processes):
        (output / str(process)).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, WORKER, output, "--process", process, *together]
        started.append(
            subprocess.Popen(
                list(map(str, command)),
                env=environment,
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
            )
        )
    return started


def finish(started, timeout=120):
    """Waits for processes, and returns their exit codes and what they wrote to stderr."""
    try:
        errors = [process.communicate(timeout=timeout)[1].decode() for process in started]
    finally:
        for process in started:
            process.kill()
    return [process.returncode for process in started], errors


def run(output, *options, devices=1, processes=1):
    """What each process of a run ended with: a dict, and arrays."""
    codes, errors = finish(start(output, *options, devices=devices, processes=processes))
    assert not any(codes), "\n".join(errors)
    ends = [output / str(process) / "end.json" for process in range(processes)]
    results = [json.loads(end.read_text()) for end in ends]
    arrays = [list(np.load(end.with_suffix(".npz")).values()) for end in ends]
    for other, of_other in zip(results[1:], arrays[1:], strict=True):
        assert other == results[0]
        for a, b in zip(of_other, arrays[0], strict=True):
            np.testing.assert_array_equal(a, b)
    return results[0], arrays[0]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    """The same training on one device: ours, and plain Keras's."""
    output = tmp_path_factory.mktemp("one")
    return run(output / "ours"), run(output / "plain", "--plain")


def assert_as_near_to_one_device_as_keras(several, plain, one_device):
    def distance(a, b):
        return max(abs(x - y) for x, y in zip(a[0]["loss"], b[0]["loss"], strict=True))

    ours, keras_own = one_device
    assert distance(several, ours) <= 2 * distance(plain, keras_own) + 1e-6
    assert several[0]["equal"] and several[0]["saved"]
    for name in ("loss_scale", "skipped_steps", "steps"):
        assert several[0][name] == ours[0][name], name
    # A scale looks at the least of its 128 gradients, sums that all but cancel: in another order
    # they are of another binade, by half of which the scale moves.
    differences = np.subtract(several[0]["log2_scales"], ours[0]["log2_scales"])
    assert np.all(np.abs(differences) <= 2)


@pytest.mark.long
def test_four_devices_as_one(tmp_path, one_device):
    several = run(tmp_path / "ours", "--count", devices=4)
    plain = run(tmp_path / "plain", "--count", "--plain", devices=4)
    assert_as_near_to_one_device_as_keras(several, plain, one_device)
    assert several[0]["replicated"]
    # One collective more: the reports of all layers together.
    added = set(several[0]["collectives"]) - set(plain[0]["collectives"])
    assert len(several[0]["collectives"]) == len(plain[0]["collectives"]) + 1
    assert added


@pytest.mark.long
@pytest.mark.parametrize("parts", [(), ("--model-parallel",)], ids=["data", "model"])
def test_saved_activations_on_four_devices(tmp_path, parts):
    one, _ = run(tmp_path / "one", "--saved-activations")
    four, _ = run(tmp_path / "four", "--saved-activations", *parts, devices=4)
    np.testing.assert_allclose(four["loss"], one["loss"], rtol=0.01)
    assert four["skipped_steps"] == one["skipped_steps"]
    other, _ = run(tmp_path / "other", devices=4)
    assert four["loss"] != other["loss"]


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "several",
    [
        ((), {"devices": 4}),
        (("--model-parallel",), {"devices": 4}),
        ((), {"processes": 2}),
    ],
    ids=["data", "model", "processes"],
)
def test_weights_of_16_bits_on_several_devices(tmp_path, several, dtype):
    options, devices = several
    one, _ = run(tmp_path / "one", "--weights", dtype)
    found, _ = run(tmp_path / "several", "--weights", dtype, *options, **devices)
    np.testing.assert_allclose(found["loss"], one["loss"], rtol=0.02)
    assert found["equal"] and found["saved"]
    assert found["skipped_steps"] == one["skipped_steps"]


@pytest.mark.long
@pytest.mark.parametrize("parts", [(), ("--model-parallel",)], ids=["data", "model"])
def test_a_subclass_as_its_functional_twin(tmp_path, parts):
    functional, arrays = run(tmp_path / "functional", *parts, devices=4)
    subclass, arrays_of_subclass = run(tmp_path / "subclass", "--subclass", *parts, devices=4)
    assert subclass == functional
    for actual, expected in zip(arrays_of_subclass, arrays, strict=True):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.long
def test_a_model_in_parts(tmp_path, one_device):
    several = run(tmp_path / "ours", "--model-parallel", devices=4)
    plain = run(tmp_path / "plain", "--model-parallel", "--plain", devices=4)
    assert_as_near_to_one_device_as_keras(several, plain, one_device)
    assert several[0]["replicated"]


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_as_one(tmp_path, one_device, processes):
    several = run(tmp_path / "ours", processes=processes)
    plain = run(tmp_path / "plain", "--plain", processes=processes)
    assert_as_near_to_one_device_as_keras(several, plain, one_device)
    # One of them has written the record.
    record = als.load_run(tmp_path / "ours" / "run")
    assert list(record.steps) == list(range(4, 25, 4))
    assert list(record.log2_scales[-1]) == several[0]["log2_scales"]


@pytest.mark.long
def test_what_overflows_in_one_process_is_skipped_in_all(tmp_path):
    result, _ = run(tmp_path, "--nan-on", 1, processes=2)
    assert (result["skipped_steps"], result["steps"]) == (3, 24)


@pytest.mark.long
def test_stuck_processes_end(tmp_path):
    result, _ = run(tmp_path, "--stuck", processes=2)
    assert "Training is stuck" in result["stuck"]


@pytest.mark.long
def test_a_killed_process_ends_all_and_the_run_resumes_bit_for_bit(tmp_path):
    undisturbed = run(tmp_path / "whole", processes=2)
    killed = start(tmp_path / "killed", "--die-at", 13, processes=2)
    codes, _ = finish(killed)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    resumed = run(tmp_path / "killed", processes=2)
    for actual, expected in zip(resumed[1], undisturbed[1], strict=True):
        np.testing.assert_array_equal(actual, expected)
    records = [als.load_run(tmp_path / name / "run") for name in ("whole", "killed")]
    np.testing.assert_array_equal(records[1].steps, records[0].steps)
    np.testing.assert_array_equal(records[1].log2_scales, records[0].log2_scales)
