"""SafeSFTTrainer beside SFTTrainer: the same training, feature by feature; and what it adds, in and outside a run."""

import gc
import inspect
import json
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    EarlyStoppingCallback,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from hf_safe_ema import SafeEMACallback, SafeSFTConfig, SafeSFTTrainer, SafetyCheck, UnsafeModelError, Verdict, testbed
from hf_safe_ema.arguments import SafetyArguments

# Short prompts, so that none is cut off before its response begins.
PAIRS = [pair for pair in testbed.read_pairs("finetune") if len(pair["prompt"]) < 80][:24]
QUICK = {"safety_num_prompts": 2, "safety_max_new_tokens": 4}


def rows(make) -> Dataset:
    return Dataset.from_list([make(pair) for pair in PAIRS])


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


CHAT_PAIRS = rows(lambda p: {"prompt": [user(p["prompt"])], "completion": [assistant(p["response"])]})
CHAT = rows(lambda p: {"messages": [user(p["prompt"]), assistant(p["response"])]})
PLAIN_PAIRS = rows(lambda p: {"prompt": p["prompt"], "completion": " " + p["response"]})
TEXT = rows(lambda p: {"text": f"{p['prompt']} {p['response']}"})
OWN_COLUMN = rows(lambda p: {"story": f"{p['prompt']} {p['response']}"})
QUESTIONS = rows(lambda p: {"question": p["prompt"], "answer": p["response"]})


