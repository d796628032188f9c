"""Draws all pictures of a run and prints its table: `python -m tf_adaptive_ls RUN.jsonl`."""

import argparse
import pathlib
import sys

from tf_adaptive_ls.observe.record.run import load_run


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tf_adaptive_ls",
        description="Draws what every layer's gradients did in a run, and prints a table.",
    )
    parser.add_argument(
        "run", type=pathlib.Path, help="the file that LossScaleMonitor or LossChangeMonitor wrote"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=pathlib.Path,
        default=pathlib.Path(),
        metavar="DIR",
        help="where to write scales.png, spectra.png, training.png, if the LossScaleMonitor had a "
        "batch forward_rooms.png and, if a LossChangeMonitor was there, loss_change.png and two "
        "more; default: here",
    )
    parser.add_argument("--step", type=int, help="the step that spectra.png shows, not the last")
    parser.add_argument("--dark", action="store_true", help="draw on black")
    parser.add_argument(
        "--html",
        action="store_true",
        help="write one page with all of it, report.html, that needs no network",
    )
    args = parser.parse_args(argv)

    # Imported here, so that errors about arguments come before an error about a missing package.
    from tf_adaptive_ls import plots

    pictures = {}
    try:
        run = load_run(args.run, plots.MAX_SNAPSHOTS)
        if len(run.steps) or run.loss_changes is None:
            pictures["scales"] = plots.plot_scales(run, dark=args.dark)
            pictures["spectra"] = plots.plot_spectra(run, step=args.step, dark=args.dark)
            pictures["training"] = plots.plot_training(run, dark=args.dark)
        if run.forward_rooms is not None:
            pictures["forward_rooms"] = plots.plot_forward_rooms(run, dark=args.dark)
        if run.loss_changes is not None:
            pictures["loss_change"] = plots.plot_loss_change(run, dark=args.dark)
            pictures["loss_change_map"] = plots.plot_loss_change_map(run, dark=args.dark)
            pictures["loss_change_layers"] = plots.plot_loss_change_layers(run, dark=args.dark)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    if len(run.steps):
        print(run.table())
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in pictures.items():
        path = args.output / f"{name}.png"
        figure.savefig(path, dpi=110)
        print(f"Written: {path}")
    if args.html:
        from tf_adaptive_ls.observe.html_page import page_of

        path = args.output / "report.html"
        path.write_text(page_of(run, args.run.stem), encoding="utf-8")
        print(f"Written: {path}")


if __name__ == "__main__":
    main()
