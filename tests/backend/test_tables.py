from tf_adaptive_ls.backend.tables import Shown, Table, power, powers


def test_columns_are_aligned_and_nothing_is_markup():
    text = Table(
        {"layer": "left", "scale": "right"}, [("conv", "2^3"), ("[red]x", "2^-12")]
    ).as_text()
    assert [line.strip() for line in text.splitlines()] == [
        "layer    scale",
        "──────────────",
        "conv       2^3",
        "[red]x   2^-12",
    ]


def test_a_long_row_stays_in_one_line():
    assert len(Table({"layer": "left"}, [("x" * 500,)]).as_text().splitlines()) == 3


def test_powers_of_two():
    assert (power(-3), power(None)) == ("2^-3", "")
    assert (powers((-3, 4)), powers(None)) == ("2^-3 … 2^4", "")


class Result(Shown):
    def _parts(self):
        return ["a < b\nand c", "", Table({"layer": "left"}, [("x & y",)])]


def test_parts_are_paragraphs():
    assert [line.strip() for line in str(Result()).splitlines()] == [
        "a < b",
        "and c",
        "",
        "layer",
        "─────",
        "x & y",
    ]


def test_in_notebooks_parts_are_html():
    assert Result()._repr_html_() == (
        "<p>a &lt; b<br/>and c</p>"
        '<table><thead><tr><th style="text-align: left">layer</th></tr></thead>'
        '<tbody><tr><td style="text-align: left">x &amp; y</td></tr></tbody></table>'
    )
