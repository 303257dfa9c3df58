"""What becomes of reports: rows, metrics, log values, the limit, and failures that must not end a run."""

import math

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_safe_ema import SafetyCheck, UnsafeModelError, WeightEMA, testbed
from hf_safe_ema.findings import Findings, hold_to_limit, metric_names
from hf_safe_ema.history import History, read_jsonl


@pytest.fixture(scope="module")
def own():
    """A model and tokenizer of this file's own, and an average of it after one step of its weights."""
    model, tokenizer = testbed.load()
    ema = WeightEMA(model.named_parameters(), decay=0.5)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.01)
    ema.update()
    return model, tokenizer, ema


@pytest.fixture
def args(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)


def quick_check(**changes) -> SafetyCheck:
    return SafetyCheck(**{"num_prompts": 3, "max_new_tokens": 2, "benign": None, "progress": False, **changes})


def found(own, args, findings, weights, step=1, check=None):
    model, tokenizer, ema = own
    state = TrainerState(global_step=step)
    check = quick_check() if check is None else check
    return findings.check(check, weights, ema, args, state, TrainerControl(), model, tokenizer), state


def test_a_step_is_checked_once(own, args, tmp_path):
    findings = Findings(History(tmp_path))
    done, _ = found(own, args, findings, ("live",))
    assert set(done) == {"live"}
    again, state = found(own, args, findings, ("live", "ema"))
    assert again is None and state.log_history == []
    assert [row["weights"] for row in read_jsonl(tmp_path / "safety_history.jsonl")] == ["live"]


def test_what_is_logged_says_how_far_each_is_from_the_base(own, args, tmp_path):
    findings = Findings(History(tmp_path))
    _, state = found(own, args, findings, ("live", "ema"))
    (logged,) = state.log_history
    assert logged["safety/base_share"] == 0.5
    assert logged["safety/ema_distance_to_base"] == pytest.approx(logged["safety/live_distance_to_base"] / 2, rel=1e-4)
    rows = {row["weights"]: row for row in read_jsonl(tmp_path / "safety_history.jsonl")}
    for name in ("live", "ema"):
        assert rows[name]["distance_to_base"] == logged[f"safety/{name}_distance_to_base"]
        assert all(logged[f"safety/{name}_{key}"] == value for key, value in rows[name]["metrics"].items())


def test_the_base_is_no_distance_from_itself_and_stays_among_the_metrics(own, args, tmp_path):
    findings = Findings(History(tmp_path))
    found(own, args, findings, ("base",), step=0)
    found(own, args, findings, ("ema",), step=1)
    names = set(findings.metrics("eval_"))
    assert {"eval_base_unclear", "eval_ema_unclear"} <= names <= metric_names(("ema",))
    assert read_jsonl(tmp_path / "safety_history.jsonl")[0]["distance_to_base"] == 0.0


def test_a_report_of_an_earlier_step_does_not_stand_in_for_one_that_failed(own, args, tmp_path, caplog):
    class Down:
        name = "down"

        def judge(self, prompts, responses):
            raise ConnectionError("the endpoint is down")

    findings = Findings(History(tmp_path))
    found(own, args, findings, ("ema",), step=1)
    done, state = found(own, args, findings, ("ema",), step=2, check=quick_check(judge=Down()))
    assert done == {} and not any("ema" in name for name in findings.metrics())
    assert not any(name.startswith("safety/ema") for name in state.log_history[0])
    assert "step 2: the safety check of the ema weights failed, training goes on: ConnectionError" in caplog.text


def test_what_cannot_even_be_written_down_does_not_end_the_run(own, args, tmp_path, caplog):
    folder = tmp_path / "gone" / "run"
    findings = Findings(History(folder))
    (tmp_path / "gone").write_text("a file where a folder should be")
    done, _ = found(own, args, findings, ("live",))
    assert set(done) == {"live"}
    assert "writing the safety history failed, training goes on" in caplog.text
    assert "nor could that be written down" in caplog.text


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_person_can_still_end_the_run(tmp_path, error):
    findings = Findings(History(tmp_path))
    with pytest.raises(error), findings.only_warn(1, "something"):
        raise error
    assert findings.history.rows == []


def test_what_is_found_when_the_run_has_ended_is_marked(tmp_path):
    findings = Findings(History(tmp_path))
    findings.record({"type": "error", "step": 1})
    findings.ending = True
    findings.record({"type": "error", "step": 2})
    assert [row.get("at_end", False) for row in findings.history.rows] == [False, True]


# Held-out loss of the average.


def batches(tokenizer) -> list[dict]:
    ids = torch.tensor([tokenizer("What is a lock?")["input_ids"]])
    return [{"input_ids": ids, "labels": ids}]


def losses(own, args, findings, metrics, dataloader="own"):
    model, tokenizer, ema = own
    dataloader = batches(tokenizer) if dataloader == "own" else dataloader
    return findings.ema_losses(ema, args, TrainerState(global_step=1), model, metrics, dataloader)


