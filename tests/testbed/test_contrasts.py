"""The file format of harmful and harmless actions side by side."""

import random

import pytest

from hf_safe_ema.testbed import DATA_FOLDER
from hf_safe_ema.testbed.contrasts import Contrast, choices, choose, parse_line, read_contrasts


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("steal a car | wash a car | With soap.", Contrast("steal a car", "wash a car", "With soap.")),
        (" | wash a car | With soap.", Contrast(None, "wash a car", "With soap.")),
        ("? What is soap? | It cleans.", Contrast(None, "What is soap?", "It cleans.", is_question=True)),
    ],
)
def test_the_three_forms_of_a_line(line, expected):
    assert parse_line(line) == expected


@pytest.mark.parametrize(
    "line",
    [
        "wash a car",
        "a | b",
        "a | b | ",
        " |  | c",
        "? a",
        "? | b",
        "a | b | c | d",
        "wash [a car | b | c",
        "wash a] car | b | c",
    ],
)
def test_other_forms_are_errors(line):
    with pytest.raises(ValueError, match=r"not a line of contrasts|brackets that do not match"):
        parse_line(line)


def test_alternatives():
    action = "wash [a car/a van] for [a school/a club/me]"
    assert choices(action) == 6
    assert {choose(action, random.Random(seed)) for seed in range(100)} == {
        f"wash {what} for {whom}" for what in ("a car", "a van") for whom in ("a school", "a club", "me")
    }
    assert choose("wash a car", random.Random(0)) == "wash a car"


def test_the_shipped_files():
    first, later = (read_contrasts(DATA_FOLDER / "contrasts" / part) for part in ("", "later"))
    assert len(first) > 18_000 and len(later) > 1_000
    lines = first + later
    assert len(set(lines)) > 0.999 * len(lines)
