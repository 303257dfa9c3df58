"""A check shared out: alone it is the check itself; dealt to many, the answers are put together as they were."""

import contextlib

import pytest

from hf_safe_ema import SafetyCheck
from hf_safe_ema.safety.sharing import _in_order, run_on_every_rank


def quick_check(**changes) -> SafetyCheck:
    return SafetyCheck(**{"num_prompts": 5, "max_new_tokens": 4, "progress": False, **changes})


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_what_is_dealt_out_comes_together_as_one_process_has_it(tiny, size):
    check = quick_check(batch_size=1)  # an answer does not depend on which prompts stand beside it
    parts = [check.ask(*tiny, share=(rank, size)) for rank in range(size)]
    together = {kind: _in_order([part[kind] for part in parts]) for kind in ("harmful", "benign")}
    assert together == check.ask(*tiny)
    assert check.report(tiny[1], together, "ema", 3) == check.run(*tiny, "ema", 3)


@pytest.mark.parametrize("count", range(8))
@pytest.mark.parametrize("size", [1, 3, 7])
def test_nothing_is_lost_or_moved_in_dealing(count, size):
    dealt = [str(number) for number in range(count)]
    assert _in_order([dealt[rank::size] for rank in range(size)]) == dealt


def test_the_report_says_of_which_weights_and_when(tiny):
    report = run_on_every_rank(quick_check(benign=None), *tiny, weights="live", step=12)
    assert (report.weights, report.step, report.benign_set) == ("live", 12, None)


class Within:
    """A context that counts who has entered it and not left."""

    def __init__(self):
        self.entered, self.inside = 0, 0

    @contextlib.contextmanager
    def __call__(self):
        self.entered, self.inside = self.entered + 1, self.inside + 1
        try:
            yield
        finally:
            self.inside -= 1


class OwnCheck:
    """No SafetyCheck: it is run whole, within the context."""

    def __init__(self, within, error=None):
        self.within, self.error = within, error

    def run(self, model, tokenizer, weights="model", step=None):
        assert self.within.inside == 1
        if self.error is not None:
            raise self.error
        return weights, step


def test_a_check_of_ones_own_is_asked_within_the_context(tiny):
    within = Within()
    assert run_on_every_rank(OwnCheck(within), *tiny, "ema", 4, within) == ("ema", 4)
    assert (within.entered, within.inside) == (1, 0)


@pytest.mark.parametrize("error", [ConnectionError("down"), KeyboardInterrupt()])
def test_the_context_is_left_whatever_happens(tiny, error):
    within = Within()
    with pytest.raises(type(error)):
        run_on_every_rank(OwnCheck(within, error), *tiny, within=within)
    assert (within.entered, within.inside) == (1, 0)