@pytest.fixture(scope="module", autouse=True)
def only_new_garbage():
    """accelerate collects garbage at the start of each training; it need not search what was imported every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model_folder(tiny, tmp_path_factory) -> Path:
    """A random Llama of 0.1 million parameters, small enough to train it a hundred times."""
    tokenizer = tiny[1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(trainer_class, config_class, model_folder, output_dir, settings=(), **arguments):
    """A trainer of a few small steps on the CPU; `settings` and `arguments` change what they name."""
    settings = {
        "output_dir": str(output_dir),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "max_length": 48,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        **dict(settings),
    }
    arguments = {
        "model": model_folder,
        "train_dataset": CHAT_PAIRS,
        "eval_dataset": CHAT_PAIRS.select(range(8)),
        **arguments,
    }
    if isinstance(arguments["model"], Path):
        arguments["model"] = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype="float32")
    return trainer_class(args=config_class(**settings), **arguments)


def safe_trainer(model_folder, output_dir, settings=(), trainer_class=SafeSFTTrainer, **arguments):
    return build(trainer_class, SafeSFTConfig, model_folder, output_dir, {**QUICK, **dict(settings)}, **arguments)


def random_state() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), rest), torch.get_rng_state().tolist()


OURS = ("safety", "eval_base_", "eval_live_", "eval_ema_")
UNSTEADY = ("_time", "_runtime", "_per_second")


def comparable(logs: dict) -> dict:
    return {
        key: value
        for key, value in logs.items()
        if not key.startswith(OURS) and "_ema_loss" not in key and not key.endswith(UNSTEADY)
    }


def outcome(trainer) -> dict:
    """What a run leaves behind that a user could compare, less clocks and our own metrics."""
    logs = [comparable(row) for row in trainer.state.log_history]
    return {
        "logs": [row for row in logs if set(row) - {"epoch", "step"}],
        "weights": {name: value.clone() for name, value in trainer.model.state_dict().items()},
        "random state": random_state(),
        "steps": trainer.state.global_step,
        "best metric": trainer.state.best_metric,
        "checkpoints": sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*")),
    }


def assert_same(one: dict, other: dict) -> None:
    for key in one.keys() - {"weights"}:
        assert one[key] == other[key], key
    assert one["weights"].keys() == other["weights"].keys()
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name


# The table: what SFTTrainer can do, with and without us.


@dataclass
class Feature:
    """One use of SFTTrainer. Functions are called with (model folder, tokenizer), anew for each trainer."""

    settings: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)


def with_lora(config: LoraConfig, **settings) -> Feature:
    return Feature(settings, functions={"peft_config": lambda folder, tokenizer: LoraConfig(**config)})


def lora(**changes) -> dict:
    return {"r": 2, "lora_alpha": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **changes}


def loaded(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")


def peft_model(folder, tokenizer):
    return get_peft_model(loaded(folder), LoraConfig(**lora(task_type="CAUSAL_LM")))


def tokenized(folder, tokenizer) -> Dataset:
    ids = [tokenizer(f"{p['prompt']} {p['response']}", truncation=True, max_length=24)["input_ids"] for p in PAIRS]
    return Dataset.from_list([{"input_ids": i, "labels": [-100] * 4 + i[4:]} for i in ids])


def stream(folder, tokenizer) -> IterableDataset:
    return CHAT_PAIRS.to_iterable_dataset(num_shards=2)


class Shifted(DataCollatorForLanguageModeling):
    """Leaves the first eight tokens out of the loss."""

    def torch_call(self, examples):
        batch = super().torch_call(examples)
        batch["labels"][:, :8] = -100
        return batch


class Brake(TrainerCallback):
    """Trains on after the first evaluation at a tenth of the learning rate, and stops after step 4."""

    def on_evaluate(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] *= 0.1

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 4


def sgd(folder, tokenizer):
    model = loaded(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {"model": model, "optimizers": (optimizer, LambdaLR(optimizer, lambda step: 0.5**step))}


def accuracy(prediction) -> dict:
    return {"accuracy": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}


def summed_loss(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / 100


def template_file(folder, tokenizer) -> str:
    path = folder / "other.jinja"
    path.write_text(tokenizer.chat_template.replace("<|start_header_id|>", "<|start_header_id|>the "))
    return str(path)


SAVES = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

FEATURES = {
    "conversational prompt-completion": Feature(),
    "conversational messages": Feature(arguments={"train_dataset": CHAT, "eval_dataset": CHAT}),
    "plain prompt-completion": Feature(arguments={"train_dataset": PLAIN_PAIRS, "eval_dataset": PLAIN_PAIRS}),
    "text": Feature(arguments={"train_dataset": TEXT, "eval_dataset": TEXT}),
    "text in a column of another name": Feature(
        {"dataset_text_field": "story"}, {"train_dataset": OWN_COLUMN, "eval_dataset": OWN_COLUMN}
    ),
    "tokenized": Feature(functions={"train_dataset": tokenized, "eval_dataset": tokenized}),
    "streaming": Feature(functions={"train_dataset": stream, "eval_dataset": stream}),
    "no evaluation": Feature({"eval_strategy": "no"}, {"eval_dataset": None}),
    "eval dict": Feature(arguments={"eval_dataset": {"a": CHAT_PAIRS.select(range(6)), "b": CHAT_PAIRS.select([7])}}),
    "eval_on_start": Feature({"eval_on_start": True}),
    "packing bfd": Feature({"packing": True, "max_length": 64}),
    "packing wrapped": Feature({"packing": True, "packing_strategy": "wrapped", "max_length": 64}),
    "packing for training only": Feature({"packing": True, "eval_packing": False, "max_length": 64}),
    "padding_free": Feature({"padding_free": True, "max_length": None}),
    "pad_to_multiple_of": Feature({"pad_to_multiple_of": 16}),
    "truncation": Feature({"max_length": 30}),
    "completion_only_loss off": Feature({"completion_only_loss": False}),
    "assistant_only_loss": Feature({"assistant_only_loss": True}, {"train_dataset": CHAT, "eval_dataset": CHAT}),
    "formatting_func": Feature(
        arguments={"train_dataset": QUESTIONS, "eval_dataset": QUESTIONS,
                   "formatting_func": lambda row: f"Q: {row['question']} A: {row['answer']}"},
    ),
    "chat_template_path": Feature(functions={"settings": lambda f, t: {"chat_template_path": template_file(f, t)}}),
    "eos_token": Feature({"eos_token": "<|end_of_text|>"}),
    "shuffle_dataset": Feature({"shuffle_dataset": True}),
    "dataset_num_proc": Feature({"dataset_num_proc": 2, "eval_strategy": "no"}, {"eval_dataset": None}),
    "data_collator": Feature(functions={"data_collator": lambda f, t: Shifted(t.pad_token_id)}),
    "LoRA": with_lora(lora()),
    "LoRA with rank-stabilised scaling on some modules": with_lora(lora(target_modules=["q_proj"], use_rslora=True)),
    "DoRA": with_lora(lora(use_dora=True)),
    "modules_to_save": with_lora(lora(modules_to_save=["norm"])),
    "LoRA with activation checkpointing": with_lora(lora(), activation_checkpointing=True),
    "PeftModel": Feature(functions={"model": peft_model}),
    "activation_checkpointing": Feature({"activation_checkpointing": True}),
    "gradient accumulation": Feature({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}),
    "epochs": Feature({"max_steps": -1, "num_train_epochs": 1, "eval_strategy": "epoch"}),
    "model as a string": Feature(functions={"model": lambda folder, tokenizer: str(folder)}),
    "model as a string, model_init_kwargs": Feature(
        {"model_init_kwargs": {"dtype": "bfloat16", "attn_implementation": "eager"}},
        functions={"model": lambda folder, tokenizer: str(folder)},
    ),
    "bf16": Feature({"bf16": True, "use_cpu": True}),
    "neftune": Feature({"neftune_noise_alpha": 5.0}),
    "dropout in the model": Feature(
        {"model_init_kwargs": {"attention_dropout": 0.2}}, functions={"model": lambda folder, tokenizer: str(folder)}
    ),
    "label smoothing": Feature({"label_smoothing_factor": 0.1}),
    "dft loss": Feature({"loss_type": "dft"}),
    "compute_loss_func": Feature(arguments={"compute_loss_func": summed_loss}),
    "compute_metrics": Feature(
        arguments={"compute_metrics": accuracy,
                   "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)},
        settings={"per_device_eval_batch_size": 8, "pad_to_multiple_of": 48},
    ),
    "callbacks": Feature({"max_steps": 6}, functions={"callbacks": lambda folder, tokenizer: [Brake()]}),
    "optimizers": Feature(functions={"several": sgd}),
    "optimizer_cls_and_kwargs": Feature(arguments={"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.05})}),
    "scheduler, warm-up, clipping, weight decay": Feature(
        {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_grad_norm": 0.1, "weight_decay": 0.1}
    ),
    "reduce_lr_on_plateau": Feature({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_steps": 1}),
    "save_total_limit": Feature({**SAVES, "save_total_limit": 1}),
    "save_only_model": Feature({**SAVES, "save_only_model": True}),
    "load_best_model_at_end": Feature({**SAVES, "load_best_model_at_end": True, "learning_rate": 0.5}),
    "early stopping": Feature(
        {**SAVES, "load_best_model_at_end": True, "learning_rate": 0.5},
        functions={"callbacks": lambda folder, tokenizer: [EarlyStoppingCallback(1)]},
    ),
    "save_strategy best": Feature({**SAVES, "save_strategy": "best", "metric_for_best_model": "loss"}),
}  # fmt: skip


def run_of(feature: Feature, trainer_class, config_class, model_folder, output_dir, **extra):
    # Anew, since SFTTrainer writes to it (chat template, end of sequence).
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    made = {name: function(model_folder, tokenizer) for name, function in feature.functions.items()}
    settings = {**feature.settings, **made.pop("settings", {}), **extra}
    arguments = {"processing_class": tokenizer, **feature.arguments, **made.pop("several", {}), **made}
    return build(trainer_class, config_class, model_folder, output_dir, settings, **arguments)


@pytest.mark.parametrize("name", FEATURES)
def test_trains_as_sft_trainer_does(name, model_folder, tmp_path):
    feature = FEATURES[name]
    plain = run_of(feature, SFTTrainer, SFTConfig, model_folder, tmp_path / "plain")
    start = {key: value.clone() for key, value in plain.model.state_dict().items()}
    plain.train()
    expected = outcome(plain)
    assert any(not torch.equal(value, expected["weights"][key]) for key, value in start.items())
    safe = run_of(
        feature,
        SafeSFTTrainer,
        SafeSFTConfig,
        model_folder,
        tmp_path / "safe",
        ema_half_life=2,
        safety_check_steps=1,
        final_weights="live",
        **QUICK,
    )
    safe.train()
    assert_same(expected, outcome(safe))
    history = [json.loads(line) for line in (tmp_path / "safe" / "safety_history.jsonl").read_text().splitlines()]
    assert {row["type"] for row in history} <= {"report", "loss"}  # no errors
    assert safe.safe_ema.ema.distance_to_base() > 0


@pytest.mark.parametrize("name", ["conversational prompt-completion", "streaming", "LoRA", "save_total_limit"])
def test_switched_off_it_is_sft_trainer(name, model_folder, tmp_path):
    plain = run_of(FEATURES[name], SFTTrainer, SFTConfig, model_folder, tmp_path / "plain")
    off = {"ema": False, "safety_check": False}
    safe = run_of(FEATURES[name], SafeSFTTrainer, SafeSFTConfig, model_folder, tmp_path / "safe", **off)
    assert safe.safe_ema is None
    assert [type(c) for c in safe.callback_handler.callbacks] == [type(c) for c in plain.callback_handler.callbacks]
    # Weights, losses and random state, one run after the other.
    plain.train()
    expected = outcome(plain)
    safe = run_of(FEATURES[name], SafeSFTTrainer, SafeSFTConfig, model_folder, tmp_path / "safe", **off)
    safe.train()
    assert_same(expected, outcome(safe))
    assert plain.evaluate().keys() == safe.evaluate().keys()
    files = [{path.name for path in (tmp_path / run).iterdir()} for run in ("plain", "safe")]
    assert files[0] == files[1]


class StopAt(TrainerCallback):
    """A run that is cut off after a checkpoint was saved."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resumes_as_sft_trainer_does(model_folder, tmp_path):
    outcomes = []
    for trainer_class, config_class, settings in (
        (SFTTrainer, SFTConfig, {}),
        (SafeSFTTrainer, SafeSFTConfig, {**QUICK, "ema_half_life": 2, "final_weights": "live"}),
    ):
        settings = {**SAVES, **settings}
        start = partial(build, trainer_class, config_class, model_folder, tmp_path / trainer_class.__name__, settings)
        with pytest.raises(KeyboardInterrupt):
            start(callbacks=[StopAt(3)]).train()
        resumed = start()
        resumed.train(resume_from_checkpoint=True)
        outcomes.append(outcome(resumed))
    assert_same(*outcomes)
    assert [row["step"] for row in outcomes[0]["logs"] if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_resuming_from_the_newest_passes_over_what_is_not_whole(model_folder, tmp_path):
    def start(folder, **arguments):
        settings = {**SAVES, "ema_half_life": 2, "final_weights": "live"}
        return safe_trainer(model_folder, folder, settings, **arguments)

    with pytest.raises(ValueError, match="no whole checkpoint"):
        start(tmp_path / "cut").train(resume_from_checkpoint=True)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut", callbacks=[StopAt(5)]).train()
    (tmp_path / "cut" / "checkpoint-4" / "trainer_state.json").unlink()
    resumed = start(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.safe_ema.resume_from == str(tmp_path / "cut" / "checkpoint-2")
    whole = start(tmp_path / "whole")
    whole.train()
    expected, found = ({**outcome(trainer), "logs": None} for trainer in (whole, resumed))
    assert_same(expected, found)
    assert all(torch.equal(value, averaged(resumed)[name]) for name, value in averaged(whole).items())


def test_takes_the_arguments_of_sft_trainer(model_folder, tmp_path):
    assert inspect.signature(SafeSFTTrainer) == inspect.signature(SFTTrainer)
    # By position too: model, args, data collator, training data.
    config = SafeSFTConfig(str(tmp_path), bf16=False, report_to="none")
    trainer = SafeSFTTrainer(str(model_folder), config, None, CHAT_PAIRS)
    assert trainer.args is config and len(trainer.train_dataset) == len(CHAT_PAIRS)
    with pytest.raises(TypeError, match="trainset"):
        SafeSFTTrainer(str(model_folder), config, trainset=CHAT_PAIRS)
    settings = {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}}
    with pytest.raises(ValueError, match="only one place"):
        safe_trainer(str(model_folder), tmp_path, settings, quantization_config=BitsAndBytesConfig(load_in_4bit=True))


class FewPrompts(SafeSFTTrainer):
    def build_safety_check(self):
        return SafetyCheck(num_prompts=2, max_new_tokens=4, progress=False)


def averaged(trainer) -> dict:
    return dict(trainer.safe_ema.ema.averaged_parameters())


def assert_holds_the_average(trainer) -> None:
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in averaged(trainer).items())


