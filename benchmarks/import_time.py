"""How long does `import tf_adaptive_ls` take beyond `import keras`?

Each figure comes from a fresh process that imports Keras first. The backends alternate. The first
round, which fills file caches, does not count.
"""

import argparse
import os
import statistics
import subprocess
import sys

from benchmarks import report

BACKENDS = ("tensorflow", "jax")
PROGRAM = """
import time
start = time.perf_counter()
import keras
between = time.perf_counter()
import tf_adaptive_ls
print(between - start, time.perf_counter() - between)
"""


def seconds(backend):
    """Seconds for Keras in a fresh process, and for this library after it."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "KERAS_BACKEND": backend},
        check=True,
        capture_output=True,
        text=True,
    )
    keras_own, ours = process.stdout.split()[-2:]
    return {"keras": float(keras_own), "ours": float(ours)}


def row(result):
    cells = [result["name"]]
    for who in ("keras", "ours"):
        figures = [run[who] for run in result["runs"]]
        cells.append(
            f"{statistics.median(figures):.3f} s ({min(figures):.3f} … {max(figures):.3f})"
        )
    return cells


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.add_arguments(parser, "import_time")
    args = parser.parse_args(argv)
    rounds = 3 if args.quick else 15
    runs = {backend: [] for backend in BACKENDS}
    with report.progress() as progress:
        for number in progress.track(range(rounds + 1), description="rounds"):
            for backend in BACKENDS:
                figures = seconds(backend)
                if number > 0:
                    runs[backend].append(figures)
    for backend in BACKENDS:
        report.save_result(args.output, {"name": backend, "runs": runs[backend]})
    results = report.load_results(args.output, BACKENDS)
    table = report.markdown(["backend", "keras", "tf_adaptive_ls, after it"], map(row, results))
    text = (
        "# What an import takes\n\n"
        f"In a fresh process, median of {rounds} (least … most).\n\n"
        f"{table}\n\n{report.provenance_text(results)}\n"
    )
    report.save_text(args.output, text)


if __name__ == "__main__":
    main()
