"""Every example in a guide runs as it stands, one after the other; so do those of docstrings."""

import pathlib

import keras
import pytest
from mktestdocs import check_md_file

GUIDES = pathlib.Path(__file__).parent.parent / "docs" / "guides"
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
