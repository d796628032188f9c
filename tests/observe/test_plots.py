"""Pictures of runs: they show what the record says, whatever its size, in light and dark."""

import dataclasses
import itertools
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import tf_adaptive_ls as als
from tests.backends import JIT
from tests.graphs import floats
from tf_adaptive_ls import plots
from tf_adaptive_ls.__main__ import main
from tf_adaptive_ls.observe.html_page import page_of

OF_SCALES = {
    "scales": plots.plot_scales,
    "spectra": plots.plot_spectra,
    "training": plots.plot_training,
}
OF_CHANGES = {
    "loss_change": plots.plot_loss_change,
    "loss_change_map": plots.plot_loss_change_map,
    "loss_change_layers": plots.plot_loss_change_layers,
}
PLOTS = OF_SCALES | OF_CHANGES


def run_of_size(snapshots, layers):
    """A made-up run: a step skipped at the third snapshot, for which layer 1 is to blame."""
    rng = np.random.default_rng(0)
    overflows = np.zeros((snapshots, layers), int)
    overflows[2:, 1:2] = 1
    spectra = np.zeros((snapshots, layers, 42))
    spectra[:, :, 20:30] = rng.integers(1, 100, (snapshots, layers, 10))
    return als.Run(
        layers=[f"block/with_a_rather_long_name/{i}" for i in range(layers)],
        layer_classes=["Dense"] * layers,
        float_formats=[als.FloatFormat("float16")] * layers,
        steps=100 * np.arange(1, snapshots + 1),
        skipped_steps=(np.arange(snapshots) >= 2).astype(int),
        log2_loss_scale=np.full(snapshots, 15),
        log2_scales=rng.integers(0, 20, (snapshots, layers)),
        log2_sampled_at=rng.integers(15, 35, (snapshots, layers)),
        overflows=overflows,
        underflow=np.zeros((snapshots, layers)),
        subnormal=np.zeros((snapshots, layers)),
        spectra=spectra,
        logs={"loss": np.geomspace(3, 0.01, snapshots)},
        loss_changes=loss_changes_of_size(snapshots, layers),
    )


def loss_changes_of_size(paths, layers):
    """Made up, too: chords of a loss that falls to zero, of which half of layer 0's is lost."""
    rng = np.random.default_rng(1)
    losses = np.linspace(3, 0, paths + 1)
    allocated = rng.normal(size=(paths, layers))
    allocated += (np.diff(losses) - allocated.sum(axis=1))[:, None] / max(layers, 1)
    as_trained = allocated.copy()
    as_trained[:, :1] /= 2
    return als.LossChanges(
        layers=[f"block/with_a_rather_long_name/{i}" for i in range(layers)],
        since=100 * np.arange(paths),
        steps=100 * np.arange(1, paths + 1),
        loss_before=losses[:-1],
        loss_after=losses[1:],
        error=np.zeros(paths),
        statistics=np.zeros(paths),
        helping=rng.uniform(0.45, 0.55, paths),
        allocated=allocated,
        standard_errors=np.full((paths, layers), 0.1),
        as_trained=as_trained,
    )


@pytest.mark.parametrize(
    "dark", [False, pytest.param(True, marks=pytest.mark.long)], ids=["light", "dark"]
)
@pytest.mark.parametrize("size", [(1, 1), (5, 5), (300, 200)])
@pytest.mark.parametrize("name", PLOTS)
def test_every_size_can_be_drawn(name, size, dark, tmp_path):
    figure = PLOTS[name](run_of_size(*size), dark=dark)
    figure.savefig(tmp_path / "picture.png", dpi=50)
    background = np.mean(figure.get_facecolor()[:3])
    assert background == (0.0 if dark else 1.0)


