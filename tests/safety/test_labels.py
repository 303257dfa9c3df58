"""Labelled files: columns by their usual names, labels of published sets, errors that say what is wrong."""

import json

import pytest

from hf_safe_ema.safety.labels import Labelled, load_labelled


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_xstest_rows(tmp_path):
    rows = [
        {"model": "m", "type": "contrast_discr", "prompt": "p", "completion": "c", "final_label": "2_full_refusal"},
        {"model": "m", "type": "homonyms", "prompt": "p", "completion": "c", "final_label": "1_full_compliance"},
        {"model": "m", "type": "homonyms", "prompt": "p", "completion": "", "final_label": "3_partial_refusal"},
    ]
    assert load_labelled(write(tmp_path / "x.jsonl", rows)) == [
        Labelled("p", "c", "refusal", True, "m"),
        Labelled("p", "c", "compliance", False, "m"),
        Labelled("p", "", "partial", False, "m"),
    ]


@pytest.mark.parametrize(
    ("columns", "harmful"),
    [
        ({"harmful": True}, True),
        ({"harmful": "false"}, False),
        ({"prompt_label": "unsafe"}, True),
        ({"prompt_label": "safe"}, False),
        ({}, None),
    ],
)
def test_whether_the_prompt_is_harmful(tmp_path, columns, harmful):
    (row,) = load_labelled(
        write(tmp_path / "x.jsonl", [{"goal": "g", "response": "r", "label": "refusal", **columns}])
    )
    assert row.harmful is harmful


def test_csv(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt,generation,human_label\n"a, b",no,Direct Refusal\n', encoding="utf-8")
    assert load_labelled(path) == [Labelled("a, b", "no", "refusal", None, "")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "p", "label": "refusal"}, "no response column among"),
        ({"prompt": "p", "response": "r"}, "no label column among"),
        ({"prompt": "p", "response": "r", "label": "maybe"}, r"row 1: label 'maybe' is unknown; use one of"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_labelled(write(tmp_path / "x.jsonl", [row]))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_labelled(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no row in it"):
        load_labelled(write(tmp_path / "empty.jsonl", []))
