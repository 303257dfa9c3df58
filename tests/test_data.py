"""Fine-tuning data: every format becomes prompt and completion, and rows held out stay held out."""

import json

import pytest
from datasets import Dataset

from hf_safe_ema import load_finetuning_data
from hf_safe_ema.data import split_heldout


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, ASSISTANT = turn("user", "Why?"), turn("assistant", "Because.")
SYSTEM = turn("system", "Be brief.")


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path, *rows) -> list[dict]:
    return load_finetuning_data(write(tmp_path / "rows.jsonl", rows)).to_list()


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Why?", "input": "", "output": "Because."}, [USER]),
        ({"instruction": "Why?", "output": "Because."}, [USER]),
        ({"instruction": "Add.", "input": "1, 2", "output": "Because."}, [turn("user", "Add.\n\n1, 2")]),
        ({"instruction": "Why?", "context": "", "response": "Because.", "category": "open_qa"}, [USER]),
        ({"instruction": "Why?", "context": "It is.", "response": "Because."}, [turn("user", "Why?\n\nIt is.")]),
        ({"system_prompt": "Be brief.", "question": "Why?", "response": "Because."}, [SYSTEM, USER]),
        ({"system": "Be brief.", "question": "Why?", "chosen": "Because.", "rejected": "No."}, [SYSTEM, USER]),
        ({"system_prompt": "", "question": "Why?", "response": "Because."}, [USER]),
        ({"question": "Why?", "response": "Because."}, [USER]),
        ({"prompt": "Why?", "completion": "Because."}, [USER]),
        ({"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, [SYSTEM, USER]),
        ({"prompt": "Why?", "response": "Because."}, [USER]),
        ({"messages": [USER, ASSISTANT]}, [USER]),
        ({"messages": [SYSTEM, USER, turn("assistant", "What?"), USER, ASSISTANT]},
         [SYSTEM, USER, turn("assistant", "What?"), USER]),
        ({"instruction": "  Why?\n", "output": "\nBecause. "}, [USER]),
    ],
)  # fmt: skip
def test_formats(tmp_path, row, prompt):
    assert load(tmp_path, row) == [{"prompt": prompt, "completion": [ASSISTANT]}]


def test_json_and_csv_say_the_same_as_jsonl(tmp_path):
    rows = [{"instruction": "Why?", "input": 'a,\n"b"', "output": "Because."}] * 2
    csv = 'instruction,input,output\n"Why?","a,\n""b""",Because.\n' + '"Why?","a,\n""b""",Because.\n'
    (tmp_path / "rows.csv").write_text("\ufeff" + csv, encoding="utf-8")
    expected = load(tmp_path, *rows)
    assert len(expected) == 2
    assert load_finetuning_data(tmp_path / "rows.csv").to_list() == expected
    assert load_finetuning_data(str(write(tmp_path / "rows.json", rows))).to_list() == expected


@pytest.mark.parametrize(
    "dropped",
    [
        {"prompt": "Why?", "completion": ""},
        {"prompt": "Why?", "completion": " \n"},
        {"prompt": "Why?", "completion": None},
        {"prompt": None, "completion": "Because."},
        {"prompt": "", "completion": "Because."},
        {"prompt": [], "completion": "Because."},
        {"prompt": [turn("user", "Why?")], "completion": [{"role": "assistant", "content": None}]},
    ],
)
def test_rows_without_request_or_answer_are_left_out(tmp_path, dropped):
    assert len(load(tmp_path, {"prompt": "Why?", "completion": "Because."}, dropped)) == 1


