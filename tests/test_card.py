"""The model card in `ema/`: the numbers of the history, the metadata of PEFT kept, and nothing in the way of the weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from test_callback import LORA, Broken, rows_of, sft_trainer
from transformers import AutoModelForCausalLM

from hf_safe_ema import SafeEMACallback, SafetyCheck, Verdict, WeightEMA, testbed
from hf_safe_ema.card import base_model_of, escaped, write_card
from hf_safe_ema.report import LABELS


def quick_callback(**changes) -> SafeEMACallback:
    check = SafetyCheck(num_prompts=4, max_new_tokens=4, progress=False, system_prompt="Be kind | brief.\nAlways.")
    return SafeEMACallback(**{"half_life": 2, "check": check, **changes})


def table_of(card: ModelCard) -> dict[str, dict[str, str]]:
    """The card's table by the first column, each row by the header."""
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def percent(rate: float, interval: list[float]) -> str:
    return f"{rate:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def assert_table_is_of(card: ModelCard, history: list[dict], step: int) -> None:
    """The table has the report of each weights at the step (the base: at 0), and no other number."""
    table = table_of(card)
    reports = [row for row in history if row["type"] == "report" and row["step"] in (0, step)]
    (loss,) = [row for row in history if row["type"] == "loss" and row["step"] == step]
    assert list(table) == ["base", "live", "EMA"] and len(reports) == 3
    for report in reports:
        shown = table[LABELS[report["weights"]]]
        heldout = "-" if report["weights"] == "base" else f"{loss[report['weights']]:.3f}"
        assert shown == {
            "weights": LABELS[report["weights"]],
            "step": str(report["step"]),
            "ASR (95% interval)": percent(report["asr"], report["asr_interval"]),
            "unclear": f"{report['counts']['unclear']}/{sum(report['counts'].values())}",
            "over-refusal": percent(report["over_refusal"], report["over_refusal_interval"]),
            "held-out loss": heldout,
            "distance to base": f"{report['distance_to_base']:.2f}",
        }


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_the_card_of_a_run(tmp_path, peft_config):
    callback = quick_callback()
    trainer = sft_trainer(tmp_path, [callback], max_steps=4, eval_steps=2, peft_config=peft_config)
    trainer.train()
    card = ModelCard.load(tmp_path / "ema" / "README.md")
    history = rows_of(tmp_path)
    assert_table_is_of(card, history, step=4)
    text = re.sub(r"\\(.)", r"\1", card.text)  # as it reads
    for row in history:
        if row["type"] == "report":
            for name in (row["harmful_set"], row["benign_set"], row["judge"], row["template"]):
                assert name in text
    assert "at most 4 tokens. System prompt: “Be kind | brief. Always.”" in text
    assert "Decay: 0.707107 (half-life 2.0 optimizer steps)" in text
    assert "Updates: 4, the last one at step 4" in text
    assert f"left in the average: {0.5**2:.1%}" in text
    assert "The row EMA is about the weights in this folder." in text
    assert "sees words, not meaning" in text
    assert str(testbed.MODEL_FOLDER.parent) not in text  # no path of this machine, only the folder's name
    assert "More Information Needed" not in text
    assert {"ema", "hf_safe_ema", "safety"} <= set(card.data.tags)
    assert card.data.license is None
    if peft_config is None:
        assert card.data.library_name == "transformers" and card.data.base_model is None
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ema")
    else:
        assert card.data.library_name == "peft" and "lora" in card.data.tags
        assert card.data.base_model == str(testbed.MODEL_FOLDER)
        assert "### Framework versions" in text and "- PEFT" in text
        loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "ema", dtype=torch.float32)
    averaged = dict(callback.ema.averaged_parameters())
    found = {name: value for name, value in loaded.named_parameters() if name in averaged}
    assert found.keys() == averaged.keys() and all(torch.equal(found[name], averaged[name]) for name in found)


def test_no_answer_is_in_the_card(tmp_path):
    check = SafetyCheck(num_prompts=6, max_new_tokens=24, progress=False)
    sft_trainer(tmp_path, [quick_callback(check=check)], max_steps=2, eval_steps=2).train()
    text = (tmp_path / "ema" / "README.md").read_text()
    rows = [json.loads(line) for path in (tmp_path / "safety").iterdir() for line in path.open()]
    answers = {row["response"] for row in rows if len(row["response"]) > 15}
    assert answers and not [answer for answer in answers if answer in text]
    assert not [row["prompt"] for row in rows if row["prompt"] in text]