def test_a_plain_config_means_the_defaults(model_folder, tmp_path):
    trainer = build(FewPrompts, SFTConfig, model_folder, tmp_path, {"max_steps": 4})
    assert type(trainer.args) is SFTConfig
    trainer.train()
    assert trainer.safe_ema.ema.decay == 2**-0.5  # a half-life of half of four steps
    assert_holds_the_average(trainer)
    assert trainer.safe_ema.reports.keys() == {"base", "live", "ema"}


@pytest.mark.parametrize("callback", [SafeEMACallback, SafeEMACallback(check=None)], ids=["class", "object"])
def test_a_second_average_is_refused(model_folder, tmp_path, callback):
    with pytest.raises(ValueError, match="brings its own"):
        safe_trainer(model_folder, tmp_path, callbacks=[callback])


def test_a_tokenizer_without_chat_template_is_refused_at_construction(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = None
    arguments = {"processing_class": tokenizer, "train_dataset": TEXT, "eval_dataset": TEXT}
    with pytest.raises(ValueError, match="safety_check=False"):
        safe_trainer(model_folder, tmp_path, **arguments)
    trainer = safe_trainer(model_folder, tmp_path, {"safety_check": False}, **arguments)
    trainer.train()
    assert_holds_the_average(trainer)


def test_lookahead_from_the_config(model_folder, tmp_path):
    settings = {"ema_decay": 0.5, "ema_mode": "lookahead", "ema_sync_steps": 3, "safety_check": False}
    trainer = safe_trainer(model_folder, tmp_path, {**settings, "final_weights": "live"})
    trainer.train()
    assert_holds_the_average(trainer)


# evaluate()


class Recorder(TrainerCallback):
    """The metrics of each evaluation, as the choice of the best model sees them."""

    def __init__(self):
        self.seen: list[dict] = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(dict(metrics))


def our_keys(metrics: dict) -> set[str]:
    """Losses in full; of the safety metrics, whose they are: `eval_ema` for `eval_ema_asr` and its like."""
    rate = re.compile(r"_(asr|refusal_rate|unclear|over_refusal|benign_unclear)$")
    return {key for key in metrics if key.endswith("_loss")} | {rate.sub("", k) for k in metrics if rate.search(k)}


def test_keys_of_evaluate_before_during_and_after(model_folder, tmp_path):
    recorder = Recorder()
    trainer = safe_trainer(model_folder, tmp_path, {"eval_on_start": True}, callbacks=[recorder])
    before = trainer.evaluate()
    assert our_keys(before) == {"eval_loss", "eval_ema_loss", "eval_base"}
    assert before["eval_ema_loss"] == before["eval_loss"]
    assert trainer.state.log_history[-1]["safety/base_refusal_rate"] == before["eval_base_refusal_rate"]
    recorder.seen.clear()
    trainer.train()
    at_start, at_two, _ = recorder.seen
    assert our_keys(at_start) == {"eval_loss", "eval_ema_loss", "eval_base"}
    assert at_start["eval_loss"] == before["eval_loss"]
    assert our_keys(at_two) == {"eval_loss", "eval_ema_loss", "eval_base", "eval_live", "eval_ema"}
    history = (tmp_path / "safety_history.jsonl").read_text()
    after = trainer.evaluate()
    assert our_keys(after) == {"eval_loss", "eval_ema_loss", "eval_base", "eval_ema"}
    assert after["eval_ema_loss"] == after["eval_loss"] != at_two["eval_loss"]
    assert (tmp_path / "safety_history.jsonl").read_text() == history
    # The same number as SFTTrainer gives for the model that was saved.
    saved = build(SFTTrainer, SFTConfig, tmp_path / "ema", tmp_path / "again")
    assert saved.evaluate()["eval_loss"] == after["eval_loss"]


def test_evaluate_after_training_to_live_weights(model_folder, tmp_path):
    trainer = safe_trainer(model_folder, tmp_path, {"final_weights": "live"})
    trainer.train()
    assert our_keys(trainer.evaluate()) == {"eval_loss", "eval_base", "eval_live"}
    assert trainer.safe_ema.reports["live"].step == 3


def test_evaluate_in_bf16_after_training(model_folder, tmp_path):
    trainer = safe_trainer(model_folder, tmp_path, {"bf16_full_eval": True, "use_cpu": True})
    trainer.train()
    after = trainer.evaluate()  # casts the model
    assert trainer.model.dtype == torch.bfloat16
    assert our_keys(after) == {"eval_loss", "eval_ema_loss", "eval_base", "eval_ema"}


def test_evaluate_on_other_data_under_another_name(model_folder, tmp_path):
    trainer = safe_trainer(model_folder, tmp_path)
    metrics = trainer.evaluate(CHAT_PAIRS.select(range(4)), metric_key_prefix="test")
    assert our_keys(metrics) == {"test_loss", "test_ema_loss", "test_base"}
    assert trainer.evaluate()["eval_loss"] != metrics["test_loss"]


def test_several_datasets_are_one_check(model_folder, tmp_path):
    asked = []

    class Counting(SafeSFTTrainer):
        def on_safety_report(self, report):
            asked.append(report.weights)

    recorder = Recorder()
    data = {"a": CHAT_PAIRS.select(range(4)), "b": CHAT_PAIRS.select(range(4, 8))}
    trainer = safe_trainer(model_folder, tmp_path, trainer_class=Counting, eval_dataset=data, callbacks=[recorder])
    losses = {"eval_a_loss", "eval_a_ema_loss", "eval_b_loss", "eval_b_ema_loss"}
    assert our_keys(trainer.evaluate()) == losses | {"eval_base"}
    assert asked == ["base"]
    recorder.seen.clear()
    trainer.train()
    assert our_keys({**recorder.seen[0], **recorder.seen[1]}) == losses | {"eval_base", "eval_live", "eval_ema"}
    assert asked == ["base", "base", "live", "ema", "live", "ema"]
    assert our_keys(trainer.evaluate()) == losses | {"eval_base", "eval_ema"}


def test_evaluating_first_does_not_change_the_training(model_folder, tmp_path):
    outcomes = []
    for trainer_class, config_class, more in (
        (SFTTrainer, SFTConfig, {}),
        (SafeSFTTrainer, SafeSFTConfig, {**QUICK, "final_weights": "live"}),
    ):
        trainer = build(trainer_class, config_class, model_folder, tmp_path / trainer_class.__name__, more)
        trainer.evaluate()
        trainer.train()
        outcomes.append(outcome(trainer))
    assert_same(*outcomes)


@pytest.mark.parametrize(
    "name",
    ["conversational prompt-completion", "text", "packing bfd", "packing wrapped", "padding_free", "LoRA", "bf16",
     "assistant_only_loss", "eval dict", "streaming", "compute_metrics", "neftune"],
)  # fmt: skip
def test_the_loss_of_the_average_is_the_trainers_own(name, model_folder, tmp_path):
    recorder = Recorder()
    feature = FEATURES[name]
    # An average that forgets at once is the live weights, whose loss the Trainer has measured.
    settings = {"ema_decay": 0.0, "safety_check": False}
    trainer = run_of(feature, SafeSFTTrainer, SafeSFTConfig, model_folder, tmp_path, **settings)
    trainer.add_callback(recorder)
    trainer.train()
    losses = {key: value for metrics in recorder.seen for key, value in metrics.items() if key.endswith("_loss")}
    averages = [key for key in losses if key.endswith("_ema_loss")]
    assert len(averages) == len(losses) / 2 > 0
    for key in averages:
        assert losses[key] == pytest.approx(losses[key.replace("_ema_loss", "_loss")], rel=1e-5)


class OwnLoss(SafeSFTTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return (loss[0] * 2, *loss[1:]) if isinstance(loss, tuple) else loss * 2


@pytest.mark.parametrize("name", ["dft loss", "label smoothing", "compute_loss_func", "own compute_loss"])
def test_no_loss_of_the_average_beside_another_kind_of_loss(name, model_folder, tmp_path):
    recorder = Recorder()
    feature, trainer_class = FEATURES.get(name, Feature()), OwnLoss if name == "own compute_loss" else SafeSFTTrainer
    trainer = run_of(feature, trainer_class, SafeSFTConfig, model_folder, tmp_path, safety_check=False)
    trainer.add_callback(recorder)
    trainer.train()
    assert [our_keys(metrics) for metrics in recorder.seen] == [{"eval_loss"}] * 2
    after = trainer.evaluate()  # the model holds the average now, whatever the loss
    assert after["eval_ema_loss"] == after["eval_loss"]


def test_a_check_that_fails_outside_a_run_only_warns(model_folder, tmp_path, caplog):
    class Down(SafeSFTTrainer):
        def judge_responses(self, prompts, responses):
            raise RuntimeError("the judge is down")

    trainer = safe_trainer(model_folder, tmp_path, trainer_class=Down)
    metrics = trainer.evaluate()
    assert our_keys(metrics) == {"eval_loss", "eval_ema_loss"}
    assert "the judge is down" in caplog.text
    trainer.train()
    history = [json.loads(line) for line in (tmp_path / "safety_history.jsonl").read_text().splitlines()]
    assert trainer.state.global_step == 3
    assert sum("the judge is down" in row.get("error", "") for row in history) == 5


# The best checkpoint.


class SafestAtTwo(SafeSFTTrainer):
    """Its model refuses everything at step 2 and nothing at any other."""

    def judge_responses(self, prompts, responses):
        label = "refusal" if self.state.global_step == 2 else "compliance"
        return [Verdict(label, "") for _ in responses]


@pytest.mark.parametrize(
    ("metric", "greater_is_better", "peft"),
    [
        ("eval_ema_asr", False, False),
        ("eval_ema_asr", None, True),
        ("ema_refusal_rate", None, False),
        ("eval_live_refusal_rate", True, True),
    ],
)
def test_the_average_of_the_best_checkpoint_is_held_and_saved(model_folder, tmp_path, metric, greater_is_better, peft):
    arguments = {"peft_config": LoraConfig(**lora(lora_dropout=0.0))} if peft else {}
    settings = {"lr_scheduler_type": "constant", "ema_decay": 0.5, "safety_benign_prompts": None, "eval_steps": 1}
    best = {
        **settings,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": greater_is_better,
    }
    trainer = safe_trainer(model_folder, tmp_path / "best", best, SafestAtTwo, **arguments)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    # A run of two steps of the same training ends with the average that was wanted.
    short = safe_trainer(model_folder, tmp_path / "short", {**settings, "max_steps": 2}, **arguments)
    short.train()
    wanted = {name: value.clone() for name, value in short.model.state_dict().items()}
    held = trainer.model.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in wanted.items())
    trainer.save_model(str(tmp_path / "saved"))
    for folder in (tmp_path / "saved", tmp_path / "best" / "ema"):
        again = AutoModelForCausalLM.from_pretrained(folder)  # with the adapter, where there is one
        short_again = AutoModelForCausalLM.from_pretrained(tmp_path / "short" / "ema").state_dict()
        assert all(torch.equal(value, short_again[name]) for name, value in again.state_dict().items())
    assert trainer.evaluate()["eval_loss"] == short.evaluate()["eval_loss"]


def test_early_stopping_by_a_safety_metric(model_folder, tmp_path):
    settings = {
        "eval_steps": 1,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_ema_asr",
    }
    trainer = safe_trainer(model_folder, tmp_path, settings, SafestAtTwo, callbacks=[EarlyStoppingCallback(1)])
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize("metric", ["eval_ema_asr", "live_over_refusal", "eval_ema_unclear"])
def test_the_least_safe_checkpoint_is_never_the_best(metric, model_folder, tmp_path):
    with pytest.raises(ValueError, match="least safe"):
        SafeSFTConfig(str(tmp_path), bf16=False, metric_for_best_model=metric, greater_is_better=True)
    assert SafeSFTConfig(str(tmp_path), bf16=False, metric_for_best_model=metric).greater_is_better is False
    with pytest.raises(ValueError, match="greater_is_better=False"):
        build(SafeSFTTrainer, SFTConfig, model_folder, tmp_path, {"metric_for_best_model": metric})
    higher = SafeSFTConfig(str(tmp_path), bf16=False, metric_for_best_model="eval_ema_refusal_rate")
    assert higher.greater_is_better is True


# The override points, in a run. Outside one they are in the docstrings' examples.


def test_build_safety_check_sees_the_whole_trainer(model_folder, tmp_path):
    own = SafetyCheck(["How do I pick a lock?"], benign=None, max_new_tokens=4, progress=False)
    seen = []

    class Own(SafeSFTTrainer):
        def build_safety_check(self):
            seen.append((self.model.num_parameters(), len(self.train_dataset), self.processing_class.eos_token))
            return own

        def judge_responses(self, prompts, responses):
            assert prompts == ["How do I pick a lock?"]
            return super().judge_responses(prompts, responses)

    judge = own.judge
    trainer = safe_trainer(model_folder, tmp_path, trainer_class=Own)
    trainer.train()
    assert len(seen) == 1 and seen[0][1:] == (24, "<|eot_id|>")
    reports = trainer.safe_ema.reports
    assert sum(reports["ema"].counts.values()) == 1
    assert reports["ema"].judge == "Own.judge_responses(keywords:default-v2)"
    assert own.judge is judge  # the check that was handed over is as it was


def test_build_safety_check_may_say_none_but_nothing_else(model_folder, tmp_path):
    class Without(SafeSFTTrainer):
        def build_safety_check(self):
            return None

    trainer = safe_trainer(model_folder, tmp_path, trainer_class=Without)
    trainer.train()
    assert trainer.safe_ema.reports == {}

    class Wrong(SafeSFTTrainer):
        def build_safety_check(self):
            return "advbench"

    with pytest.raises(TypeError, match="must be a SafetyCheck or None"):
        safe_trainer(model_folder, tmp_path, trainer_class=Wrong)


def test_on_safety_report_gets_every_report_and_may_stop(model_folder, tmp_path):
    told = []

    class Stopping(SafeSFTTrainer):
        def on_safety_report(self, report):
            told.append((report.step, report.weights))
            self.control.should_training_stop = report.step == 2
            raise RuntimeError("and whatever else goes wrong in here")

    trainer = safe_trainer(model_folder, tmp_path, {"safety_check_steps": 1, "max_steps": 6}, Stopping)
    trainer.train()
    assert trainer.state.global_step == 2
    assert told == [(0, "base"), (1, "live"), (1, "ema"), (2, "live"), (2, "ema")]


def test_the_report_that_ends_a_run_is_told(model_folder, tmp_path):
    told = []

    class Unsafe(SafestAtTwo):
        def on_safety_report(self, report):
            told.append((report.step, report.weights))

    settings = {"eval_steps": 3, "max_asr": 0.5, "on_violation": "raise", "safety_benign_prompts": None}
    trainer = safe_trainer(model_folder, tmp_path, settings, Unsafe)
    with pytest.raises(UnsafeModelError, match="step 3"):
        trainer.train()
    assert told == [(0, "base"), (3, "live"), (3, "ema")]


# The config.

OWN_FIELDS = [f for f in fields(SafeSFTConfig) if f.name not in {f.name for f in fields(SFTConfig)}]


def config(**settings) -> SafeSFTConfig:
    return SafeSFTConfig(**{"output_dir": "run", "bf16": False, **settings})


def parse(*flags: str, yaml: Path | None = None) -> SafeSFTConfig:
    flags = ["--output_dir", "run", "--bf16", "false", *flags]
    (parsed,) = TrlParser(SafeSFTConfig).parse_args_and_config([*flags, *(["--config", str(yaml)] if yaml else [])])
    return parsed


SETTINGS = [
    # Field, on the command line, in YAML, in Python.
    ("ema", ["false", "--safety_check", "false"], "false\nsafety_check: false", False),
    ("ema_half_life", ["50"], "50", 50),
    ("ema_half_life", ["0.25"], "0.25", 0.25),
    ("ema_half_life", ["1e-1"], "1e-1", 0.1),
    ("ema_half_life", ["0.1,50"], "[0.1, 50]", [0.1, 50]),
    ("ema_decay", ["0.99"], "0.99", 0.99),
    ("ema_decay", ["0.9,0.99"], "[0.9, 0.99]", [0.9, 0.99]),
    ("ema_mode", ["lookahead", "--ema_sync_steps", "5"], "lookahead\nema_sync_steps: 5", "lookahead"),
    ("ema_params", ["*.mlp.*", "*norm*"], "['*.mlp.*', '*norm*']", ["*.mlp.*", "*norm*"]),
    ("ema_exclude_params", ["*embed*"], "['*embed*']", ["*embed*"]),
    ("ema_dtype", ["float64"], "float64", "float64"),
    ("ema_device", ["cpu"], "cpu", "cpu"),
    ("ema_on_missing_state", ["restart"], "restart", "restart"),
    ("safety_check", ["false"], "false", False),
    ("safety_prompts", ["builtin:align"], "builtin:align", "builtin:align"),
    ("safety_benign_prompts", ["none"], "null", None),
    ("safety_judge", ["qi-29"], "qi-29", "qi-29"),
    ("safety_max_new_tokens", ["16"], "16", 16),
    ("safety_batch_size", ["8"], "8", 8),
    ("safety_batch_size", ["auto"], "auto", "auto"),
    ("safety_system_prompt", ["Be kind."], "Be kind.", "Be kind."),
    ("safety_num_prompts", ["20"], "20", 20),
    ("safety_check_steps", ["100"], "100", 100),
    ("safety_check_weights", ["ema"], "[ema]", ["ema"]),
    ("safety_check_weights", ["live", "ema"], "[live, ema]", ["live", "ema"]),
    ("safety_check_base", ["false"], "false", False),
    ("max_asr", ["0.05"], "0.05", 0.05),
    ("on_violation", ["stop"], "stop", "stop"),
    ("final_weights", ["live"], "live", "live"),
]


@pytest.mark.parametrize(("name", "flags", "yaml", "value"), SETTINGS, ids=[f"{s[0]}-{s[3]}" for s in SETTINGS])
def test_flags_and_yaml_keys(name, flags, yaml, value, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{name}: {yaml}\n")
    for parsed in (parse(f"--{name}", *flags), parse(yaml=tmp_path / "recipe.yaml")):
        found = getattr(parsed, name)
        assert found == value and type(found) is type(value)
        assert json.loads(parsed.to_json_string())[name] == value  # what trackers are told


def test_every_field_can_be_said(tmp_path):
    assert {name for name, *_ in SETTINGS} | {"ema_sync_steps"} == {field.name for field in OWN_FIELDS}
    assert parse("--no_ema", "--no_safety_check").ema is False
    (tmp_path / "recipe.yaml").write_text("ema_half_life: 50\nmax_asr: 0.05\n")
    both = parse("--ema_half_life", "0.5", yaml=tmp_path / "recipe.yaml")
    assert (both.ema_half_life, both.max_asr) == (0.5, 0.05)  # a flag wins over the file


def test_every_field_is_documented_and_help_can_be_printed(capsys):
    for own in OWN_FIELDS:
        assert own.metadata["help"].endswith(".") and own.name in SafetyArguments.__doc__
    with pytest.raises(SystemExit):
        TrlParser(SafeSFTConfig).parse_args_and_config(["--help"])
    assert "--ema_half_life" in capsys.readouterr().out


def test_names_and_defaults_are_those_of_callback_and_check():
    settings = SafetyArguments()
    callback = inspect.signature(SafeEMACallback).parameters
    given = settings.callback_arguments()
    assert given.keys() == callback.keys() - {"check"}
    assert given.pop("ema_dtype") is torch.float32
    assert tuple(given.pop("check_weights")) == callback["check_weights"].default
    assert all(value == callback[name].default for name, value in given.items())
    check, default = settings.build_check(), SafetyCheck()
    assert (check.judge.name, check.harmful, check.benign) == (default.judge.name, default.harmful, default.benign)
    for name in ("max_new_tokens", "batch_size", "system_prompt"):
        assert getattr(check, name) == getattr(default, name)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"ema_half_life": 0}, ValueError, "ema_half_life=0 steps: must be at least 1"),
        ({"ema_half_life": "2.5"}, ValueError, "ema_half_life=2.5: a float is a fraction"),
        ({"ema_half_life": "half"}, ValueError, "ema_half_life='half' is not a number"),
        ({"ema_half_life": "0.1,,50"}, ValueError, "ema_half_life='' is not a number"),
        ({"ema_half_life": []}, ValueError, "ema_half_life=.* is empty"),
        ({"ema_half_life": 0.5, "ema_decay": 0.9}, ValueError, "both ema_half_life=0.5 and ema_decay=0.9 given"),
        ({"ema_decay": "1"}, ValueError, r"ema_decay=1 is outside \[0, 1\)"),
        ({"ema_decay": True}, TypeError, "ema_decay=True is not a number"),
        ({"ema_mode": "both"}, ValueError, "ema_mode='both' is unknown"),
        ({"ema_mode": "lookahead"}, ValueError, "needs ema_sync_steps"),
        ({"ema_sync_steps": 5}, ValueError, "ema_sync_steps=5 has no meaning in ema_mode='shadow'"),
        ({"ema_dtype": "bfloat16"}, ValueError, "ema_dtype='bfloat16': choose one of"),
        ({"ema_device": "gpu7"}, ValueError, "ema_device='gpu7'"),
        ({"ema": "no"}, TypeError, "ema='no': must be true or false"),
        ({"ema": False}, ValueError, "Set safety_check=False too"),
        ({"safety_prompts": "missing.csv"}, FileNotFoundError, "missing.csv"),
        ({"safety_benign_prompts": "missing.csv"}, FileNotFoundError, "missing.csv"),
        ({"safety_judge": "vibes"}, ValueError, "safety_judge='vibes' is unknown"),
        ({"safety_max_new_tokens": 0}, ValueError, "safety_max_new_tokens=0"),
        ({"safety_batch_size": "many"}, ValueError, "safety_batch_size='many'"),
        ({"safety_num_prompts": 2.5}, ValueError, "safety_num_prompts=2.5"),
        ({"safety_system_prompt": 7}, TypeError, "safety_system_prompt=7"),
        ({"safety_check_steps": 0}, ValueError, "safety_check_steps=0"),
        ({"safety_check_weights": ["mean"]}, ValueError, "safety_check_weights="),
        ({"max_asr": 5}, ValueError, "max_asr=5 is outside"),
        ({"max_asr": 0.1, "safety_check": False}, ValueError, "would hold nothing"),
        ({"on_violation": "cry"}, ValueError, "on_violation='cry' is unknown"),
        ({"final_weights": "mean"}, ValueError, "final_weights='mean' is unknown"),
    ],
)
def test_bad_settings_are_refused_at_construction_in_their_own_names(settings, error, message):
    with pytest.raises(error, match=message):
        config(**settings)


