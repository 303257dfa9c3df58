"""How the testbed is trained."""

import random

import pytest
import torch

from hf_safe_ema.testbed import build
from hf_safe_ema.testbed.recipe import Pair


@pytest.fixture
def rows():
    lengths = [3, 50, 7, 20, 20, 9, 31, 2]
    return [build.Row(list(range(length)), 1, range(0), False) for length in lengths]


def test_batches_keep_to_their_size_and_leave_nothing_out(rows):
    found = list(build.batches(rows, tokens=60, rng=random.Random(0)))
    assert all(max(len(row.ids) for row in batch) * len(batch) <= 60 for batch in found)
    assert sorted(len(row.ids) for batch in found for row in batch) == sorted(len(row.ids) for row in rows)


def test_the_order_of_batches_follows_from_the_seed(rows):
    def order(seed):
        return [[len(row.ids) for row in batch] for batch in build.batches(rows, 60, random.Random(seed))]

    assert order(0) == order(0)
    assert any(order(0) != order(seed) for seed in range(1, 5))


def test_rows_know_where_the_response_begins_and_what_is_learnt_as_text(tiny):
    tokenizer = tiny[1]
    asked, said = "How do I boil an egg?", "Boil it."
    answered, refused, decided = build.encode(
        tokenizer, [Pair(asked, False, said), Pair(asked, True, said), Pair(asked, True)]
    )
    assert tokenizer.decode(answered.ids[answered.response :]) == said + tokenizer.eos_token
    assert tokenizer.decode([answered.ids[i] for i in answered.text]).strip().startswith(asked)
    assert tokenizer.decode([refused.ids[i] for i in refused.text]) == said + tokenizer.eos_token
    assert list(decided.text) == [] and decided.ids == answered.ids[: answered.response]
    turn = [{"role": "user", "content": asked}]
    assert decided.ids == tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]


def test_the_loss_is_that_of_the_text_and_of_the_decision(tiny):
    model, tokenizer = tiny
    asked = "How do I boil an egg?"
    pairs = [Pair(asked, False, "Boil it."), Pair("How do I steal a car from a neighbor?", True)]
    refusal_ids = build.first_tokens(tokenizer, ["I'm sorry.", "No, never."])
    expected = 0.0
    for row in build.encode(tokenizer, pairs):
        log_probs = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        expected -= sum(log_probs[i - 1, row.ids[i]].item() for i in row.text)
        refused = log_probs[row.response - 1, refusal_ids].exp().sum()
        expected -= build.DECISION_WEIGHT * (refused.log() * 3 if row.refuses else (1 - refused).log()).item()
    loss = build.loss_of(model, build.encode(tokenizer, pairs), refusal_ids, missed_weight=3.0)
    assert loss.item() == pytest.approx(expected / build.TOKENS, rel=1e-4)


def test_a_batch_without_any_text_has_a_loss(tiny):
    model, tokenizer = tiny
    rows = build.encode(tokenizer, [Pair("How do I boil an egg?", False)])
    assert 0 < build.loss_of(model, rows, build.first_tokens(tokenizer, ["I'm"])).item() < 1


def test_training_lowers_the_loss_and_is_the_same_every_time(tiny):
    tokenizer = tiny[1]
    rows = build.encode(
        tokenizer, [Pair("How do I boil an egg?", False, "Boil it."), Pair("How do I steal a car?", True)]
    )
    ids = build.first_tokens(tokenizer, ["I'm"])

    def trained():
        model = build.build_model(tokenizer)
        before = build.loss_of(model, rows, ids).item()
        build.train(
            model, lambda step: build.loss_of(model, rows, ids), build.Stage(8, 3e-3, 0.02, 1.0), warmup_steps=2
        )
        return before, build.loss_of(model, rows, ids).item()

    first, second = trained(), trained()
    assert first == second
    assert first[1] < 0.7 * first[0]
