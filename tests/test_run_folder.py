"""What a run finds in its folders and leaves there: what becomes of it, and what is said of that."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from hf_safe_ema import WeightEMA, run_folder
from hf_safe_ema.checkpoint import STATE_PATH, save_ema_state
from hf_safe_ema.findings import Findings
from hf_safe_ema.history import History, read_jsonl

BASE_METRICS = {"asr": 0.1}


def average_of(model: nn.Module, steps: int = 0, **settings) -> WeightEMA:
    ema = WeightEMA(model.named_parameters(), decay=0.5, **settings)
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(1.0)
        ema.update()
    return ema


def averages(ema: WeightEMA) -> dict[str, list]:
    return {name: average.tolist() for name, average in ema.averaged_parameters()}


def checkpoint_at(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def report(step: int, weights: str) -> dict:
    return {"type": "report", "step": step, "weights": weights, "metrics": BASE_METRICS, "asr": 0.1}


def test_a_first_run_has_nothing_to_say(tmp_path, caplog):
    run_folder.start_history(History(tmp_path))
    run_folder.warn_of_later_checkpoints(0, str(tmp_path))
    run_folder.make_room(tmp_path / "ema")
    assert caplog.text == "" and list(tmp_path.iterdir()) == []


def test_what_an_earlier_run_left_is_kept_and_named(tmp_path, caplog):
    (tmp_path / "safety_history.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / "model.safetensors").write_text("weights")
    run_folder.start_history(History(tmp_path))
    run_folder.make_room(tmp_path / "ema")
    assert (tmp_path / "safety_history.jsonl.1").read_text() == '{"step": 1}\n'
    assert (tmp_path / "ema.1" / "model.safetensors").read_text() == "weights" and not (tmp_path / "ema").exists()
    for name in ("safety_history.jsonl.1", "ema.1"):
        assert f"is now at {tmp_path / name}" in caplog.text or f"are now at {tmp_path / name}" in caplog.text


@pytest.mark.parametrize(("step", "named"), [(0, "checkpoint-2, checkpoint-10"), (2, "checkpoint-10"), (10, None)])
def test_only_checkpoints_of_later_steps_are_warned_about(tmp_path, caplog, step, named):
    for name in ("checkpoint-10", "checkpoint-2", "checkpoint-best", "checkpoint-99.bak"):
        (tmp_path / name).mkdir()
    run_folder.warn_of_later_checkpoints(step, str(tmp_path))
    assert (f"holds {named} from before" in caplog.text) if named else caplog.text == ""


# Resuming.


@pytest.mark.parametrize(
    ("where", "own"), [("run/checkpoint-4", True), ("run/renamed", True), ("elsewhere/checkpoint-4", False)]
)
def test_whose_checkpoint_it_is(tmp_path, where, own):
    folder = checkpoint_at(tmp_path / where, 4)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    assert run_folder.resumed_from(4, str(folder), args) == (folder, own)


def test_the_folder_beside_is_the_last_that_is_looked_at(tmp_path):
    folder = checkpoint_at(tmp_path / "run" / "checkpoint-4", 4)
    args = TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True)
    assert run_folder.resumed_from(4, None, args) == (folder, True)
    with pytest.raises(FileNotFoundError, match=r"step 5.*set callback\.resume_from"):
        run_folder.resumed_from(5, None, args)


@pytest.mark.parametrize(
    ("rows", "checked", "found"),
    [
        ([report(0, "base"), report(4, "live"), report(4, "ema")], 4, "ema"),
        ([report(0, "base"), report(2, "ema")], None, None),
    ],
    ids=["checked", "the check was cut off"],
)
def test_the_history_goes_on_from_the_checkpoint(tmp_path, caplog, rows, checked, found):
    earlier = History(tmp_path)
    earlier.add(*rows, report(6, "ema"))
    checkpoint = tmp_path / "checkpoint-4"
    save_ema_state(average_of(nn.Linear(1, 1)), checkpoint, {}, rows)
    findings = Findings(History(tmp_path))
    row = run_folder.resume_history(findings, checkpoint, 4, "ema")
    assert findings.history.rows == rows == read_jsonl(tmp_path / "safety_history.jsonl")
    assert (findings.checked_step, row and row["weights"]) == (checked, found)
    assert findings.base_metrics == BASE_METRICS
    assert "what had been found after step 4 is now at" in caplog.text


@pytest.mark.parametrize(("total_steps", "warned"), [(4, False), (8, True)])
def test_a_longer_run_says_that_it_keeps_its_first_decay(caplog, total_steps, warned):
    notes = {"decays": [0.5], "request": {"half_life": 0.25, "decay": None}, "total_steps": 4}
    assert run_folder.first_decays(notes, 0.25, None, total_steps) == [0.5]
    assert ("the average goes on with 0.5" in caplog.text) == warned


@pytest.mark.parametrize(
    ("settings", "step", "synced"),
    [({}, 4, False), ({"mode": "lookahead", "sync_steps": 2}, 4, True), ({"mode": "lookahead", "sync_steps": 3}, 4, False)],
)  # fmt: skip
def test_lookahead_weights_saved_before_their_sync_are_synced(tmp_path, settings, step, synced):
    saved = average_of(nn.Linear(2, 2), steps=1)
    save_ema_state(saved, tmp_path, {}, [])
    model = nn.Linear(2, 2)
    ema = average_of(model, **settings)
    run_folder.load_average(ema, tmp_path, step)
    assert averages(ema) == averages(saved)
    assert (model.weight.tolist() == averages(ema)["weight"]) == synced


# Beginning again, and ending.


def test_another_batch_size_begins_from_the_first_base(tmp_path):
    model = nn.Linear(2, 2)
    first = average_of(model, steps=3)
    base = first.state_dict()["base"]["weight"].clone()
    second = average_of(model)  # made of weights that have been trained
    findings = Findings(History(tmp_path))
    findings.history.add(report(0, "base"), report(2, "ema"))
    run_folder.start_again(findings, second, first)
    assert second.state_dict()["base"]["weight"].equal(base)
    assert findings.history.rows == [report(0, "base")] and findings.base_metrics == BASE_METRICS
    assert findings.checked_step == 0


@pytest.mark.parametrize("damage", ["missing", "cut", None])
def test_the_average_of_the_best_checkpoint(tmp_path, caplog, damage):
    save_ema_state(best := average_of(nn.Linear(2, 2), steps=2), tmp_path, {}, [])
    if damage == "missing":
        (tmp_path / STATE_PATH).unlink()
    elif damage == "cut":
        (tmp_path / STATE_PATH).write_bytes((tmp_path / STATE_PATH).read_bytes()[:-8])
    last = average_of(nn.Linear(2, 2), steps=1)
    before = averages(last)
    assert run_folder.load_average_of_best(last, str(tmp_path)) == (damage is None)
    assert averages(last) == (averages(best) if damage is None else before)
    assert ("the average that is saved is the one of the last step" in caplog.text) == (damage is not None)


def test_an_average_is_saved_with_its_card(tmp_path, tiny):
    model, tokenizer = tiny
    ema = WeightEMA(model.named_parameters(), decay=0.5)
    run_folder.save_average(ema, model, tokenizer, tmp_path / "ema", [], step=7)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        path.name for path in (tmp_path / "ema").iterdir()
    }
    assert "7" in (tmp_path / "ema" / "README.md").read_text()