@pytest.mark.parametrize("count", [5, 50, 200])
@pytest.mark.parametrize("name", ["scales", "spectra", "loss_change_map", "loss_change_layers"])
def test_labels_of_layers_do_not_overlap(name, count):
    figure = PLOTS[name](run_of_size(3, count))
    figure.canvas.draw()
    axes = figure.axes[1 if name == "scales" else 0]
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == min(count, 50)
    for below, above in itertools.pairwise(boxes):
        assert below.y1 <= above.y0 + 2.0  # pixels of 100 per inch: descenders may touch


def test_scales_show_every_moment_and_who_overflowed():
    run = run_of_size(5, 3)
    above, axes, _ = plots.plot_scales(run).axes
    (mesh,) = axes.collections
    expected = (run.log2_loss_scale[:, None] + run.log2_scales).T
    np.testing.assert_array_equal(mesh.get_array(), expected)
    for line in axes.lines:  # a cross and its rim
        np.testing.assert_array_equal(line.get_xydata(), [[300, 1]])
    (bar,) = above.patches
    assert bar.get_height() == 1
    assert bar.get_x() + bar.get_width() / 2 == 300


def test_spectra_stand_at_their_binades_before_and_after():
    run = run_of_size(3, 2)
    left, right = plots.plot_spectra(run, step=250).axes
    for axes, shifts in ((left, -run.log2_sampled_at[1]), (right, [0, 0])):
        (ridges,) = axes.collections
        for path, shift in zip(ridges.get_paths(), shifts, strict=True):
            x = path.vertices[:, 0]
            # Bins 20 to 29 are binades -5 to 4, drawn at their middle, with a foot each side.
            assert (x.min(), x.max()) == (-5 - 0.5 + shift, 4 + 1.5 + shift)
    spans = [patch.get_x() + patch.get_width() for patch in left.patches[:2]]
    assert spans == [-24, -14]


def test_what_is_rounded_to_float8_stands_beside_it():
    run = run_of_size(3, 2)
    e5m2 = als.FloatFormat("float8_e5m2")
    spectra = np.zeros((3, 2, 42))
    spectra[:, 1, 5:8] = 1
    nothing = np.zeros((3, 2))
    float8 = als.Float8Record([None, e5m2], [None, e5m2], nothing.astype(int), nothing, spectra)
    figure = plots.plot_spectra(dataclasses.replace(run, float8=float8))
    *_, right = figure.axes
    (ridges,) = right.collections
    (path,) = ridges.get_paths()
    x, y = path.vertices.T
    # Of the second layer alone. Bins 5 to 7 are binades -20 to -18.
    assert (x.min(), x.max(), y.max()) == (-21 + 0.5, -18 + 1.5, 1)
    assert [patch.get_x() + patch.get_width() for patch in right.patches[:2]] == [-16, -14]
    assert right.get_title() == "rounded to float8_e5m2"


def test_what_was_allocated_leads_where_the_loss_went():
    run = run_of_size(4, 3)
    top, middle, bottom = plots.plot_loss_change(run).axes
    true, led_to = (line.get_xydata() for line in top.lines)
    np.testing.assert_allclose(led_to, true, atol=1e-12)
    np.testing.assert_array_equal(true[:2], [[0, 3], [100, 2.25]])
    ends = sorted(line.get_ydata()[-1] for line in middle.lines[:3])
    np.testing.assert_allclose(ends, sorted(run.loss_changes.allocated.sum(axis=0)))
    np.testing.assert_array_equal(bottom.lines[1].get_ydata(), run.loss_changes.helping)


def test_the_map_shows_changes_per_step_and_ends_at_the_99th_percentile():
    run = run_of_size(50, 20)
    run.loss_changes.allocated[7, 7] = 1e6
    axes, _ = plots.plot_loss_change_map(run).axes
    (mesh,) = axes.collections
    np.testing.assert_array_equal(mesh.get_array(), run.loss_changes.allocated.T / 100)
    assert mesh.get_clim()[1] == -mesh.get_clim()[0] < 1