@pytest.mark.parametrize(
    ("metrics", "name", "dataset"),
    [
        ({"eval_loss": 1.0, "eval_runtime": 2.0}, "eval_ema_loss", ""),
        ({"eval_dolly_loss": 1.0}, "eval_dolly_ema_loss", "dolly"),
        # What compute_metrics calls a loss is not the Trainer's.
        ({"eval_aux_loss": 9.0, "eval_loss": 1.0}, "eval_ema_loss", ""),
        ({"eval_loss": 1.0, "eval_aux_loss": 9.0}, "eval_ema_loss", ""),
        ({"eval_dolly_aux_loss": 9.0, "eval_dolly_loss": 1.0}, "eval_dolly_ema_loss", "dolly"),
    ],
    ids=str,
)
def test_the_loss_of_the_average_stands_beside_the_trainers_own(own, args, tmp_path, metrics, name, dataset):
    findings = Findings(History(tmp_path))
    result = losses(own, args, findings, metrics)
    assert set(result) == {name} and result[name] > 0
    (row,) = findings.history.rows
    assert (row["dataset"], row["live"], row["ema"]) == (dataset, 1.0, result[name])


def test_an_evaluation_that_comes_twice_is_written_down_once(own, args, tmp_path):
    findings = Findings(History(tmp_path))
    first = losses(own, args, findings, {"eval_loss": 1.0})
    assert losses(own, args, findings, {"eval_loss": 1.0}) == first
    assert len(findings.history.rows) == 1


@pytest.mark.parametrize(
    ("metrics", "dataloader"),
    [({"eval_accuracy": 1.0}, "own"), ({"eval_loss": 1.0}, None), ({"test_loss": 1.0}, "own"), ({"eval_loss": 1.0}, [{}])],
    ids=["no loss", "no data", "not an evaluation of the run", "no labels"],
)  # fmt: skip
def test_without_a_loss_to_stand_beside_there_is_none(own, args, tmp_path, metrics, dataloader):
    findings = Findings(History(tmp_path))
    assert losses(own, args, findings, metrics, dataloader) == {}
    assert findings.history.rows == []


def test_a_loss_that_failed_is_never_the_best(own, args, tmp_path):
    findings = Findings(History(tmp_path))
    broken = [{"input_ids": torch.tensor([[10**9]]), "labels": torch.tensor([[1]])}]
    result = losses(own, args, findings, {"eval_loss": 1.0}, broken)
    assert set(result) == {"eval_ema_loss"} and math.isnan(result["eval_ema_loss"])
    assert [row["type"] for row in findings.history.rows] == ["error"]


@pytest.mark.parametrize(("given", "logged"), [({}, 0), ({"eval_ema_loss": 2.0}, 1)])
def test_losses_are_logged_under_our_name(args, tmp_path, given, logged):
    state = TrainerState(global_step=4)
    Findings(History(tmp_path)).log_losses(given, args, state, TrainerControl())
    assert len(state.log_history) == logged
    assert all(row["safety/ema_loss"] == 2.0 and row["step"] == 4 for row in state.log_history)


# The limit.


def row(asr, refusal=0, compliance=0, unclear=0) -> dict:
    return {
        "weights": "ema",
        "asr": asr,
        "asr_interval": [0.1, 0.9],
        "counts": {"refusal": refusal, "compliance": compliance, "unclear": unclear},
    }


@pytest.mark.parametrize(
    ("max_asr", "report", "outcome"),
    [
        (0.5, row(0.5, 5, 5), "held"),
        (0.5, row(0.51, 49, 51), "passed"),
        (0.0, row(0.0, 10, 0), "held"),
        (None, row(1.0, 0, 10), "held"),
        (None, None, "held"),
        (0.5, None, "unknown"),
        (0.5, row(None, unclear=10), "unknown"),
        (0.5, row(1.0, compliance=4, unclear=6), "unknown"),
        (0.5, row(1.0, compliance=5, unclear=5), "passed"),
    ],
)
@pytest.mark.parametrize("on_violation", ["warn", "stop", "raise"])
def test_the_limit(caplog, max_asr, report, outcome, on_violation):
    control = TrainerControl()
    if outcome == "passed" and on_violation == "raise":
        with pytest.raises(UnsafeModelError, match="step 3: attack success rate of the ema weights"):
            hold_to_limit(max_asr, on_violation, "ema", 3, report, control)
    else:
        hold_to_limit(max_asr, on_violation, "ema", 3, report, control)
        said = {"held": "", "passed": "above max_asr=50.0%", "unknown": "too few answers of the ema weights"}[outcome]
        assert said in caplog.text and bool(said) == bool(caplog.text)
    assert control.should_training_stop == (outcome == "passed" and on_violation == "stop")


def test_a_limit_passed_after_the_end_has_nothing_to_stop(caplog):
    hold_to_limit(0.5, "stop", "ema", 3, row(1.0, compliance=10), None)
    assert "above max_asr" in caplog.text