class Fading:
    """Refuses less with every set of answers, so that the first evaluation is the best."""

    name = "fading|judge"
    calls = 0

    def judge(self, prompts, responses):
        self.calls += 1
        return [Verdict("refusal" if i > self.calls - 3 else "compliance", "") for i in range(len(responses))]


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_with_the_best_model_the_table_is_of_its_step(tmp_path, peft_config):
    check = SafetyCheck(num_prompts=4, max_new_tokens=4, progress=False, judge=Fading(), benign=None)
    trainer = sft_trainer(
        tmp_path,
        [quick_callback(check=check)],
        peft_config=peft_config,
        max_steps=6,
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ema_refusal_rate",
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    card = ModelCard.load(tmp_path / "ema" / "README.md")
    table = table_of(card)
    assert {row["step"] for row in table.values()} == {"0", "2"}
    (report,) = [
        row for row in rows_of(tmp_path) if row["type"] == "report" and (row["step"], row["weights"]) == (2, "ema")
    ]
    assert table["EMA"]["ASR (95% interval)"] == percent(report["asr"], report["asr_interval"])
    assert table["EMA"]["over-refusal"] == "none judged" and "no harmless prompts were asked" in card.text
    assert "Updates: 2, the last one at step 2" in card.text
    assert "The row EMA is about the weights in this folder." in card.text
    assert "fading\\|judge" in card.text


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"check": None}, "Safety was not checked in this run"),
        (
            {"check": SafetyCheck(num_prompts=4, max_new_tokens=4, progress=False, judge=Broken())},
            "Every safety check of the run failed",
        ),
        ({"check_weights": "live"}, "The averaged weights in this folder were not checked"),
        ({"exclude_params": "*norm*"}, r"Averaged: \d+ of \d+ trained tensors"),
        ({"mode": "lookahead", "sync_steps": 2}, r"from the average every 2 steps \(lookahead\)"),
    ],
    ids=["no check", "failing check", "live only", "some parameters", "lookahead"],
)
def test_what_is_not_known_is_said(tmp_path, settings, sentence):
    sft_trainer(tmp_path, [quick_callback(**settings)], max_steps=2, eval_strategy="no").train()
    card = ModelCard.load(tmp_path / "ema" / "README.md")
    assert re.search(sentence, card.text)
    if settings.get("check", "") is None:
        assert "|" not in card.text and "%" in card.text  # no table, but the share of the base


def test_weights_that_were_not_checked_at_their_step(tmp_path, tiny):
    sft_trainer(tmp_path, [callback := quick_callback()], max_steps=4, eval_steps=2).train()
    rows = [row for row in rows_of(tmp_path) if row["step"] <= 2]
    write_card(tmp_path, rows, callback.ema, tiny[0], step=4)
    card = ModelCard.load(tmp_path / "README.md")
    assert "those of step 4, which were not checked" in card.text and table_of(card)["EMA"]["step"] == "2"


def test_a_card_that_cannot_be_made_only_warns(tmp_path, caplog, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_safe_ema.card.ModelCard.save", fail)
    trainer = sft_trainer(tmp_path, [quick_callback(check=None)], max_steps=2, eval_strategy="no")
    trainer.train()
    assert "ema is saved without a model card: OSError" in caplog.text
    assert not (tmp_path / "ema" / "README.md").exists()
    loaded = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "ema").named_parameters())
    assert all(torch.equal(loaded[name], parameter) for name, parameter in trainer.model.named_parameters())


class Named:
    """A model as far as a card looks at one, loaded from somewhere."""

    def __init__(self, name: str):
        self.config = type("Config", (), {"_name_or_path": name})()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    def named_parameters(self):
        return [("weight", self.weight)]


@pytest.mark.parametrize(
    ("name", "in_metadata", "shown"),
    [
        ("my-org/my_chat-model", "my-org/my_chat-model", "- Base model: my-org/my\\_chat-model\n"),
        ("/home/someone/models/a|b <x>", None, "- Base model: a\\|b \\<x\\>\n"),
        ("", None, "- Base model: unknown\n"),
    ],
)
def test_the_base_model_is_named_as_the_hub_takes_it(tmp_path, name, in_metadata, shown):
    model = Named(name)
    assert base_model_of(model) == (name or None)
    write_card(tmp_path, [], WeightEMA(model.named_parameters(), decay=0.0), model, step=0)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == in_metadata and shown in card.text


def test_escaping():
    assert escaped("a|b`c`*d*_e_[f](g)<h>\n# i ~j~ $k$ &amp; \\") == (
        "a\\|b\\`c\\`\\*d\\*\\_e\\_\\[f\\](g)\\<h\\> \\# i \\~j\\~ \\$k\\$ \\&amp; \\\\"
    )
    assert escaped(Path("x|y")) == "x\\|y"
