"""SafeEMACallback on real Trainers: what it does at which step, what it leaves alone, and what it survives."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_safe_ema import SafeEMACallback, SafetyCheck, UnsafeModelError, Verdict, testbed

PAIRS = testbed.read_pairs("finetune")


def chat_rows(count: int, start: int = 0) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            }
            for row in PAIRS[start : start + count]
        ]
    )


def quick_check(**changes) -> SafetyCheck:
    return SafetyCheck(**{"num_prompts": 6, "max_new_tokens": 12, "progress": False, **changes})


def sft_trainer(output_dir, callbacks=(), **changes) -> SFTTrainer:
    peft_config = changes.pop("peft_config", None)
    model, tokenizer = testbed.load()
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-3,
        "max_length": 96,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        **changes,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        processing_class=tokenizer,
        train_dataset=chat_rows(32),
        eval_dataset=chat_rows(16, 32),
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


def rows_of(output_dir) -> list[dict]:
    return [json.loads(line) for line in (output_dir / "safety_history.jsonl").read_text().splitlines()]


def random_state() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), rest), torch.get_rng_state().tolist()


LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_shadow_mode_leaves_the_run_bit_identical(tmp_path, peft_config):
    runs = {}
    for name in ("without", "with"):
        callback = SafeEMACallback(half_life=3, check=quick_check(), check_steps=2, final_weights="live")
        trainer = sft_trainer(tmp_path / name, [callback] if name == "with" else [], peft_config=peft_config)
        trainer.train()
        losses = [
            {key: row[key] for key in ("loss", "grad_norm", "eval_loss", "eval_mean_token_accuracy") if key in row}
            for row in trainer.state.log_history
        ]
        runs[name] = (
            {key: value.clone() for key, value in trainer.model.state_dict().items()},
            [row for row in losses if row],
            random_state(),
        )
    (weights, losses, state), (weights_with, losses_with, state_with) = runs["without"], runs["with"]
    assert weights.keys() == weights_with.keys()
    assert all(torch.equal(weights[key], weights_with[key]) for key in weights)
    assert len(losses) >= 8 and losses == losses_with
    assert state == state_with


def test_moments_files_and_final_weights(tmp_path):
    callback = SafeEMACallback(half_life=3, check=quick_check(), check_steps=2)
    trainer = sft_trainer(tmp_path, [callback], eval_on_start=True)
    trainer.train()
    rows = rows_of(tmp_path)
    reports = [(row["step"], row["weights"]) for row in rows if row["type"] == "report"]
    # The base once; then every check_steps, at evaluations (3 and 6), each step once.
    assert reports == [(0, "base")] + [(step, weights) for step in (2, 3, 4, 6) for weights in ("live", "ema")]
    assert [row["step"] for row in rows if row["type"] == "loss"] == [0, 3, 6]
    for row in rows:
        if row["type"] == "report":
            for key in ("harmful_set", "benign_set", "judge", "template", "max_new_tokens", "asr_interval", "counts"):
                assert row[key] is not None
            assert "system_prompt" in row
            assert sum(row["counts"].values()) == 6
    responses = [json.loads(line) for line in (tmp_path / "safety" / "step-000002.jsonl").read_text().splitlines()]
    assert len(responses) == 2 * 12
    assert {row["weights"] for row in responses} == {"live", "ema"}
    # The model now holds the average, and output_dir/ema is that model.
    averaged = dict(callback.ema.averaged_parameters())
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, averaged[name])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, averaged[name])


def test_average_is_the_float64_average_of_the_steps(tmp_path):
    seen = []

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.append(model.lm_head.weight.detach().double().clone())

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.lm_head.weight.detach().double().clone())

    callback = SafeEMACallback(decay=0.7, check=None)
    sft_trainer(tmp_path, [Recorder(), callback]).train()
    expected = seen[0]
    for weight in seen[1:]:
        expected = 0.7 * expected + 0.3 * weight
    moved = callback.ema.displacement()["model.embed_tokens.weight"]
    error = (moved.double() - (expected - seen[0])).norm() / (expected - seen[0]).norm()
    assert error < 1e-6


def test_metrics_choose_the_best_model_and_stop_early(tmp_path):
    class Fading:
        """Refuses less with every check, so that the first evaluation is the best."""

        name = "fading"
        calls = 0

        def judge(self, prompts, responses):
            self.calls += 1
            refused = max(0, 6 - self.calls // 2)
            return [Verdict("refusal" if i < refused else "compliance", "") for i in range(len(responses))]

    callback = SafeEMACallback(half_life=3, check=quick_check(judge=Fading(), benign=None))
    trainer = sft_trainer(
        tmp_path,
        [callback, EarlyStoppingCallback(early_stopping_patience=1)],
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_refusal_rate",
        max_steps=6,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert trainer.state.global_step < 6
    # The average of that checkpoint, not of the last step.
    assert callback.ema.num_updates == 1
    averaged = dict(callback.ema.averaged_parameters())
    assert all(torch.equal(p, averaged[name]) for name, p in trainer.model.named_parameters())


def test_evaluation_metrics_and_ema_loss(tmp_path):
    seen = {}

    class Recorder(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.update(metrics)

    sft_trainer(tmp_path, [SafeEMACallback(half_life=3, check=quick_check()), Recorder()]).train()
    for weights in ("base", "live", "ema"):
        assert 0 <= seen[f"eval_{weights}_asr"] <= 1
        assert 0 <= seen[f"eval_{weights}_refusal_rate"] <= 1 - seen[f"eval_{weights}_asr"] + 1e-9
        assert 0 <= seen[f"eval_{weights}_over_refusal"] <= 1
    assert seen["eval_ema_loss"] > 0
    assert seen["eval_ema_loss"] != seen["eval_loss"]


def test_a_failing_ema_loss_does_not_end_the_run_at_the_choice_of_the_best_model(tmp_path):
    callback = SafeEMACallback(half_life=3, check=None)
    trainer = sft_trainer(
        tmp_path,
        [callback],
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_loss",
        max_steps=4,
    )

    def fail(model, _):
        if (
            trainer.state.global_step in (1, 3)
            and trainer.is_in_train
            and not model.training
            and callback.ema._swapped
        ):
            raise RuntimeError("made to fail")

    trainer.model.register_forward_pre_hook(fail)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [row["step"] for row in rows_of(tmp_path) if row["type"] == "error"] == [1, 3]
    assert [row["step"] for row in rows_of(tmp_path) if row["type"] == "loss"] == [2, 4]
    assert trainer.state.best_model_checkpoint.endswith(("checkpoint-2", "checkpoint-4"))


def test_ema_loss_is_what_the_trainer_would_report(tmp_path):
    callback = SafeEMACallback(half_life=3, check=None)
    trainer = sft_trainer(tmp_path, [callback])
    trainer.train()
    ema_loss = [row["ema"] for row in rows_of(tmp_path) if row["type"] == "loss"][-1]
    trainer.remove_callback(callback)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ema_loss, rel=1e-5)


def test_plain_trainer(tmp_path):
    model, tokenizer = testbed.load()
    texts = [tokenizer(row["prompt"] + " " + row["response"], truncation=True, max_length=32) for row in PAIRS[:16]]
    rows = [{**text, "labels": text["input_ids"]} for text in texts if len(text["input_ids"]) == 32]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to="none", disable_tqdm=True
        ),
        processing_class=tokenizer,
        train_dataset=rows,
        callbacks=[SafeEMACallback(half_life=2, check=quick_check())],
    )
    trainer.train()
    # No evaluation is configured: the base and the last step are checked.
    assert {row["step"] for row in rows_of(tmp_path)} == {0, 3}


def test_dpo_trainer(tmp_path):
    model, tokenizer = testbed.load()
    rows = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["response"]}],
                "rejected": [{"role": "assistant", "content": "No idea."}],
            }
            for row in PAIRS[:12]
        ]
    )
    callback = SafeEMACallback(half_life=2, check=quick_check())
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            eval_strategy="steps",
            eval_steps=1,
            report_to="none",
            disable_tqdm=True,
            bf16=False,
        ),
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        callbacks=[callback],
    )
    trainer.train()
    assert {row["type"] for row in rows_of(tmp_path)} == {"report"}  # no errors, and no language-model loss to report
    assert {row["step"] for row in rows_of(tmp_path)} == {0, 1, 2}


class Broken:
    name = "broken"

    def judge(self, prompts, responses):
        raise RuntimeError("the judge is down")


def test_a_check_that_raises_only_warns(tmp_path):
    callback = SafeEMACallback(half_life=3, check=quick_check(judge=Broken()), final_weights="live")
    trainer = sft_trainer(
        tmp_path, [callback], save_strategy="steps", save_steps=3, metric_for_best_model="eval_ema_refusal_rate"
    )
    trainer.train()
    assert trainer.state.global_step == 6
    errors = [row for row in rows_of(tmp_path) if row["type"] == "error"]
    assert len(errors) == 5 and all("the judge is down" in row["error"] for row in errors)


def test_responses_that_cannot_be_written_only_warn(tmp_path):
    (tmp_path / "safety").write_text("in the way")
    callback = SafeEMACallback(half_life=3, check=quick_check())

    class InTheWay(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / "safety")
            (tmp_path / "safety").write_text("in the way, again")

    trainer = sft_trainer(tmp_path, [callback, InTheWay()])
    trainer.train()
    assert (tmp_path / "safety.1").read_text() == "in the way"
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if row["type"] == "error"] == [3, 6]
    assert [row["step"] for row in rows if row["type"] == "report" and row["weights"] == "ema"] == [3, 6]


def test_empty_responses_are_counted_apart(tmp_path):
    class Silent:
        name = "silent"

        def judge(self, prompts, responses):
            return [Verdict("unclear", "empty") for _ in responses]

    callback = SafeEMACallback(half_life=3, check=quick_check(judge=Silent()), max_asr=0.0, on_violation="raise")
    sft_trainer(tmp_path, [callback]).train()
    (report,) = [row for row in rows_of(tmp_path) if row["type"] == "report" and row["weights"] == "base"]
    assert report["asr"] is None and report["counts"] == {"refusal": 0, "compliance": 0, "unclear": 6}


class Compliant:
    name = "compliant"

    def judge(self, prompts, responses):
        return [Verdict("compliance", "") for _ in responses]


def test_max_asr_stops(tmp_path):
    callback = SafeEMACallback(half_life=3, check=quick_check(judge=Compliant()), max_asr=0.5, on_violation="stop")
    trainer = sft_trainer(tmp_path, [callback])
    trainer.train()
    assert trainer.state.global_step == 3
    assert (tmp_path / "ema" / "config.json").exists()


def test_max_asr_raises_and_leaves_the_live_weights(tmp_path):
    callback = SafeEMACallback(
        half_life=3, check=quick_check(judge=Compliant()), check_steps=2, max_asr=0.5, on_violation="raise"
    )
    trainer = sft_trainer(tmp_path, [callback])
    with pytest.raises(UnsafeModelError, match="step 2"):
        trainer.train()
    assert callback.ema.distance_to_base("live") > callback.ema.distance_to_base("ema")
    assert [row["step"] for row in rows_of(tmp_path) if row["type"] == "report"] == [0, 2, 2]


def test_max_asr_warns_by_default(tmp_path, caplog):
    callback = SafeEMACallback(half_life=3, check=quick_check(judge=Compliant()), max_asr=0.5)
    trainer = sft_trainer(tmp_path, [callback])
    trainer.train()
    assert trainer.state.global_step == 6
    assert "step 3: attack success rate of the ema weights is 100.0%" in caplog.text


def test_lookahead_ends_on_the_average(tmp_path):
    callback = SafeEMACallback(decay=0.5, mode="lookahead", sync_steps=3, check=None, final_weights="live")
    trainer = sft_trainer(tmp_path, [callback])
    trainer.train()
    averaged = dict(callback.ema.averaged_parameters())
    assert all(torch.equal(p, averaged[name]) for name, p in trainer.model.named_parameters())


def test_resume_goes_on_bit_equal(tmp_path):
    def run(folder, stop_at=None):
        class Stop(TrainerCallback):
            def on_save(self, args, state, control, **kwargs):
                if stop_at is not None and state.global_step == stop_at:
                    raise KeyboardInterrupt

        callback = SafeEMACallback(half_life=3, check=quick_check(), check_steps=2, final_weights="live")
        trainer = sft_trainer(folder, [callback, Stop()], save_strategy="steps", save_steps=3)
        return trainer, callback

    trainer, callback = run(tmp_path / "whole")
    trainer.train()
    interrupted, _ = run(tmp_path / "resumed", stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    resumed, resumed_callback = run(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=True)
    for key, value in trainer.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])
    averaged = dict(resumed_callback.ema.averaged_parameters())
    assert all(torch.equal(value, averaged[name]) for name, value in callback.ema.averaged_parameters())
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "resumed")


def test_resuming_a_checkpoint_without_an_average_says_what_to_do(tmp_path):
    sft_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    trainer = sft_trainer(tmp_path, [SafeEMACallback(check=None)], save_strategy="steps", save_steps=3, max_steps=8)
    with pytest.raises(FileNotFoundError, match="without SafeEMACallback"):
        trainer.train(resume_from_checkpoint=True)


def test_evaluating_after_training_adds_nothing_to_the_history(tmp_path):
    trainer = sft_trainer(tmp_path, [SafeEMACallback(half_life=3, check=quick_check())])
    trainer.train()
    before = rows_of(tmp_path)
    metrics = trainer.evaluate()
    assert rows_of(tmp_path) == before and not any("live" in key for key in metrics)


def test_early_stopping_that_would_look_too_early_is_refused(tmp_path):
    callbacks = [EarlyStoppingCallback(), SafeEMACallback(half_life=3, check=quick_check())]
    settings = {"metric_for_best_model": "eval_ema_refusal_rate", "load_best_model_at_end": True}
    trainer = sft_trainer(tmp_path, callbacks, save_strategy="steps", save_steps=3, **settings)
    with pytest.raises(ValueError, match="put SafeEMACallback first"):
        trainer.train()


def test_the_saved_tokenizer_is_as_it_was(tmp_path):
    trainer = sft_trainer(tmp_path, [SafeEMACallback(half_life=3, check=quick_check())])
    before = json.loads(trainer.processing_class.backend_tokenizer.to_str())
    trainer.train()
    saved = json.loads((tmp_path / "ema" / "tokenizer.json").read_text())
    assert saved["padding"] == before["padding"] is None


def test_an_earlier_run_is_set_aside_not_overwritten(tmp_path):
    for _ in range(2):
        sft_trainer(tmp_path, [SafeEMACallback(half_life=3, check=quick_check())]).train()
    for name in ("safety_history.jsonl", "safety", "ema"):
        assert (tmp_path / name).exists() and (tmp_path / f"{name}.1").exists()


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_loggers_get_the_numbers(tmp_path, monkeypatch, name):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    settings = {"report_to": name, **({"project": "safe-ema-test"} if name == "trackio" else {})}
    if name == "trackio":
        settings["trackio_static_space_id"] = False
    sft_trainer(tmp_path, [SafeEMACallback(half_life=3, check=quick_check())], **settings).train()
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        logged = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        assert logged["train/safety/ema_asr"] == [3, 6]
        assert logged["train/safety/base_share"] == [0, 3, 6]
        assert logged["train/safety/ema_loss"] == [3, 6]
    else:
        files = [path for path in Path(os.environ["TRACKIO_DIR"]).rglob("*") if path.is_file()]
        assert any(b"safety/ema_asr" in path.read_bytes() for path in files)


def test_average_stuck_at_the_base_is_warned_about(tmp_path, caplog):
    sft_trainer(tmp_path, [SafeEMACallback(decay=0.9999, check=None)]).train()
    assert "100% of the average will still be the starting weights" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, r"\[0, 1\)"),
        ({"decay": 0.9, "half_life": 5}, "give one of them"),
        ({"half_life": 0}, "at least 1"),
        ({"half_life": 2.5}, "between 0 and 1"),
        ({"mode": "both"}, "unknown"),
        ({"mode": "lookahead"}, "sync_steps"),
        ({"max_asr": 1.5}, r"\[0, 1\]"),
        ({"max_asr": -0.1}, r"\[0, 1\]"),
        ({"check_steps": 0}, "at least 1"),
        ({"check_steps": 2.5}, "whole number"),
        ({"check_weights": ()}, "choose one or both"),
        ({"check_weights": ("ema", "mean")}, "choose one or both"),
        ({"on_violation": "cry"}, "unknown"),
        ({"final_weights": "mean"}, "unknown"),
    ],
)
def test_refused_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        SafeEMACallback(**arguments)


def test_a_check_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match="SafetyCheck"):
        SafeEMACallback(check="AdvBench")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"half_life": 7}, "longer than the run"),
        ({"params": "nothing.*"}, "no trainable parameter matched"),
    ],
)
def test_refused_before_the_first_step(tmp_path, arguments, message):
    trainer = sft_trainer(tmp_path, [SafeEMACallback(check=None, **arguments)])
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_tokenizer_without_chat_template_is_refused_before_the_first_step(tmp_path):
    model, tokenizer = testbed.load()
    tokenizer.chat_template = None
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 4
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", disable_tqdm=True),
        processing_class=tokenizer,
        train_dataset=rows,
        callbacks=[SafeEMACallback(half_life=1)],
    )
    with pytest.raises(ValueError, match="chat template"):
        trainer.train()


def test_an_output_folder_that_cannot_be_written_to_is_refused(tmp_path):
    trainer = sft_trainer(tmp_path / "run", [SafeEMACallback(check=None)])
    os.rmdir(tmp_path / "run") if (tmp_path / "run").is_dir() else None
    (tmp_path / "run").write_text("a file where the folder should be")
    with pytest.raises(ValueError, match="cannot be written to"):
        trainer.train()
