"""Benchmarks run, in a small version, and what they measure is as claimed."""

import json
import re

import keras
import numpy as np
import pytest

from benchmarks import (
    convergence,
    deploy,
    fidelity,
    float8,
    float8_speed,
    forward,
    halp,
    import_time,
    loss_change,
    others,
    overhead,
    rebuilding,
    replicas,
    report,
    saved,
    weights,
)
from benchmarks.strategies import OURS, REFERENCE, STRATEGIES
from tests.backends import ON_JAX


def results(directory):
    return [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]


@pytest.mark.long
def test_fidelity(tmp_path, capsys):
    fidelity.main(["--quick", "--output", str(tmp_path)])
    found = results(tmp_path)
    assert [result["name"] for result in found] == list(fidelity.QUICK_TASKS)
    for result in found:
        rows = fidelity.rows_of(result)
        assert len(rows) >= 16
        assert all(fidelity.is_good(row, OURS) for row in rows)
        assert not all(fidelity.is_good(row, "Keras, dynamic") for row in rows)
        assert result["provenance"]["versions"]["keras"] == keras.__version__
    printed = capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() in printed
    assert "2 of 2" in printed
    for name in ("ratios.png", "layers.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.long
def test_convergence(tmp_path, capsys):
    convergence.main(["--quick", "--output", str(tmp_path)])
    (result,) = results(tmp_path)
    names = {s.name for s in (REFERENCE, *STRATEGIES)}
    assert names <= result["runs"].keys()
    for runs in result["runs"].values():
        (run,) = runs
        assert 0 <= run["accuracy"] <= 1
    assert result["runs"][OURS][0]["skipped"] == []
    assert "Ours against float32:" in capsys.readouterr().out
    assert (tmp_path / "scales.png").stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*overflow encountered in cast")  # planted
def test_forward(tmp_path):
    forward.main(["--quick", "--output", str(tmp_path)])
    by_name = {result["name"]: result for result in results(tmp_path)}
    assert not any(outcome["missed"] for outcome in by_name.pop("planted")["outcomes"])
    assert not any(outcome["flagged"] for outcome in by_name.pop("healthy")["outcomes"])
    (run,) = by_name.pop("drift")["outcomes"]
    assert run["warned"] < run["first_bad"]
    (result,) = by_name.values()
    losses = {run["way"]: run["loss"] for run in result["runs"]}
    assert np.isnan(losses[forward.FLOAT16]) and np.isfinite(losses[forward.WIDENED])


@pytest.mark.long
def test_overhead_of_subclasses(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "FIRST_STEPS", 1)
    overhead.main(["--quick", "--subclasses", "--output", str(tmp_path)])
    assert "| 20 tiny layers, XLA, twins | 32" in (tmp_path / "README.md").read_text()


@pytest.mark.long
def test_overhead(tmp_path, capsys):
    overhead.main(["--quick", "--output", str(tmp_path)])
    (result,) = results(tmp_path)
    for figure in ("step_seconds", "first_step_seconds"):
        assert all(seconds > 0 for way in overhead.WAYS for seconds in result[figure][way])
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


@pytest.mark.long
def test_replicas(tmp_path, capsys):
    replicas.main(["--quick", "--output", str(tmp_path)])
    one, *_, most = sorted(results(tmp_path), key=lambda result: result["replicas"])
    for result in (one, most):
        assert [run["bytes"] for run in result["runs"]] == [4 * (1 + 30 * (2 + 4 * 42))] * 3
        assert np.mean(np.abs([run["scale_errors"] for run in result["runs"]]) <= 1) > 0.95
    spread = [np.std([run["tail_errors"] for run in each["runs"]]) for each in (one, most)]
    assert spread[1] < spread[0]
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


@pytest.mark.long
def test_others(tmp_path, capsys):
    others.main(["--quick", "--output", str(tmp_path)])
    (result,) = results(tmp_path)
    assert list(result["runs"]) == [strategy.name for strategy in others.COMPARED]
    for name, (run,) in result["runs"].items():
        assert run["losses"][-1] < run["losses"][0]
        assert run["skipped"] == 0
        assert run["lost"]["all"] <= (0 if name == REFERENCE.name else 0.01)
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


def test_errors_and_losses_are_counted_as_stated():
    comparison = fidelity.Comparison(2)
    comparison.add(
        [np.float32([3, 0]), np.float32([1, 1])], [np.float32([3, 4]), np.float32([1, 1])]
    )
    comparison.add([np.float32([0, 0]), np.float32([1, np.inf])], [np.zeros(2), np.ones(2)])
    np.testing.assert_array_equal(comparison.errors, [4 / 5, np.inf])
    np.testing.assert_array_equal(comparison.lost, [1 / 4, 0])


@pytest.mark.parametrize(
    ("ours", "oracle", "lost", "good"),
    [
        (1.1e-3, 1e-3, 0.0, True),
        (1.2e-3, 1e-3, 0.0, False),
        (1e-3, 1e-3, 2e-3, False),
        (1e-6, 1e-7, 0.0, True),  # float32's own errors
        (None, 1e-3, 0.0, False),
        (None, None, 0.0, False),  # not even the oracle
    ],
)
def test_what_counts_as_good(ours, oracle, lost, good):
    row = {"error": {"ours": ours, "oracle": oracle}, "lost": {"ours": lost, "oracle": 0.0}}
    assert fidelity.is_good(row, "ours") is good


def test_figures_of_one_name_are_replaced_and_the_rest_kept(tmp_path):
    for name, figure in (("A b, c", 1), ("d", 2), ("A b, c", 3)):
        report.save_result(tmp_path, {"name": name, "figure": figure})
    loaded = report.load_results(tmp_path, order=["d", "x", "A b, c"])
    assert [(r["name"], r["figure"]) for r in loaded] == [("d", 2), ("A b, c", 3)]


@pytest.mark.long
def test_rebuilding(tmp_path):
    rebuilding.main(["--quick", "--builds", "9", "--output", str(tmp_path)])
    keras_own, ours = (rebuilding.growth(each["megabytes"]) for each in results(tmp_path)[::-1])
    assert ours < keras_own


@pytest.mark.long
def test_import_time(tmp_path, capsys):
    import_time.main(["--quick", "--output", str(tmp_path)])
    for result in results(tmp_path):
        assert len(result["runs"]) == 3
        assert all(0 < run["ours"] < run["keras"] for run in result["runs"])
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


@pytest.mark.long
def test_loss_change(tmp_path, capsys):
    loss_change.main(["--quick", "--steps", "24", "--output", str(tmp_path)])
    (result,) = results(tmp_path)
    assert list(result["runs"]) == [strategy.name for strategy in loss_change.COMPARED]
    for (run,) in result["runs"].values():
        given = np.sum(run["allocated"]) + np.sum(run["statistics"])
        assert abs(run["loss_after"][-1] - run["loss_before"][0] - given) < 12 * 1e-3
    errors = result["conservation"]["errors"]["10"]
    assert max(errors["Simpson, 8 intervals"]) < min(errors["first order"])
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.skipif(not ON_JAX, reason="on JAX only")
def test_float8_speed(tmp_path, capsys):
    float8_speed.main(["--quick", "--output", str(tmp_path)])
    table = capsys.readouterr().out
    emulated, native = (
        re.search(rf"float16, float8 {kind} .*\| ([\d.]+) *\|$", table, re.MULTILINE)[1]
        for kind in ("emulated", "native")
    )
    assert emulated == native


@pytest.mark.long
def test_float8(tmp_path, capsys):
    ways = [
        "float32",
        float8.NO_SCALING,
        float8.BEST_FIXED,
        "LogMax",
        "per tensor, history",
        float8.OURS,
    ]
    options = ["--ways", *ways, "--formats", float8.E4M3, "--output", str(tmp_path)]
    float8.main(["--quick", *options])
    (result,) = results(tmp_path)
    for of_moment in result["fidelity"].values():
        found = of_moment[float8.E4M3]
        assert list(found) == [*ways[1:3], "oracle", *ways[3:]]
        assert found[float8.OURS]["flushed"] < 0.01 < found[float8.NO_SCALING]["flushed"]
        worst = np.array(found[float8.OURS]["error"]) / found["oracle"]["error"]
        assert np.median(worst) < 1.1
    assert list(result["training"]) == ["wide", float8.E4M3]
    assert result["training"][float8.E4M3][float8.OURS][0]["None"]["skipped"] <= 1
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of another steps"):
        float8.main(["--quick", "--steps", "30", *options])


@pytest.mark.long
def test_saved(tmp_path, capsys):
    saved.main(["--quick", "--output", str(tmp_path)])
    (result,) = results(tmp_path)
    (of_moment,) = result["fidelity"].values()
    assert list(of_moment) == saved.ORDER[1:]
    float16, kept, float8_products = (
        np.median(of_moment[name]["error"])
        for name in (saved.FLOAT16, "saved in 8 bits", "products in float8")
    )
    assert float16 < kept < float8_products
    assert list(result["training"]) == [way.name for way in saved.WAYS]
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Loss scales do nothing")
def test_weights(tmp_path, capsys):
    weights.main(["--quick", "--output", str(tmp_path)])
    (result,) = results(tmp_path)
    names = list(weights.ways(20, computed_wide=False))
    for optimizer, moments in (("SGD", 1), ("AdamW", 2)):
        found = result["training"][optimizer]
        assert list(found) == names
        for name, of_way in found.items():
            of_32_bits, in_float32 = "32 bits" in name, "nearest" not in name or "*" in name
            assert round(of_way["weights"]) == (4 if of_32_bits else 2)
            assert round(of_way["optimizer"]) == moments * (4 if in_float32 else 2)
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out


@pytest.mark.long
def test_deploy(tmp_path, capsys):
    arguments = ["--quick", "--output", str(tmp_path)]
    deploy.main(arguments)
    (result,) = results(tmp_path)
    assert list(result["rows"]) == [
        "4 nearest 0.0 128 0",
        "4 mse 0.0 128 0",
        "4 multipoint 0.1 128 0",
        "4 mixed 0.1 128 0",
        "4 adaround 0.0 128 0",
        "4 adaround 0.1 128 0",
    ]
    for name, row in result["rows"].items():
        share = row["bytes"] / result["rows"]["4 mse 0.0 128 0"]["bytes"]
        assert (1.05 < share <= 1.1) if " 0.1 " in name else share == 1
        assert row["bytes"] < row["float32_bytes"] / 4
    assert (tmp_path / "README.md").read_text() in capsys.readouterr().out
    before = (tmp_path / "vgg_not_normalized.json").read_text()
    deploy.main(arguments)  # nothing is measured again
    assert json.loads(before)["rows"] == results(tmp_path)[0]["rows"]


@pytest.mark.long
def test_halp(tmp_path, capsys):
    arguments = ["--quick", "--output", str(tmp_path)]
    halp.main(arguments)
    lenet, convex = sorted(results(tmp_path), key=lambda result: result["name"])
    assert list(convex["ways"]) == list(halp.digits.WAYS)
    assert all(len(found["0"]["norms"]) == 2 for found in convex["ways"].values())
    assert list(lenet["ways"]) == list(halp.LENET_WAYS)
    assert (tmp_path / "halp.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert (tmp_path / "README.md").read_text() in printed
    assert [halp.passes(halp.LENET, way, 15) for way in ("SGD", "SVRG")] == [15, 45]
