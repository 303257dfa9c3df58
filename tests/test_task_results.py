"""`hf-safe-ema check --tasks`: which measure a file gets, what is counted apart, and what a second call costs."""

import json
from pathlib import Path

import pytest
from chat_server import ChatServer, answers, by_question, says, status

from hf_safe_ema import cli
from hf_safe_ema.answers import Asking
from hf_safe_ema.checking import CheckPlan, run_plan
from hf_safe_ema.safety.any_judge import build_judge
from hf_safe_ema.safety.reports import wilson_interval
from hf_safe_ema.task_results import format_tasks, load_task_set

QUIET = Asking(max_new_tokens=8, progress=False)


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)


def written(name: str, *rows: dict) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def sums() -> str:
    return written("sums.jsonl", *({"question": f"{i} + {i}?", "answer": f"So\n#### {2 * i}"} for i in range(1, 6)))


def texts() -> str:
    return written(
        "texts.jsonl",
        {"prompt": "Where is the cat?", "reference": "on the mat"},
        {"prompt": "Where is the dog?", "reference": "in the house"},
        {"prompt": "Say anything.", "reference": None},
    )


def open_ended() -> str:
    return written("bench.jsonl", {"turns": ["Write a poem.", "Again."]}, {"turns": ["Draw a fish."]})


def adds_up(question: str) -> str:
    """Right of 1 and 2, wrong of 3, no number of 4; no answer to 5 comes (see `serves`)."""
    if "+" not in question:
        return "on the mat" if "Where" in question else ""
    return {"1": "#### 2.00", "2": "It is $4.", "3": "It is 7", "4": "Who knows?"}[question[0]]


def serves():
    return by_question(answers(adds_up), **{"5 + 5": status(400)})


def graded(score: int):
    return says(json.dumps({"reason": "because", "score": score}))


def plan(*models: str, **settings) -> CheckPlan:
    defaults = {"harmful": [], "benign": [], "asking": QUIET, "client": {"max_retries": 0}}
    return CheckPlan(models, **{**defaults, **settings})


def test_each_file_is_measured_by_what_it_holds(tmp_path):
    with ChatServer(serves()) as server, ChatServer(graded(8)) as judge:
        settings = {"judges": ["llm:mt-bench:j"], "llm_options": {"base_url": judge.url}}
        checked = run_plan(plan(f"{server.url}#m", tasks=[sums(), texts(), open_ended()], **settings), "out")
    assert checked.results == []
    found = [
        (r.task_set.partition("#")[0], r.measure, r.value, r.asked, r.scored, r.unanswered) for r in checked.tasks
    ]
    assert found == [
        ("sums.jsonl", "exact_match", 0.5, 5, 4, 1),
        ("sums.jsonl", "quality", 8.0, 5, 4, 1),
        ("texts.jsonl", "rouge_l", pytest.approx((1 + 1 / 3) / 2), 3, 2, 0),
        ("texts.jsonl", "quality", 8.0, 3, 2, 0),
        ("bench.jsonl", "quality", None, 2, 0, 0),
    ]
    by_number, quality, rouge_l, _, silent = checked.tasks
    assert by_number.interval == wilson_interval(2, 4) and by_number.details == {"correct": 2, "no_number": 1}
    assert [row["score"] for row in by_number.responses] == [1.0, 1.0, 0.0, 0.0]
    assert (quality.judge, by_number.judge) == ("llm:mt-bench-v1:j", None)
    assert set(rouge_l.details) == {"rouge1", "rouge2", "rougeL", "empty"} and silent.details == {
        "unscored": 0,
        "empty": 2,
    }
    saved = json.loads(Path("out/results.json").read_text())
    assert saved == {"results": [], "tasks": json.loads(json.dumps([result.to_dict() for result in checked.tasks]))}
    assert "responses" not in saved["tasks"][0]
    lines = format_tasks(checked.tasks).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert cells[0] == ["tasks", "measure", "asked", "scored", "result", "of these"]
    assert cells[2:] == [
        ["sums.jsonl", "exact match", "5", "4", "50.0% (15.0% to 85.0%)", "1 unanswered, 1 without a number"],
        ["sums.jsonl", "llm:mt-bench-v1:j", "5", "4", "8.00 of 10", "1 unanswered"],
        ["texts.jsonl", "ROUGE-L", "3", "2", "0.667", "1 without a reference"],
        ["texts.jsonl", "llm:mt-bench-v1:j", "3", "2", "8.00 of 10", "1 empty"],
        ["bench.jsonl", "llm:mt-bench-v1:j", "2", "0", "none scored", "2 empty"],
    ]