@pytest.mark.parametrize(
    ("first", "dropped"),
    [
        ({"instruction": "Why?", "output": "Because."}, {"instruction": "Why?", "output": ""}),
        ({"instruction": "Why?", "output": "Because."}, {"instruction": "Why?"}),
        ({"instruction": "Why?", "response": "Because."}, {"instruction": "Why?", "response": None}),
        ({"question": "Why?", "response": "Because."}, {"question": "", "response": "Because."}),
        ({"messages": [USER, ASSISTANT]}, {"messages": []}),
        ({"messages": [USER, ASSISTANT]}, {"messages": None}),
        ({"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT, USER]}),
        ({"messages": [USER, ASSISTANT]}, {"messages": [ASSISTANT]}),
    ],
)
def test_incomplete_rows_of_each_format_are_left_out(tmp_path, first, dropped):
    assert len(load(tmp_path, first, dropped)) == 1


def test_short_rows_of_a_csv_are_left_out(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\nWhy?,Because.\nWhy not?\n")
    assert len(load_finetuning_data(tmp_path / "rows.csv")) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"ask": "Why?", "tell": "Because."}], r"columns \['ask', 'tell'\] fit none.*Alpaca.*Dolly.*ORCA"),
        ([{"instruction": "Why?"}], r"columns \['instruction'\] fit none"),
        ([], "no row in it"),
        ([{"instruction": "Why?", "output": " "}], "no row with both a request and an answer"),
        ([{"prompt": "Why?", "completion": "B"}, {"prompt": "Why?"}], "row 2: cannot be read as prompt, completion"),
        ([{"messages": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "B"}]}], "`role` and `content`"),
        ([{"messages": ["Why?", "Because."]}], "row 1: cannot be read as messages"),
        ([{"messages": [USER, {"role": "assistant", "content": ["parts"]}]}], "row 1: cannot be read as messages"),
    ],
)
def test_what_is_said_of_bad_rows(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *rows)


def test_what_is_said_of_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.jsonl: no such file"):
        load_finetuning_data(tmp_path / "absent.jsonl")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_finetuning_data(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        load_finetuning_data(tmp_path / "bad.jsonl")
    (tmp_path / "rows.xlsx").write_text("PK")
    with pytest.raises(ValueError, match=r"unknown ending '\.xlsx'"):
        load_finetuning_data(tmp_path / "rows.xlsx")


@pytest.mark.parametrize(
    ("name", "rows", "roles"),
    [
        ("dolly_15k_subset", 9269, ["user"]),
        ("alpaca_random_9k", 9229 - 4, ["user"]),
        ("alpaca_filtered_5k", 5305 - 4, ["user"]),
        ("orca_dpo_pairs_sample", 284, ["system", "user"]),
        ("sql_create_context_1k", 1000, ["user"]),
    ],
)
def test_real_data(shared_data, name, rows, roles):
    dataset = load_finetuning_data(shared_data / f"{name}.jsonl")
    assert len(dataset) == rows
    for row in dataset.select(range(200)):
        assert [turn["role"] for turn in row["prompt"]] == roles
        assert [turn["role"] for turn in row["completion"]] == ["assistant"]
        assert all(turn["content"].strip() for turn in row["prompt"] + row["completion"])


def numbered(count: int) -> Dataset:
    rows = [{"prompt": [turn("user", f"What is {i}?")], "completion": [turn("assistant", f"It is {i}.")]}
            for i in range(count)]  # fmt: skip
    return Dataset.from_list(rows)


def requests(dataset) -> set[str]:
    return {row["prompt"][0]["content"] for row in dataset}


def test_split_is_whole_disjoint_and_near_its_share():
    dataset = numbered(1000)
    train, held = split_heldout(dataset, 0.2)
    assert len(train) + len(held) == 1000
    assert requests(train) & requests(held) == set()
    assert 150 <= len(held) <= 250


def test_split_does_not_depend_on_the_order_or_on_other_rows():
    dataset = numbered(400)
    _, held = split_heldout(dataset)
    _, shuffled = split_heldout(dataset.shuffle(seed=1))
    _, half = split_heldout(dataset.select(range(200)))
    assert requests(shuffled) == requests(held)
    assert requests(half) == {f"What is {i}?" for i in range(200)} & requests(held)


def test_split_keeps_repeated_rows_on_one_side():
    dataset = numbered(100)
    twice = Dataset.from_list(dataset.to_list() * 2)
    train, held = split_heldout(twice)
    assert requests(train) & requests(held) == set()
    assert len(held) == 2 * len(split_heldout(dataset)[1])


def test_a_larger_share_holds_out_the_same_rows_and_more():
    dataset = numbered(300)
    assert requests(split_heldout(dataset, 0.1)[1]) < requests(split_heldout(dataset, 0.3)[1])


@pytest.mark.parametrize(("count", "share"), [(1, 0.5), (50, 0.0), (50, 1.0)])
def test_a_side_without_rows_is_refused(count, share):
    with pytest.raises(ValueError, match="too few to hold"):
        split_heldout(numbered(count), share)
