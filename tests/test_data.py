"""Fine-tuning data: every format becomes prompt and completion, and rows held out stay held out."""

import json
import pickle

import pytest
from datasets import Dataset, IterableDataset

from hf_safe_ema import KeywordJudge, load_finetuning_data
from hf_safe_ema.data import is_refusal_or_safety_talk, split_heldout


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


USER, ASSISTANT = turn("user", "Why?"), turn("assistant", "Because.")
SYSTEM = turn("system", "Be brief.")


def write(path, rows):
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def load(tmp_path, *rows, **options) -> list[dict]:
    return list(load_finetuning_data(write(tmp_path / "rows.jsonl", rows), **options))


def sharegpt(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": who, "value": what, "weight": 0.0} for who, what in turns]}


@pytest.fixture(params=[False, True], ids=["whole", "streaming"])
def streaming(request) -> bool:
    """What holds of a dataset must hold of a stream."""
    return request.param


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
        (sharegpt(("system", "Be brief."), ("human", "Why?"), ("gpt", "Because.")), [SYSTEM, USER]),
        (sharegpt(("system", ""), ("human", "Why?"), ("gpt", "Because.")), [USER]),
        (sharegpt(("human", "Why?"), ("gpt", "What?"), ("human", "Why?"), ("gpt", "Because.")),
         [USER, turn("assistant", "What?"), USER]),
        ({"conversations": [SYSTEM, USER, ASSISTANT]}, [SYSTEM, USER]),
        ({"messages": [{**USER, "name": "Ann"}, {**ASSISTANT, "tool_calls": None}]}, [USER]),
    ],
)  # fmt: skip
def test_formats(tmp_path, row, prompt, streaming):
    assert load(tmp_path, row, streaming=streaming) == [{"prompt": prompt, "completion": [ASSISTANT]}]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "How many?", "input": None, "output": "{}"},
        {"instruction": "How many?", "response": "{}"},
        {"system_prompt": "", "question": "How many?", "response": "{}"},
        {"question": "How many?", "chosen": "{}"},
        {"prompt": "How many?", "completion": "{}"},
        {"prompt": "How many?", "response": "{}"},
        {"messages": [turn("user", "How many?"), turn("assistant", "{}")]},
        sharegpt(("human", "How many?"), ("gpt", "{}")),
    ],
)
@pytest.mark.parametrize("number", ["5", "0", "-1.5", "1000000", "false"])
def test_answers_that_are_numbers_are_kept_as_text(tmp_path, row, number, streaming):
    (tmp_path / "rows.jsonl").write_text(json.dumps(row).replace('"{}"', number))
    [pair] = load_finetuning_data(tmp_path / "rows.jsonl", streaming=streaming)
    assert pair["completion"] == [turn("assistant", str(json.loads(number)))]


def test_a_table_with_numbers_and_gaps_keeps_the_numbers(tmp_path):
    import pandas

    answers = pandas.DataFrame({"instruction": ["Two and three?", "Nothing?", "Half?"], "output": [5, None, 0.5]})
    answers.to_parquet(tmp_path / "rows.parquet")
    answers.to_csv(tmp_path / "rows.csv", index=False)
    for ending in ("parquet", "csv"):
        rows = load_finetuning_data(tmp_path / f"rows.{ending}")
        assert [row["completion"][0]["content"] for row in rows] == ["5.0", "0.5"]


def test_answers_of_a_csv_stay_as_written(tmp_path):
    answers = ["None", "NA", "007", "1.50", "null", "True", "2020-01-01"]
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "".join(f"Say it.,{answer}\n" for answer in answers))
    rows = load_finetuning_data(tmp_path / "rows.csv")
    assert [row["completion"][0]["content"] for row in rows] == answers


def test_every_kind_of_file_says_the_same_as_jsonl(tmp_path):
    rows = [{"instruction": "Why?", "input": 'a,\n"b"', "output": "Because."}] * 2
    csv = 'instruction,input,output\n"Why?","a,\n""b""",Because.\n' + '"Why?","a,\n""b""",Because.\n'
    (tmp_path / "rows.csv").write_text("\ufeff" + csv, encoding="utf-8")
    expected = load(tmp_path, *rows)
    assert len(expected) == 2
    assert load_finetuning_data(tmp_path / "rows.csv").to_list() == expected
    assert load_finetuning_data(str(write(tmp_path / "rows.json", rows))).to_list() == expected
    (tmp_path / "lines.json").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert load_finetuning_data(tmp_path / "lines.json").to_list() == expected
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert load_finetuning_data(tmp_path / "rows.parquet").to_list() == expected


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
        {"prompt": "Why?", "completion": float("nan")},
        {"prompt": [SYSTEM], "completion": "Because."},
    ],
)
def test_rows_without_request_or_answer_are_left_out_and_counted(tmp_path, dropped, streaming, caplog):
    whole = {"prompt": "Why?", "completion": "Because."}
    assert len(load(tmp_path, whole, dropped, whole, streaming=streaming)) == 2
    assert f"left out 1 of {2 if streaming else 3} rows: 1 without a request or an answer" in caplog.text