def test_a_second_call_asks_only_what_is_missing():
    with ChatServer(serves()) as server, ChatServer(graded(8)) as judge:
        settings = {"judges": ["llm:mt-bench:j"], "llm_options": {"base_url": judge.url}}
        first = run_plan(plan(f"{server.url}#m", tasks=[sums()], **settings), "out")
        assert (server.count, judge.count) == (5, 4)
        assert run_plan(plan(f"{server.url}#m", tasks=[sums()], **settings), "out") == first
        assert server.questions[5:] == ["5 + 5?"] and judge.count == 4  # what was not answered is asked again
        more = run_plan(plan(f"{server.url}#m", tasks=[sums(), texts()], **settings), "out")
        assert more.tasks[:2] == first.tasks and server.count == 5 + 1 + 1 + 3


def test_other_references_need_no_other_answers():
    with ChatServer(serves()) as server:
        (first,) = run_plan(plan(f"{server.url}#m", tasks=[texts()]), "out").tasks
        Path("texts.jsonl").write_text(Path("texts.jsonl").read_text().replace("in the house", "on the mat"))
        (second,) = run_plan(plan(f"{server.url}#m", tasks=["texts.jsonl"]), "out").tasks
        assert server.count == 3
    assert second.value == 1.0 > first.value and second.task_set != first.task_set


def test_a_model_in_memory_is_loaded_once_for_prompts_and_tasks(monkeypatch):
    from hf_safe_ema import answers as answers_module

    loads, load = [], answers_module.load_model
    monkeypatch.setattr(answers_module, "load_model", lambda *given: loads.append(given) or load(*given))
    settings = {"harmful": ["builtin"], "num_prompts": 3, "judges": ["keywords"]}
    checked = run_plan(plan("testbed", tasks=[sums()], **settings), "out")
    assert len(loads) == 1
    assert [sum(result.counts.values()) for result in checked.results] == [3]
    assert [(r.task_set.partition("#")[0], r.asked, r.scored) for r in checked.tasks] == [("sums.jsonl[3 of 5]", 3, 3)]


def test_prompts_and_tasks_are_sampled_alike():
    assert [task.reference for task in load_task_set(sums(), 2).tasks] == ["So\n#### 2", "So\n#### 6"]


def test_a_judge_of_quality_leaves_prompts_to_keywords():
    with ChatServer(says("on the mat")) as server, ChatServer(graded(3)) as judge:
        settings = {"judges": ["llm:mt-bench:j"], "llm_options": {"base_url": judge.url}, "harmful": [["Steal a car"]]}
        checked = run_plan(plan(f"{server.url}#m", tasks=[texts()], **settings), "out")
        assert judge.count == 3
    assert [result.judge for result in checked.results] == ["keywords:default-v2"]


def test_headings_in_some_references_make_no_exact_match(caplog):
    rows = [{"prompt": "a", "reference": "#### 18"}, {"prompt": "b", "reference": "on the mat"}]
    with ChatServer(says("on the mat")) as server:
        (result,) = run_plan(plan(f"{server.url}#m", tasks=[written("mixed.jsonl", *rows)]), "out").tasks
    assert (result.measure, result.value) == ("rouge_l", 0.5)
    assert "1 of 2 references have a number after '####'" in caplog.text


class Grader:
    name, measures = "mine-v1", "quality"

    def score(self, prompts, responses, references):
        return [
            10.0 if response == reference else 1.0 for response, reference in zip(responses, references, strict=True)
        ]


def test_a_grader_that_one_brings_along():
    with ChatServer(says("on the mat")) as server:
        _, result = run_plan(plan(f"{server.url}#m", tasks=[texts()], judges=[Grader()]), "out").tasks
    assert (result.judge, result.value) == ("mine-v1", 4.0)


class Forgetful(Grader):
    def score(self, prompts, responses, references):
        return [1.0]


