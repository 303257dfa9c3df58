"""How the testbed is trained."""

from hf_safe_ema.testbed import build


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