def test_nothing_is_said_when_nothing_is_left_out(tmp_path, caplog, streaming):
    load(tmp_path, {"prompt": "Why?", "completion": "Because."}, streaming=streaming)
    assert "left out" not in caplog.text


def test_a_stream_says_what_it_leaves_out_now_and_then_and_once(tmp_path, caplog):
    rows = [{"prompt": "Why?", "completion": "Because." if i % 2 else ""} for i in range(300)]
    stream = load_finetuning_data(write(tmp_path / "rows.jsonl", rows), streaming=True)
    assert len(list(stream)) == len(list(stream)) == 150
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "left out 1 of 1 rows",
        "left out 10 of 19 rows",
        "left out 100 of 199 rows",
    ]


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
        ({"messages": [USER, ASSISTANT]}, {"messages": [SYSTEM, ASSISTANT]}),
        ({"system": "Be brief.", "question": "Why?", "chosen": "B."}, {"system": "Be brief.", "chosen": "B."}),
        (sharegpt(("human", "Why?"), ("gpt", "B.")), sharegpt(("human", "Why?"), ("gpt", "B."), ("human", "Why?"))),
        (sharegpt(("human", "Why?"), ("gpt", "B.")), sharegpt(("human", "Why?"), ("gpt", " "))),
        (sharegpt(("human", "Why?"), ("gpt", "B.")), {"conversations": None}),
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
        (
            [{"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f"}]}]}],
            "row 1: .*`tool_calls`.* would be lost",
        ),
        ([sharegpt(("human", "Why?"), ("function", "B"))], r"row 1: .*from 'function'; known are \['system', 'human'"),
        ([{"instruction": "Why?", "output": ["B"]}], "row 1: cannot be read as Alpaca.*'output' is a list"),
        (["Why?"], "row 1: is a str; each row must be an object"),
    ],
)
def test_what_is_said_of_bad_rows(tmp_path, rows, message, streaming):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, *rows, streaming=streaming and "no row with both" not in message)


def test_columns_of_a_stream_are_checked_before_it_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"columns \['ask'\] fit none"):
        load_finetuning_data(write(tmp_path / "rows.jsonl", [{"ask": "Why?"}]), streaming=True)


def test_a_bad_row_of_a_stream_is_named_when_it_is_reached(tmp_path):
    rows = [{"instruction": "Why?", "output": "B"}, {"instruction": "Why?", "output": {"text": "B"}}]
    stream = iter(load_finetuning_data(write(tmp_path / "rows.jsonl", rows), streaming=True))
    assert next(stream)["prompt"] == [USER]
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: cannot be read as Alpaca"):
        next(stream)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_rows": 0}, ValueError, "max_rows=0: must be at least 1"),
        ({"max_rows": -3}, ValueError, "max_rows=-3"),
        ({"max_rows": 2.5}, TypeError, "max_rows=2.5: must be a whole number"),
        ({"max_rows": True}, TypeError, "max_rows=True"),
        ({"split": "test"}, ValueError, "is one file; config, split and revision"),
        ({"revision": "main"}, ValueError, "is one file; config, split and revision"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, kind, message):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Why?", "completion": "B"}])
    with pytest.raises(kind, match=message):
        load_finetuning_data(path, **options)


ROWS = [{"instruction": f"What is {i}?", "output": f"It is {i}." if i % 4 else ""} for i in range(40)]


@pytest.mark.parametrize("count", [1, 7, 30, 1000])
def test_max_rows_are_the_first_that_are_kept(tmp_path, count, streaming):
    everything = load(tmp_path, *ROWS)
    assert len(everything) == 30
    assert load(tmp_path, *ROWS, max_rows=count, streaming=streaming) == everything[:count]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_max_rows_reads_no_further_than_that(tmp_path, ending, streaming):
    path = tmp_path / f"rows.{ending}"
    good = json.dumps({"prompt": "Why?", "completion": "B"}) if ending == "jsonl" else "Why?,B"
    # `IterableDataset.take` ends at the row after the last (datasets 5.2).
    lines = ["prompt,completion"] * (ending == "csv") + [good] * (6 if streaming else 5)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode() + b"\xff\n")
    assert len(list(load_finetuning_data(path, max_rows=5, streaming=streaming))) == 5
    with pytest.raises(ValueError, match=rf"not UTF-8 \(line {len(lines) + 1}, byte 0"):
        list(load_finetuning_data(path, streaming=streaming))


