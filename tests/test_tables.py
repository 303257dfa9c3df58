"""Tables that read well as Markdown and in a terminal."""

from hf_safe_ema.tables import markdown_table, percent


def test_columns_are_as_wide_as_their_widest_cell():
    assert markdown_table(["a", "long name"], [["wide cell", "b"], ["c", "d"]]).split("\n") == [
        "| a         | long name |",
        "|-----------|-----------|",
        "| wide cell | b         |",
        "| c         | d         |",
    ]


def test_a_table_without_rows():
    assert markdown_table(["a"], []) == "| a |\n|---|"


def test_rates():
    assert percent(0.125) == "12.5%"
    assert percent(0.0, (0.0, 0.04)) == "0.0% (0.0% to 4.0%)"
    assert percent(None, (0.0, 1.0)) == "none judged"
