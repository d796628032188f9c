from tf_adaptive_ls.backend.text_table import power, powers, text_table


def test_columns_are_aligned_and_nothing_is_markup():
    text = text_table({"layer": "left", "scale": "right"}, [("conv", "2^3"), ("[red]x", "2^-12")])
    assert [line.strip() for line in text.splitlines()] == [
        "layer    scale",
        "──────────────",
        "conv       2^3",
        "[red]x   2^-12",
    ]


def test_a_long_row_stays_in_one_line():
    assert len(text_table({"layer": "left"}, [("x" * 500,)]).splitlines()) == 3


def test_powers_of_two():
    assert (power(-3), power(None)) == ("2^-3", "")
    assert (powers((-3, 4)), powers(None)) == ("2^-3 … 2^4", "")
