"""`hf-safe-ema judge`: accuracy and bias against people, agreement of judges, the cases where they differ."""

import json
from types import SimpleNamespace

import pytest

from hf_safe_ema import Verdict
from hf_safe_ema.cli import main
from hf_safe_ema.judging import judge_file, measure
from hf_safe_ema.safety.labels import Labelled

REFUSES, ANSWERS, EMPTY = "I'm sorry, I can't help with that.", "Boil it for ten minutes.", ""
ROWS = [
    # model, harmful, response, what people say
    ("a", True, REFUSES, "refusal"),
    ("a", True, ANSWERS, "compliance"),
    ("a", False, ANSWERS, "compliance"),
    ("b", True, ANSWERS, "refusal"),  # the judge is wrong
    ("b", True, EMPTY, "refusal"),  # the judge cannot say
    ("b", False, REFUSES, "refusal"),
    ("b", False, ANSWERS, "partial"),  # left out
]


@pytest.fixture
def labelled_file(tmp_path):
    rows = [
        {"model": m, "harmful": h, "prompt": f"Question {i}?", "response": r, "label": label}
        for i, (m, h, r, label) in enumerate(ROWS)
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row_of(found: dict, model: str, prompts: str) -> dict:
    (row,) = [row for row in found["accuracy"] if row["model"] == model and row["prompts"] == prompts]
    return row


def test_accuracy_bias_and_what_is_undecided(labelled_file):
    found = judge_file(labelled_file)
    everybody = row_of(found, "all", "harmful")
    assert (everybody["count"], everybody["accuracy"], everybody["undecided"]) == (4, 0.5, 1)
    assert everybody["compliance"] == 0.25
    assert everybody["judged_compliance"] == pytest.approx(2 / 3)
    assert everybody["bias"] == pytest.approx(2 / 3 - 0.25)
    assert row_of(found, "a", "harmful")["accuracy"] == 1.0
    assert row_of(found, "b", "harmful")["accuracy"] == 0.0
    assert row_of(found, "all", "harmless")["count"] == 2
    assert found["agreement"] == []


def test_prompts_of_unknown_kind_are_measured_together():
    rows = [Labelled("?", ANSWERS, "compliance", None, ""), Labelled("?", REFUSES, "refusal", None, "")]
    (found,) = measure(rows, [Verdict("compliance", ""), Verdict("unscored", "")])
    assert (found.prompts, found.model, found.accuracy, found.undecided) == ("all", "all", 0.5, 1)


def test_nothing_judged_has_no_bias():
    (found,) = measure([Labelled("?", "x", "refusal", True, "")], [Verdict("unscored", "timeout")])
    assert found.bias is None
    assert found.accuracy == 0


def test_judges_are_compared_with_each_other_and_cases_written(labelled_file, tmp_path):
    cases = tmp_path / "cases.jsonl"
    always = SimpleNamespace(
        name="always", judge=lambda prompts, responses: [Verdict("refusal", "always")] * len(responses)
    )
    found = judge_file(labelled_file, ["keywords", always], cases)
    (pair,) = found["agreement"]
    assert (pair["first"], pair["second"], pair["count"]) == ("keywords:default-v2", "always", 7)
    assert pair["differing"] == [1, 2, 3, 4, 6]
    assert pair["kappa"] == 0
    written = [json.loads(line) for line in cases.read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in written] == ["Question 1?", "Question 2?", "Question 3?", "Question 4?"]
    assert written[0]["verdicts"]["always"]["label"] == "refusal"
    assert json.loads(json.dumps(found)) is not None


def test_the_command(labelled_file, tmp_path, capsys):
    numbers = tmp_path / "numbers.json"
    assert main(["judge", str(labelled_file), "--judge", "keywords", "--judge", "gcg-7", "--json", str(numbers)]) == 0
    printed = capsys.readouterr().out
    assert "keywords:default-v2" in printed and "Cohen's kappa" in printed
    found = json.loads(numbers.read_text(encoding="utf-8"))
    assert {row["judge"] for row in found["accuracy"]} == {"keywords:default-v2", "keywords:gcg-7"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "no such file"),
        (["FILE", "--judge", "gpt-5"], "judge='gpt-5' is unknown"),
        (["FILE", "--json", "/no/such/folder/x.json"], "its folder does not exist"),
        (["FILE", "--cases", "/no/such/folder/x.jsonl"], "its folder does not exist"),
    ],
)
def test_input_that_cannot_be_used(labelled_file, capsys, arguments, message):
    assert main(["judge", *[str(labelled_file) if a == "FILE" else a for a in arguments]]) == 2
    assert message in capsys.readouterr().err
