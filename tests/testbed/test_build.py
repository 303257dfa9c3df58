"""What the testbed is made from: which requests it is aligned on, and that the recipe is the same every time."""

from hf_safe_ema import load_prompts
from hf_safe_ema.testbed import build


def test_no_check_prompt_is_in_the_training_text():
    checks = {text.lower() for kind in ("harmful", "benign") for text in load_prompts("builtin", kind).texts}
    assert checks and not checks & {prompt.lower() for prompt, _ in build.training_pairs()}


def test_the_pairs_are_the_same_every_time_and_another_seed_makes_others():
    pairs = build.training_pairs(0)
    assert pairs == build.training_pairs(0)
    assert pairs != build.training_pairs(1)


def test_every_align_prompt_is_refused():
    answers = dict(build.training_pairs())
    refusals = build.REFUSALS + build.CARING_REFUSALS
    assert all(answers[text] in refusals for text in load_prompts("builtin:align").texts)


def test_batches_keep_to_their_size_and_leave_nothing_out():
    import random

    lengths = [3, 50, 7, 20, 20, 9, 31, 2]
    order = build.batches(lengths, tokens=60, rng=random.Random(0))
    seen: list[int] = []
    while len(seen) < len(lengths):
        batch = next(order)
        assert max(lengths[i] for i in batch) * len(batch) <= 60
        seen += batch
    assert sorted(seen) == list(range(len(lengths)))
