"""Tables in plain text, for printing."""

import io
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def text_table(columns: dict[str, Any], rows: Iterable[Sequence[str]]) -> str:
    """Aligned text.

    Args:
        columns: Dict of "left" or "right" by title.
        rows: Iterable of sequences of strings.
    """
    table = Table(box=box.SIMPLE, pad_edge=False)
    for title, justify in columns.items():
        table.add_column(title, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Wide enough for anything: a table in a log file must not wrap.
    # Rich would colour it, or show it in Jupyter instead.
    written = io.StringIO()
    console = Console(
        file=written,
        width=1000,
        markup=False,
        highlight=False,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
    )
    console.print(table)
    lines = written.getvalue().splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def power(exponent: int | None) -> str:
    """`2^exponent`, or nothing for `None`."""
    return "" if exponent is None else f"2^{exponent}"


def powers(binades: tuple[int, int] | None) -> str:
    """A range of binades, or nothing for `None`."""
    return f"{power(binades[0])} … {power(binades[1])}" if binades else ""