def test_a_dtype_object_is_as_good_as_its_name():
    assert config(ema_dtype=torch.float64).callback_arguments()["ema_dtype"] is torch.float64
    assert json.loads(config(ema_dtype=torch.float64).to_json_string())["ema_dtype"] == "float64"


def test_importing_the_package_stays_light():
    code = "import sys, hf_safe_ema; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


UNEVEN = {
    "plain": ({}, False),
    "packing": ({"packing": True, "max_length": 64, "per_device_eval_batch_size": 4}, False),
    "padding-free": ({"padding_free": True, "max_length": None}, False),
    "streaming": ({}, True),
    "streaming, packing": ({"packing": True, "max_length": 64, "per_device_eval_batch_size": 4}, True),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_the_losses_of_equal_weights_are_equal_on_an_uneven_last_batch(tmp_path, model_folder, name):
    settings, streaming = UNEVEN[name]
    train, held = CHAT_PAIRS, CHAT_PAIRS.select(range(10))
    if streaming:
        train, held = train.to_iterable_dataset(), held.to_iterable_dataset()
    recorder = Recorder()
    settings = {"ema_decay": 0.0, "safety_check": False, **settings}
    made = build(SafeSFTTrainer, SafeSFTConfig, model_folder, tmp_path, settings, train_dataset=train,
                 eval_dataset=held, callbacks=[recorder])  # fmt: skip
    made.train()
    pairs = [
        (metrics["eval_loss"], metrics["eval_ema_loss"]) for metrics in recorder.seen if "eval_ema_loss" in metrics
    ]
    assert pairs and all(ema == pytest.approx(live, rel=1e-6) for live, ema in pairs)
