"""Held-out loss: the number that Trainer.evaluate gives, at no cost to the run."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from hf_safe_ema import testbed
from hf_safe_ema.utility import heldout_loss

PAIRS = testbed.read_pairs("finetune")[:10]


def rows(tokenizer) -> list[dict]:
    found = [tokenizer(f"{pair['prompt']} {pair['response']}").input_ids[:64] for pair in PAIRS]
    return [{"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": tokens} for tokens in found]


def loader(tokenizer, batch_size: int = 4) -> DataLoader:
    return DataLoader(rows(tokenizer), batch_size=batch_size, collate_fn=DataCollatorForSeq2Seq(tokenizer))


def random_state() -> tuple:
    name, keys, *rest = np.random.get_state()
    return random.getstate(), (name, keys.tolist(), rest), torch.get_rng_state().tolist()


def test_each_batch_counts_by_its_size(tiny):
    model, tokenizer = tiny
    with torch.no_grad():
        losses = [(model(**batch).loss.item(), len(batch["labels"])) for batch in loader(tokenizer)]
    assert [size for _, size in losses] == [4, 4, 2]
    expected = sum(loss * size for loss, size in losses) / 10
    assert heldout_loss(model, loader(tokenizer)) == pytest.approx(expected, rel=1e-6)


def test_it_is_the_loss_that_the_trainer_reports(tiny, tmp_path):
    model, tokenizer = tiny
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=4, report_to="none", use_cpu=True,
                             disable_tqdm=True)  # fmt: skip
    trainer = Trainer(model, args, data_collator=DataCollatorForSeq2Seq(tokenizer), eval_dataset=rows(tokenizer))
    loss = heldout_loss(model, trainer.get_eval_dataloader())
    assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


def test_it_is_measured_without_dropout_and_leaves_the_run_alone(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    expected = heldout_loss(model, loader(tokenizer))
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train().model.layers[0].eval()
    model.config.use_cache = False
    modes, numbers = [module.training for module in model.modules()], random_state()
    shuffled = DataLoader(rows(tokenizer), 10, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
    assert heldout_loss(model, loader(tokenizer)) == expected
    assert heldout_loss(model, shuffled) == pytest.approx(heldout_loss(model, loader(tokenizer, 10)), rel=1e-5)
    assert [module.training for module in model.modules()] == modes
    assert random_state() == numbers
    assert model.config.use_cache is False
    assert all(parameter.grad is None for parameter in model.parameters())


def test_state_is_put_back_when_a_batch_fails(tiny):
    model, tokenizer = copy.deepcopy(tiny[0]).train(), tiny[1]

    def batches():
        yield from loader(tokenizer)
        torch.rand(1)
        raise OSError("the data is gone")

    numbers = random_state()
    with pytest.raises(OSError, match="the data is gone"):
        heldout_loss(model, batches())
    assert model.training and random_state() == numbers


def test_without_labels_there_is_no_loss(tiny):
    model, tokenizer = tiny
    preferences = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in loader(tokenizer)]
    assert heldout_loss(model, preferences) is None
    assert heldout_loss(model, []) is None


class NoLoss(nn.Module):
    """A model that gives logits only, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, labels):
        return CausalLMOutput(logits=self.layer(labels))


def test_a_model_without_loss_has_none():
    assert heldout_loss(NoLoss(), [{"labels": torch.ones(2, 1)}]) is None