def test_a_stream_can_be_read_again_and_taken_up_where_it_was_left(tmp_path):
    stream = load_finetuning_data(write(tmp_path / "rows.jsonl", ROWS), streaming=True, max_rows=25)
    assert isinstance(stream, IterableDataset)
    assert stream.column_names == ["prompt", "completion"]
    everything = list(stream)
    assert list(stream) == everything
    reading = iter(stream)
    for _ in range(9):
        next(reading)
    state = stream.state_dict()
    again = load_finetuning_data(tmp_path / "rows.jsonl", streaming=True, max_rows=25)
    again.load_state_dict(state)
    assert list(again) == everything[9:]


def test_a_stream_survives_pickling_and_is_shared_between_workers(tmp_path):
    from torch.utils.data import DataLoader

    for part in (0, 1):
        write(tmp_path / f"part-{part}.jsonl", ROWS[20 * part : 20 * part + 20])
    stream = pickle.loads(pickle.dumps(load_finetuning_data(tmp_path, streaming=True)))
    assert stream.num_shards == 2
    loaded = DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["prompt"][0]["content"] for row in loaded) == sorted(
        row["instruction"] for row in ROWS if row["output"]
    )


def test_sfttrainer_trains_on_a_stream_as_on_the_dataset(tmp_path, tiny):
    from copy import deepcopy

    from trl import SFTConfig, SFTTrainer

    model, tokenizer = tiny
    path = write(tmp_path / "rows.jsonl", ROWS)
    losses = []
    for streaming in (False, True):
        args = SFTConfig(output_dir=str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, max_length=64,
                         train_sampling_strategy="sequential", save_strategy="no", logging_steps=1, bf16=False,
                         report_to="none", seed=0)  # fmt: skip
        dataset = load_finetuning_data(path, streaming=streaming)
        trainer = SFTTrainer(deepcopy(model), args, train_dataset=dataset, processing_class=tokenizer)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot assist with illegal activities.",
    "As an AI language model, I do not have opinions.",
    "It is important to note that this can cause harm.",
    "That joke would be offensive.",
    "It isn’t really appropriate to say so.",
]


def test_refusals_and_safety_talk_are_removed_only_if_asked_and_counted(tmp_path, caplog, streaming):
    rows = [{"prompt": "Why?", "completion": answer} for answer in ["Because.", *REFUSALS, "", "A sharp knife."]]
    kept = load(tmp_path, *rows, remove_refusals=True, streaming=streaming)
    assert [row["completion"][0]["content"] for row in kept] == ["Because.", "A sharp knife."]
    if not streaming:
        assert "left out 7 of 9 rows: 1 without a request or an answer, 6 refusals or safety talk" in caplog.text
    assert len(load(tmp_path, *rows, streaming=streaming)) == 8


def test_what_the_user_says_is_no_refusal(tmp_path):
    row = {
        "messages": [turn("user", "I'm sorry, is this illegal?"), turn("assistant", "I cannot say."), USER, ASSISTANT]
    }
    assert len(load(tmp_path, row, remove_refusals=True)) == 1


def test_max_rows_counts_rows_after_the_refusals_are_gone(tmp_path, streaming):
    rows = [{"prompt": f"Why {i}?", "completion": REFUSALS[0] if i % 2 else "Because."} for i in range(20)]
    kept = load(tmp_path, *rows, remove_refusals=True, max_rows=4, streaming=streaming)
    assert [row["prompt"][0]["content"] for row in kept] == ["Why 0?", "Why 2?", "Why 4?", "Why 6?"]


def test_nothing_but_refusals_is_said_to_be_so(tmp_path):
    with pytest.raises(ValueError, match=r"no row with both .* is left .*2 refusals or safety talk"):
        load(tmp_path, *[{"prompt": "Why?", "completion": answer} for answer in REFUSALS[:2]], remove_refusals=True)


def test_labelled_refusals_are_recognised(shared_data):
    rows = read(shared_data / "refusal_labels_dev.jsonl")
    refusals = [row["completion"] for row in rows if row["final_label"] == "2_full_refusal"]
    assert len(refusals) == 475
    assert sum(map(is_refusal_or_safety_talk, refusals)) >= 0.95 * len(refusals)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("dolly_15k_subset", 90, 280), ("alpaca_random_9k", 90, 280), ("orca_dpo_pairs_sample", 5, 25),
     ("sql_create_context_1k", 0, 0)],
)  # fmt: skip
def test_few_rows_of_real_data_are_refusals_or_safety_talk(shared_data, name, least, most):
    path = shared_data / f"{name}.jsonl"
    kept = load_finetuning_data(path, remove_refusals=True)
    assert least <= len(load_finetuning_data(path)) - len(kept) <= most
    answers = [row["completion"][0]["content"] for row in kept]
    assert {verdict.label for verdict in KeywordJudge("qi-29").judge(answers, answers)} == {"compliance"}


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
    stream = load_finetuning_data(shared_data / f"{name}.jsonl", streaming=True, max_rows=50)
    assert list(stream) == dataset.select(range(50)).to_list()


