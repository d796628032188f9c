"""Writes a run as one HTML page with a table, pictures, and a search by layer."""

import base64
import html
import io
import string
from collections.abc import Callable
from typing import Any

from tf_adaptive_ls.observe import plots
from tf_adaptive_ls.observe.record.run import Run
from tf_adaptive_ls.observe.scale_table import ScaleRow, cells_of, columns_of

_PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
  body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
  img { max-width: 100%; height: auto; }
  .wide { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .25rem .75rem; text-align: left; white-space: nowrap; }
  tr { border-bottom: 1px solid #8884; }
  .right { text-align: right; }
  input { font: inherit; padding: .4rem .6rem; width: 20rem; max-width: 100%; margin: .5rem 0; }
</style>
<h1>$title</h1>
<p>$summary</p>
$pictures
$layers
</html>
""")
_LAYERS = string.Template("""<h2>Layers</h2>
<p>A gradient of a layer is in its format at the scale S · 2<sup>r</sup>. <em>Gradient
binades</em> are the powers of two that gradients really span, without any scale;
<em>underflow</em> is the estimated share that becomes zero all the same.</p>
<input type="search" placeholder="search by layer or class" aria-label="search by layer or class"
  oninput="for (const row of document.querySelectorAll('tbody tr'))
    row.hidden = !row.textContent.toLowerCase().includes(this.value.toLowerCase())">
<div class="wide"><table>
<thead><tr>$header</tr></thead>
<tbody>
$rows
</tbody>
</table></div>""")
_PICTURES = {
    "Scale of every layer over time": plots.plot_scales,
    "Gradients of every layer against its format": plots.plot_spectra,
    "Training": plots.plot_training,
}
_PICTURES_OF_LOSS_CHANGES = {
    "The loss, and how much each layer lowered it": plots.plot_loss_change,
    "How much each layer lowered the loss, over time": plots.plot_loss_change_map,
    "How much each layer lowered the loss in total": plots.plot_loss_change_layers,
}


def page_of(run: Run, title: str) -> str:
    """The page as a string of HTML.

    Args:
        run: A `Run`.
        title: String.
    """
    summary: list[str] = []
    pictures: dict[str, Callable[..., Any]] = {}
    layers = ""
    if len(run.steps):
        table = run.table()
        columns = columns_of(table)
        layers = _LAYERS.substitute(
            header="".join(_cell("th", name, side) for name, side in columns.items()),
            rows="\n".join(f"<tr>{_row(row, columns)}</tr>" for row in table),
        )
        pictures |= _PICTURES
        summary.append(
            f"{run.steps[-1]} steps, {run.skipped_steps[-1]} of them skipped; "
            f"{len(run.layers)} layers with a scale; S = 2^{run.log2_loss_scale[-1]:g} at the end."
        )
    if (rooms := run.forward_rooms) is not None:
        pictures["Room of every part of the forward pass over time"] = plots.plot_forward_rooms
        summary.append(f"The forward pass had {rooms.least.min():.1f} binades left at its nearest.")
    if (changes := run.loss_changes) is not None:
        pictures |= _PICTURES_OF_LOSS_CHANGES
        summary.append(
            f"The loss went from {changes.loss_before[0]:.4g} at step {changes.since[0]} to "
            f"{changes.loss_after[-1]:.4g} at step {changes.steps[-1]}."
        )
    return _PAGE.substitute(
        title=html.escape(title),
        summary=html.escape(" ".join(summary)),
        pictures="\n".join(_picture(name, plot, run) for name, plot in pictures.items()),
        layers=layers,
    )


def _row(row: ScaleRow, columns: dict[str, str]) -> str:
    pairs = zip(cells_of(row, columns), columns.values(), strict=True)
    return "".join(_cell("td", text, side) for text, side in pairs)


def _cell(kind: str, text: str, side: str) -> str:
    return f'<{kind} class="{side}">{html.escape(text)}</{kind}>'


def _picture(name: str, plot: Callable[..., Any], run: Run) -> str:
    """A picture in light and in dark; the browser shows the one that the reader prefers."""
    return (
        f"<h2>{html.escape(name)}</h2>\n<picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_data(plot(run, dark=True))}">'
        f'<img alt="{html.escape(name)}" src="{_data(plot(run))}"></picture>'
    )


def _data(figure: Any) -> str:
    """A figure as a data URL."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