def test_bars_show_sums_errors_and_what_underflow_took():
    run = run_of_size(4, 3)
    (axes,) = plots.plot_loss_change_layers(run).axes
    widths = [bar.get_width() for bar in axes.patches]
    np.testing.assert_allclose(widths[:3], run.loss_changes.allocated.sum(axis=0))
    np.testing.assert_allclose(widths[3:], run.loss_changes.as_trained.sum(axis=0))
    (segments,) = (bars.get_segments() for bars in axes.collections)
    np.testing.assert_allclose([s[1][0] - s[0][0] for s in segments], 2 * 4 * 0.1)


def test_a_file_and_a_live_model_can_be_drawn(mixed_float16, tmp_path):
    inputs = keras.Input((4,))
    model = als.wrap_model(keras.Model(inputs, layers.Dense(2, name="scores")(inputs)))
    model.compile(als.AdaptiveLossScaleOptimizer("sgd"), loss="mse", jit_compile=JIT)
    path = tmp_path / "run.jsonl"
    monitor = als.LossScaleMonitor(path, every=2)
    model.fit(floats(32, 4), floats(32, 2), 8, verbose=0, callbacks=[monitor])
    for plot in OF_SCALES.values():
        assert len(plot(str(path)).axes) == len(plot(path).axes) == len(plot(model).axes)


@pytest.mark.parametrize("name", PLOTS)
def test_what_is_no_run_is_refused(name):
    with pytest.raises(ValueError, match=r"Expected a Run.* Received: 3"):
        PLOTS[name](3)


def test_what_a_run_has_not_is_not_drawn():
    for plot in OF_SCALES.values():
        with pytest.raises(ValueError, match=r"with LossScaled layers\. Received: one without"):
            plot(run_of_size(3, 0))
        with pytest.raises(ValueError, match=r"A LossScaleMonitor records them"):
            plot(dataclasses.replace(run_of_size(1, 3), steps=np.zeros(0, int)))
    run = dataclasses.replace(run_of_size(3, 2), loss_changes=None)
    for plot in OF_CHANGES.values():
        with pytest.raises(ValueError, match=r"with a LossChangeMonitor\. Received: one without"):
            plot(run)


def test_the_command_writes_all_of_them_and_prints_the_table(mixed_float16, tmp_path, capsys):
    test_a_file_and_a_live_model_can_be_drawn(None, tmp_path)
    main([str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "pictures"), "--dark", "--html"])
    printed = capsys.readouterr().out
    assert "scores" in printed and "gradient binades" in printed
    written = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert written == {*(f"{name}.png" for name in OF_SCALES), "report.html"}
    for path in (tmp_path / "missing.jsonl", tmp_path / "pictures" / "scales.png"):
        with pytest.raises(SystemExit, match=r"No such file|does not begin like one"):
            main([str(path)])


def test_the_command_draws_what_there_is(mixed_float16, tmp_path, capsys):
    x, y = floats(32, 4), floats(32, 2)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2, name="scores")(inputs))
    model.compile("sgd", loss="mse", jit_compile=JIT)
    path = tmp_path / "run.jsonl"
    model.fit(x, y, verbose=0, callbacks=[als.LossChangeMonitor([(x, y)], path)])
    main([str(path), "-o", str(tmp_path), "--html"])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {*(f"{name}.png" for name in OF_CHANGES), "report.html", "run.jsonl"}
    assert "<h2>Layers" not in (tmp_path / "report.html").read_text()


def test_the_page_holds_all_and_asks_for_nothing():
    run = run_of_size(3, 5)
    run.layers[1] = "<script>alert('a name')</script>"
    page = page_of(run, "a & b")
    assert page.count("data:image/png;base64,") == 2 * len(PLOTS)
    assert "<title>a &amp; b</title>" in page
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in page and "<link" not in page
    assert page.count("<tr>") == 1 + 5


@pytest.mark.long
def test_matplotlib_is_asked_for_only_where_it_is_needed():
    program = """
import sys
sys.modules["matplotlib"] = None
import tf_adaptive_ls
try:
    from tf_adaptive_ls import plots
except ImportError as error:
    assert "pip install 'tf_adaptive_ls[plots]'" in str(error), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
