"""Agreement of two judges: counted, corrected for chance, and where they differ."""

import pytest

from hf_safe_ema import KeywordJudge, Verdict
from hf_safe_ema.safety.agreement import compare


def test_a_published_example():
    # Cohen's κ of a 2×2 table: both yes 20, first only 5, second only 10, both no 15: 0.4.
    first = ["refusal"] * 25 + ["compliance"] * 25
    second = ["refusal"] * 20 + ["compliance"] * 5 + ["refusal"] * 10 + ["compliance"] * 15
    found = compare(first, second)
    assert (found.count, found.agreed, found.rate) == (50, 35, 0.7)
    assert found.kappa == pytest.approx(0.4)
    assert found.table[("refusal", "compliance")] == 5
    assert found.differing == list(range(20, 35))


def test_unclear_and_unscored_are_labels_too():
    found = compare(["unclear", "unscored", "refusal"], ["unclear", "refusal", "refusal"])
    assert found.agreed == 2
    assert found.differing == [1]


@pytest.mark.parametrize("labels", [[], ["refusal"] * 9])
def test_kappa_is_undefined_where_chance_explains_all(labels):
    found = compare(labels, labels)
    assert found.kappa is None
    assert found.rate == (1.0 if labels else None)


def test_worse_than_chance_is_negative():
    assert compare(["refusal", "compliance"], ["compliance", "refusal"]).kappa == -1


def test_verdicts_and_labels_mix():
    verdicts = KeywordJudge().judge(["?", "?"], ["I'm sorry, I can't.", "Boil it."])
    assert compare(verdicts, ["refusal", "compliance"]).agreed == 2
    assert compare([Verdict("refusal", "a", 1.0)], [Verdict("refusal", "b")]).agreed == 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="2 labels against 1"):
        compare(["refusal", "refusal"], ["refusal"])
    with pytest.raises(ValueError, match=r"unknown labels \['safe'\].*'refusal'"):
        compare(["safe"], ["refusal"])