class Mute:
    name, measures = "mute-v1", "quality"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tasks": "sums.jsonl"}, TypeError, r"tasks='sums.jsonl': give a list"),
        ({"tasks": []}, ValueError, "no prompt set to ask; give at least one, harmful or harmless, or tasks"),
        ({"tasks": ["none.jsonl"]}, FileNotFoundError, "none.jsonl"),
        ({"tasks": ["sums.jsonl", "sums.jsonl"]}, ValueError, "tasks 'sums.jsonl#.*' is given twice"),
        (
            {"tasks": ["bench.jsonl"]},
            ValueError,
            "no reference answers among those asked; .* --judge llm:mt-bench:MODEL",
        ),
        ({"tasks": ["sums.jsonl"], "judges": ["llm:mt-bench"]}, ValueError, "as in 'llm:mt-bench:gpt-4o'"),
        ({"tasks": ["sums.jsonl"], "judges": ["llm:mt-bench:j"]}, ValueError, "no key"),
        ({"tasks": ["sums.jsonl"], "judges": [Grader(), Grader()]}, ValueError, "judge 'mine-v1' is given twice"),
        ({"tasks": ["sums.jsonl"], "judges": [Mute()]}, TypeError, "needs a `name` and a method `score"),
        ({"tasks": ["sums.jsonl"], "judges": [Forgetful()]}, ValueError, "'mine-v1' gave 1 grades of 5 answers"),
        (
            {"tasks": [], "harmful": [["a"]], "judges": ["llm:mt-bench:j"]},
            ValueError,
            "hf-safe-ema check --tasks FILE",
        ),
    ],
)
def test_what_cannot_be_measured(settings, error, message):
    sums(), open_ended()
    with pytest.raises(error, match=message):
        run_plan(plan("testbed", **settings), "out")
    assert not Path("out/results.json").exists()


@pytest.mark.parametrize("judge", ["llm:mt-bench:j", Grader()])
def test_a_judge_of_quality_is_none_of_safety(judge):
    with pytest.raises(ValueError, match=r"measures quality, which is no verdict on safety: .* check --tasks FILE"):
        build_judge(judge)


# The command.


def test_the_command(capsys):
    with ChatServer(serves()) as server, ChatServer(graded(7)) as judge:
        flags = ["--judge", "llm:mt-bench:j", "--judge-url", judge.url, "--json", "copy.json", "--num-prompts", "4"]
        command = ["check", f"{server.url}#m", "--output-dir", "out", "--benign", *flags, "--tasks", sums(), texts()]
        assert cli.main(command) == 0
        judged = judge.count
    safety, tasks = capsys.readouterr().out.strip().split("\n\n")
    assert "| ASR " in safety and len(safety.splitlines()) == 3
    assert [line.split("|")[3].strip() for line in tasks.splitlines()[2:]] == [
        "exact match", "llm:mt-bench-v1:j", "ROUGE-L", "llm:mt-bench-v1:j",
    ]  # fmt: skip
    assert judged == 4 + 2
    saved = json.loads(Path("copy.json").read_text())
    assert Path("copy.json").read_bytes() == Path("out/results.json").read_bytes()
    assert (len(saved["results"]), len(saved["tasks"])) == (1, 4)


def test_tasks_alone_print_one_table(capsys):
    with ChatServer(serves()) as server:
        command = ["check", f"{server.url}#m", "--output-dir", "out", "--prompts", "--benign", "--tasks", sums()]
        assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith("| model ")


def test_a_judge_of_quality_without_tasks_is_told_what_is_missing(capsys):
    assert cli.main(["check", "testbed", "--output-dir", "out", "--judge", "llm:mt-bench:j"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "hf-safe-ema check --tasks FILE" in said.err and said.err.count("\n") == 1


def test_real_questions_to_the_testbed(shared_data):
    files = [str(shared_data / name) for name in ("gsm8k_test_500.jsonl", "alpaca_random_9k.jsonl")]
    sums_of, texts_of = run_plan(plan("testbed", tasks=files, num_prompts=6), "out").tasks
    assert (sums_of.measure, texts_of.measure) == ("exact_match", "rouge_l")
    assert sums_of.scored == texts_of.scored == 6