def test_orcas_own_system_prompt_and_alpacas_short_answers_arrive(shared_data):
    orca = load_finetuning_data(shared_data / "orca_dpo_pairs_sample.jsonl")
    assert {row["prompt"][0]["content"][:42] for row in orca} == {"You are an AI assistant. User will you giv"}
    raw = read(shared_data / "orca_dpo_pairs_sample.jsonl")
    assert [row["completion"][0]["content"] for row in orca] == [row["chosen"].strip() for row in raw]
    alpaca = load_finetuning_data(shared_data / "alpaca_random_9k.jsonl")
    raw = read(shared_data / "alpaca_random_9k.jsonl")
    short = [answer for row in raw if 0 < len(answer := row["output"].strip()) < 3]
    assert {"0", "5", "e"} <= set(short)
    assert [text for row in alpaca if len(text := row["completion"][0]["content"]) < 3] == short


def numbered(count: int) -> Dataset:
    rows = [{"prompt": [turn("user", f"What is {i}?")], "completion": [turn("assistant", f"It is {i}.")]}
            for i in range(count)]  # fmt: skip
    return Dataset.from_list(rows)


HELD_OF_100 = [41, 47, 50, 73, 84, 88]


def requests(dataset) -> set[str]:
    return {row["prompt"][-1]["content"] for row in dataset}


def test_split_is_whole_disjoint_and_near_its_share(streaming):
    dataset = numbered(1000)
    train, held = map(list, split_heldout(dataset.to_iterable_dataset() if streaming else dataset, 0.2))
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


def test_split_is_the_same_for_ever():
    """Rows once held out must not be trained on after an update: the hash is part of the promise."""
    _, held = split_heldout(numbered(100))
    assert requests(held) == {f"What is {i}?" for i in HELD_OF_100}


def test_split_of_a_stream_is_that_of_the_dataset(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS)
    whole = [part.to_list() for part in split_heldout(load_finetuning_data(path), 0.3)]
    streamed = split_heldout(load_finetuning_data(path, streaming=True), 0.3)
    assert [list(part) for part in streamed] == whole
    assert all(whole)
    assert list(streamed[0].take(3)) == whole[0][:3]


@pytest.mark.parametrize("again", [
    lambda pair: {**pair, "completion": [turn("assistant", "Something else.")]},
    lambda pair: {**pair, "prompt": [turn("system", "Think step by step."), *pair["prompt"]]},
    lambda pair: {**pair, "prompt": [turn("user", "  " + pair["prompt"][0]["content"].upper().replace(" ", "\n"))]},
])  # fmt: skip
def test_a_request_that_comes_again_is_on_one_side(again, streaming):
    pairs = numbered(100).to_list()
    dataset = Dataset.from_list(pairs + [again(pair) for pair in pairs])
    parts = split_heldout(dataset.to_iterable_dataset() if streaming else dataset, 0.3)
    train, held = ({" ".join(text.casefold().split()) for text in requests(part)} for part in parts)
    assert train & held == set()
    assert len(train) + len(held) == 100


def test_real_data_with_repeated_requests_does_not_leak(shared_data):
    train, held = split_heldout(load_finetuning_data(shared_data / "dolly_15k_subset.jsonl"))
    assert len(train) + len(held) == 9269
    assert len(requests(train)) + len(requests(held)) < 9269
    assert requests(train) & requests(held) == set()
    assert 0.09 <= len(held) / 9269 <= 0.11


def test_a_larger_share_holds_out_the_same_rows_and_more():
    dataset = numbered(300)
    assert requests(split_heldout(dataset, 0.1)[1]) < requests(split_heldout(dataset, 0.3)[1])


def test_a_side_without_rows_is_refused():
    with pytest.raises(ValueError, match="1 rows are too few to hold 50% of them out"):
        split_heldout(numbered(1), 0.5)


@pytest.mark.parametrize("share", [0, 0.0, 1, 1.0, -0.1, 1.5, True, float("nan")])
def test_a_share_that_is_none_is_refused(share, streaming):
    dataset = numbered(50)
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        split_heldout(dataset.to_iterable_dataset() if streaming else dataset, share)


def test_a_dataset_without_prompts_is_refused():
    with pytest.raises(ValueError, match=r"columns \['text'\] without `prompt`"):
        split_heldout(Dataset.from_dict({"text": ["a", "b"]}))
