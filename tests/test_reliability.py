"""The faults of `./dev benchmark reliability` are survived: each part short, and whole."""

import pytest

from benchmarks import reliability
from benchmarks.faults import threads

# What damaged files are like is in `test_bad_files`.
SHORT = ("kills", "numbers", "soak", "disk")


def check(part, quick):
    outcomes = reliability.run_part(part, quick, lambda: None)["outcomes"]
    failures = [f"{o['fault']}: {failure}" for o in outcomes for failure in o["failures"]]
    assert not failures
    assert all(o["injected"] == o["survived"] > 0 for o in outcomes)


@pytest.mark.long
@pytest.mark.parametrize("part", SHORT)
def test_part(part):
    check(part, quick=True)


@pytest.mark.long
@pytest.mark.parametrize("part", [part for part in reliability.PARTS if part != "files"])
def test_whole_part(part):
    check(part, quick=False)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(threads.two_that_train, marks=pytest.mark.long),
        threads.two_subclasses_that_train,
        threads.neutral_in_another,
    ],
)
def test_threads(fault, mixed_float16):
    assert fault("graph") is None


def test_the_table_tells_what_does_not_survive(tmp_path, capsys, monkeypatch):
    outcome = {"fault": "flood", "injected": 2, "survived": 1, "lost": "all", "failures": ["wet"]}
    monkeypatch.setattr(reliability, "run_part", lambda *_: {"name": "disk", "outcomes": [outcome]})
    assert reliability.main(["--only", "disk", "--output", str(tmp_path)]) == 1
    text = (tmp_path / "README.md").read_text()
    assert text in capsys.readouterr().out
    assert "| flood   | 2          | 1          | all    |" in text
    assert "- flood: wet" in text
