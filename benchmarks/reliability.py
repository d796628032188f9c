"""What goes wrong around a training run, on purpose: what survives, and what is lost?

Parts, each in a module of `faults` that says what must hold:

    kills      processes killed while they train, or while they write a checkpoint
    numbers    Inf and NaN in data, targets, sample weights and weights
    soak       20,000 steps: memory, retracing, drift of scales
    disk       a full, missing, vanishing or slow disk; a record of someone else
    files      saved models, checkpoints and records, damaged in 300 ways each
    threads    several threads

Prints a Markdown table, and each failure with the seed that reproduces it; writes both, and all
figures as JSON. Parts from earlier runs into the same directory stay in the table.
"""

import argparse
import dataclasses
import importlib
import pathlib
import sys
import tempfile

from benchmarks import report

PARTS = ("kills", "numbers", "soak", "disk", "files", "threads")
QUICK_PARTS = ("numbers", "disk", "files")


def run_part(name, quick, advance):
    """The outcomes of one part for JSON."""
    part = importlib.import_module(f"benchmarks.faults.{name}")
    with tempfile.TemporaryDirectory() as directory:
        outcomes = part.outcomes(pathlib.Path(directory), quick, advance)
        return {"name": name, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}


def row(outcome):
    return (
        outcome["fault"],
        str(outcome["injected"]),
        str(outcome["survived"]),
        outcome["lost"],
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "reliability")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="names")
    args = parser.parse_args(argv)
    names = args.only or (QUICK_PARTS if args.quick else PARTS)
    with report.progress() as progress:
        for name in names:
            bar = progress.add_task(name, total=None)
            result = run_part(name, args.quick, lambda bar=bar: progress.advance(bar))
            report.save_result(args.output, result)
            progress.update(bar, total=1, completed=1)
    results = report.load_results(args.output, PARTS)
    outcomes = [outcome for result in results for outcome in result["outcomes"]]
    failures = [f"- {o['fault']}: {failure}" for o in outcomes for failure in o["failures"]]
    header = ["fault", "injected", "survived", "lost"]
    text = (
        "# Reliability\n\n"
        f"{report.markdown(header, map(row, outcomes))}\n\n"
        + ("\n".join(["Not survived:", "", *failures, "", ""]) if failures else "")
        + f"{report.provenance_text(results)}\n"
    )
    report.save_text(args.output, text)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
