"""Every example runs as it stands: in the README, in guides one after the other, in docstrings."""

import inspect
import pathlib

import keras
import numpy as np
import pytest
from mktestdocs import check_md_file, grab_code_blocks

import tf_adaptive_ls as als

ROOT = pathlib.Path(__file__).parent.parent
GUIDES = ROOT / "docs" / "guides"
# Their examples are programs of their own: `examples/`.
WITHOUT_EXAMPLES = {"faq", "jax"}


@pytest.mark.parametrize(
    "guide",
    [
        path if path.stem == "quick-start" else pytest.param(path, marks=pytest.mark.long)
        for path in sorted(GUIDES.glob("*.md"))
        if path.stem not in WITHOUT_EXAMPLES
    ],
    ids=lambda path: path.stem,
)
def test_the_examples_of_a_guide(guide, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.config.set_dtype_policy("float32")
    assert "```python" in guide.read_text()
    check_md_file(guide, memory=True)


def around():
    """What examples that are no programs of their own take as given."""

    def build_model():
        return keras.Sequential([keras.Input((4,)), *map(keras.layers.Dense, (8, 8, 2))])

    keras.config.set_dtype_policy("mixed_float16")
    model = als.wrap_model(build_model())
    optimizer = als.AdaptiveLossScaleOptimizer("adam")
    optimizer.build(model.trainable_variables)
    names = {
        "als": als,
        "keras": keras,
        "build_model": build_model,
        "model": model,
        "critic": model,
        "optimizer": optimizer,
        "loss_fn": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        "x": keras.ops.ones((8, 4)),
        "y": np.zeros(8, "int32"),
    }
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        names["tf"] = tf
    return names


def examples_of(text):
    return grab_code_blocks(inspect.cleandoc(text), lang="python")


def test_the_examples_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = examples_of((ROOT / "README.md").read_text())
    exec(example, around())
    assert "dense" in capsys.readouterr().out
    assert "LossScaled" not in str(keras.models.load_model("model.keras").layers)


PUBLIC = {name: getattr(als, name) for name in als.__all__}
DOCUMENTED = {
    f"{name}.{part}" if part else name: thing
    for name, public in PUBLIC.items()
    for part, thing in {"": public, **(vars(public) if inspect.isclass(public) else {})}.items()
    if examples_of(getattr(thing, "__doc__", None) or "")
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_examples_of_a_docstring(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for example in examples_of(DOCUMENTED[name].__doc__):
        exec(example, around())


def test_docstrings_with_examples_are_found():
    assert {"AdaptiveLossScaleOptimizer", "neutral_scales"} <= DOCUMENTED.keys()


# What others return; their examples show it.
RECORDS = {
    "Float8Record",
    "ForwardRooms",
    "LayerRange",
    "LayerSnapshot",
    "LossChanges",
    "NarrowReduction",
    "PartRange",
    "QuantizedKernel",
    "Run",
    "ScaleRow",
    "TensorReading",
}


def test_everything_public_shows_an_example():
    without = {name for name in PUBLIC if name not in DOCUMENTED and callable(PUBLIC[name])}
    assert without == RECORDS | {"Allocation", "nonzero_total", "top_exponent"}
