"""How useful answers are: numbers that are the same however written, ROUGE, grades, and the files that tasks come in."""

import json
import re
from decimal import Decimal

import pytest
from chat_server import ChatServer, by_question, says, status

from hf_safe_ema.safety.llm_judge import LLMJudge
from hf_safe_ema.safety.reports import wilson_interval
from hf_safe_ema.usefulness import Task, answer_quality, exact_match, load_tasks, number_in, rouge

# ROUGE.


def test_rouge_of_known_pairs():
    found = rouge(["the cat sat on the mat", "the dog"], ["the cat sat on the mat", "a bird sang"])
    assert found == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "count": 2}
    found = rouge(["mat the on"], ["on the mat"])  # all words, no order
    assert found == {"rouge1": 1.0, "rouge2": 0.0, "rougeL": pytest.approx(1 / 3), "count": 1}


def test_rouge_of_nothing_and_of_silence():
    assert rouge([], []) == {"rouge1": None, "rouge2": None, "rougeL": None, "count": 0}
    assert rouge([""], ["on the mat"])["rougeL"] == 0.0


def test_a_script_that_rouge_cannot_read_is_said(caplog):
    assert rouge(["卵を茹でる", "egg"], ["卵を茹でる", "egg"])["rougeL"] == 0.5
    assert "1 of 2 references hold no letter from a to z" in caplog.text


# Exact match.


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("so 9 * 2 = 18\n#### 18", "18"),
        ("#### 1,080", "1080"),
        ("#### $1,080.00", "1080"),
        ("#### \\$18", "18"),
        ("#### **18**", "18"),
        ("#### 50%", "50"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("####18.0", "18"),
        ("#### 18.", "18"),
        ("#### 18.\n\nQuestion: How many?\n#### 5", "18"),
        ("#### 18 apples, 3 of them red", "18"),
        # Headings are no answers.
        ("#### 1. First step\n4 + 4 = 8\n#### 2) Then\n9 + 9\n#### 18", "18"),
        ("#### 1.5. First step\nIt is 18", "18"),
        ("#### Step 1\nIt is 18", "18"),
        # Without the mark, the last number.
        ("She sells 9 eggs for $2, which makes $18.", "18"),
        ("The answer is 18.00 dollars.", "18"),
        ("It rose by 150%", "150"),
        ("I paid 2,500€ of £109,200,000.", "109200000"),
        ("That leaves .5", "0.5"),
        ("The numbers are 1,2,3", "3"),
        ("x = -5", "-5"),
        ("$-5$", "-5"),
        ("-$5", "-5"),
        ("20-15", "15"),
        ("(20)-15", "15"),
        ("20% - 15%", "15"),
        ("20 – 15", "15"),
    ],
)
def test_the_number_that_an_answer_comes_to(text, number):
    assert number_in(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "I don't know.", "#### unknown", "eighteen"])
def test_no_number(text):
    assert number_in(text) is None


def test_wrong_and_numberless_answers_are_wrong_and_told_apart():
    found = exact_match(["#### 18.00", "It is 19", "No idea", ""], ["so\n#### 18"] * 4)
    assert found == {"rate": 0.25, "interval": wilson_interval(1, 4), "correct": 1, "count": 4, "no_number": 2}
    assert exact_match([], []) == {"rate": None, "interval": (0.0, 1.0), "correct": 0, "count": 0, "no_number": 0}


@pytest.mark.parametrize("name", ["gsm8k_test_500.jsonl", "gsm8k_train_2000.jsonl"])
def test_real_references_however_they_are_written(shared_data, name):
    references = [task.reference for task in load_tasks(shared_data / name)]
    written = [
        references,
        [re.sub("####.*", "", text) + "So it is $" + text.split("#### ")[1] + ".00." for text in references],
        [f"#### **{text.split('#### ')[1].replace(',', '')}%**" for text in references],
    ]
    for predictions in written:
        assert exact_match(predictions, references)["rate"] == 1.0
    shifted = references[1:] + references[:1]
    assert exact_match(shifted, references)["rate"] < 0.05


@pytest.mark.parametrize(
    ("measure", "predictions", "references", "message"),
    [
        (exact_match, ["1"], ["eighteen"], r"reference 1 \('eighteen'\) has no number after '####'"),
        (exact_match, ["1", "2"], ["#### 1", "#### 1. First"], "reference 2"),
        (exact_match, ["1"], [], "1 predictions and 0 references"),
        (rouge, [], ["a"], "0 predictions and 1 references"),
    ],
)
def test_what_cannot_be_compared(measure, predictions, references, message):
    with pytest.raises(ValueError, match=message):
        measure(predictions, references)


# Grades.


def grade(score: int):
    return says(json.dumps({"reason": "because", "score": score}))


