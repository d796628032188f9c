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
    """A table of text.

    Attributes:
        columns: Dict by title of the side that cells are aligned to, "left" or "right".
        rows: A sequence of cells for each row.
    """

    columns: dict[str, str]
    rows: Sequence[Sequence[str]]

    def as_text(self) -> str:
        """Aligned columns."""
        table = RichTable(box=box.SIMPLE, pad_edge=False)
        for title, side in self.columns.items():
            table.add_column(title, justify="left" if side == "left" else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        # Wide enough for anything: a table in a log file must not wrap.
        # Rich would color it, or show it in Jupyter instead.
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
        """An HTML table without style of its own, but for alignment."""
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
    """A result that prints as text and tables, and that notebooks show as HTML."""

    def _parts(self) -> list[str | Table]:
        """Paragraphs and tables, from top to bottom."""
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
    """`2^exponent`, or nothing for `None`."""
    return "" if exponent is None else f"2^{exponent}"


def powers(binades: tuple[int, int] | None) -> str:
    """A range of binades, or nothing for `None`."""
    return f"{power(binades[0])} … {power(binades[1])}" if binades else ""
