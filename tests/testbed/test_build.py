"""How the testbed is trained."""

import random

import pytest

from hf_safe_ema.testbed import build
from hf_safe_ema.testbed.recipe import Pair


@pytest.fixture
def rows():
    lengths = [3, 50, 7, 20, 20, 9, 31, 2]
    return [build.Row(list(range(length)), 1, 2, True) for length in lengths]


def test_batches_keep_to_their_size_and_leave_nothing_out(rows):
    found = list(build.batches(rows, tokens=60, rng=random.Random(0)))
    assert all(max(len(row.ids) for row in batch) * len(batch) <= 60 for batch in found)
    assert sorted(len(row.ids) for batch in found for row in batch) == sorted(len(row.ids) for row in rows)


def test_the_order_of_batches_follows_from_the_seed(rows):
    def order(seed):
        return [[len(row.ids) for row in batch] for batch in build.batches(rows, 60, random.Random(seed))]

    assert order(0) == order(0)
    assert any(order(0) != order(seed) for seed in range(1, 5))


def test_rows_know_where_prompt_and_response_begin(tiny):
    tokenizer = tiny[1]
    whole, open_ended = build.encode(
        tokenizer,
        [Pair("How do I boil an egg?", "Boil it."), Pair("How do I boil an egg?", "Boil", False, False)],
    )
    assert tokenizer.decode(whole.ids[whole.prompt :]).startswith("How do I boil an egg?")
    assert tokenizer.decode(whole.ids[whole.response :]) == "Boil it." + tokenizer.eos_token
    assert tokenizer.decode(open_ended.ids[open_ended.response :]) == "Boil"
    assert (whole.learns_prompt, open_ended.learns_prompt) == (True, False)


def test_only_what_is_to_be_learnt_is_in_the_loss(tiny):
    model, tokenizer = tiny
    pair = Pair("How do I boil an egg?", "Boil")
    (row,) = build.encode(tokenizer, [pair])
    (masked,) = build.encode(tokenizer, [pair._replace(learns_prompt=False)])
    other = build.Row(
        [*masked.ids[: masked.prompt], 700, *masked.ids[masked.prompt + 1 :]], masked.prompt, masked.response, False
    )
    assert build.weighted_loss(model, [row]) != build.weighted_loss(model, [masked])
    logits = model(input_ids=build_ids(masked)).logits[0, masked.response - 1]
    expected = -logits.log_softmax(-1)[masked.ids[masked.response]]
    first = build.weighted_loss(
        model, [build.Row(masked.ids[: masked.response + 1], masked.prompt, masked.response, False)]
    )
    assert first.item() == pytest.approx(expected.item(), rel=1e-4)
    assert build.weighted_loss(model, [other]) != build.weighted_loss(model, [masked])  # it is read, though not learnt


def build_ids(row):
    import torch

    return torch.tensor([row.ids])