def judge_of(url: str, rubric: str = "mt-bench") -> LLMJudge:
    return LLMJudge(rubric, model="j", base_url=url, progress=False, max_retries=0)


def test_the_mean_grade_is_of_what_was_graded(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ChatServer(by_question(grade(9), poor=grade(4), broken=status(400))) as server:
        found = answer_quality(
            judge_of(server.url), ["q"] * 4, ["good", "poor", "broken", " "], [None, "better", "a", "b"]
        )
        assert server.count == 3
        assert '"reference_answer": "better"' in next(q for q in server.questions if "poor" in q)
    assert found == {"mean_score": 6.5, "scored": 2, "unscored": 1, "empty": 1}
    assert answer_quality(judge_of(server.url), [], [])["mean_score"] is None


def test_a_judge_of_safety_grades_nothing():
    with pytest.raises(ValueError, match="does not grade quality"):
        answer_quality(judge_of("http://127.0.0.1:1/v1", "qi"), ["q"], ["a"])


# Files.


def written(tmp_path, name: str, *rows):
    path = tmp_path / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"question": "9 * 2?", "answer": "#### 18"}, Task("9 * 2?", "#### 18")),
        ({"prompt": " 9 * 2? ", "reference": 18, "id": 7}, Task("9 * 2?", "18")),
        ({"prompt": "9 * 2?"}, Task("9 * 2?")),
        ({"prompt": "9 * 2?", "answer": None}, Task("9 * 2?")),
        ({"question_id": 81, "turns": ["Write.", "Again."]}, Task("Write.")),
        ({"turns": ["9 * 2?", "And * 3?"], "reference": ["18", "54"]}, Task("9 * 2?", "18")),
        ({"turns": ["9 * 2?"], "reference": []}, Task("9 * 2?")),
        ({"instruction": "Add.", "input": "2, 3", "output": "5"}, Task("Add.\n\n2, 3", "5")),
        ({"instruction": "Add.", "context": "", "response": "5"}, Task("Add.", "5")),
        ({"question": "Add 2 and 3.", "chosen": "5", "rejected": "6"}, Task("Add 2 and 3.", "5")),
        ({"prompt": "Add.", "completion": "5"}, Task("Add.", "5")),
        (
            {"messages": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": "5"}]},
            Task("Add.", "5"),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_rows_become_tasks(tmp_path, row, task):
    assert load_tasks(written(tmp_path, "tasks.jsonl", row)) == [task]


def test_csv_and_empty_cells(tmp_path, caplog):
    path = written(tmp_path, "tasks.csv", "question,answer\n9 * 2?,#### 18\n,#### 3\nName a bird.,\n")
    assert load_tasks(path) == [Task("9 * 2?", "#### 18"), Task("Name a bird.")]
    assert "left out 1 of 3 rows: no prompt" in caplog.text


@pytest.mark.parametrize(
    ("name", "count", "references"),
    [
        ("gsm8k_test_500.jsonl", 500, 500),
        ("mt_bench_question.jsonl", 80, 38),
        ("alpaca_filtered_5k.jsonl", 5301, 5301),
        ("dolly_15k_subset.jsonl", 9269, 9269),
        ("sql_create_context_1k.jsonl", 1000, 1000),
    ],
)
def test_real_files(shared_data, name, count, references):
    tasks = load_tasks(shared_data / name)
    assert len(tasks) == count and all(task.prompt for task in tasks)
    assert sum(task.reference is not None for task in tasks) == references


def test_a_row_with_its_own_system_prompt_is_refused_not_bent(shared_data):
    with pytest.raises(ValueError, match="task 1: has the turns system/user/assistant; a task is one user turn"):
        load_tasks(shared_data / "orca_dpo_pairs_sample.jsonl")


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("t.jsonl", [], "no row in it"),
        ("t.jsonl", [{"prompt": " "}], "no row with a prompt"),
        ("t.jsonl", [{"goal": "x"}], r"columns \['goal'\] fit none of the known formats"),
        ("t.jsonl", [{"prompt": "a"}, {"prompt": ["b"]}], "row 2: the prompt is a list; it must be text or a number"),
        ("t.jsonl", [{"turns": [{"content": "b"}]}], "row 1: the prompt is a dict"),
        ("t.jsonl", ['{"prompt": "a\\ud83d"}'], "row 1: the prompt holds half a surrogate pair"),
        ("t.jsonl", ["{no"], "line 1: not valid JSON"),
        ("t.md", ["# Tasks"], "unknown ending '.md'"),
    ],
)
def test_what_is_no_file_of_tasks(tmp_path, name, rows, message):
    with pytest.raises(ValueError, match=message):
        load_tasks(written(tmp_path, name, *rows))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl': no such file; give a"):
        load_tasks(tmp_path / "none.jsonl")
