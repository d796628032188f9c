"""Results that print as text and tables, and that notebooks show as HTML."""

import dataclasses
import html
import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        columns: Dict from the title of each column to its alignment, "left" or "right".
        rows: Sequence of rows, each a sequence of cells.
    """

    columns: dict[str, str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """The table as text with aligned columns."""
        table = RichTable(box=box.SIMPLE, pad_edge=False)
        for title, side in self.columns.items():
            table.add_column(title, justify="left" if side == "left" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        # Wide enough for any table, because lines in a log file must not wrap. Without these
        # settings, Rich adds colors, or displays the table itself in Jupyter.
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

    def as_html(self) -> str:
        """The table as HTML with no style except alignment."""
        sides = list(self.columns.values())

        def line(cells: Sequence[str], tag: str) -> str:
            return "".join(
                f'<{tag} style="text-align: {side}">{html.escape(cell)}</{tag}>'
                for cell, side in zip(cells, sides, strict=True)
            )

        head = f"<tr>{line(list(self.columns), 'th')}</tr>"
        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


class Shown:
    """A result that prints as text and tables, and that notebooks display as HTML."""

    def _parts(self) -> list[str | Table]:
        """The paragraphs and tables of the result, from top to bottom."""
        raise NotImplementedError

    def __str__(self) -> str:
        parts = (part.as_text() if isinstance(part, Table) else part for part in self._parts())
        return "\n\n".join(part for part in parts if part)

    def _repr_html_(self) -> str:
        return "".join(
            part.as_html()
            if isinstance(part, Table)
            else f"<p>{'<br/>'.join(map(html.escape, part.splitlines()))}</p>"
            for part in self._parts()
            if part
        )


def power(exponent: int | None) -> str:
    """`2^exponent`; an empty string for `None`."""
    return "" if exponent is None else f"2^{exponent}"


def powers(binades: tuple[int, int] | None) -> str:
    """A range of binades; an empty string for `None`."""
    return f"{power(binades[0])} … {power(binades[1])}" if binades else ""
