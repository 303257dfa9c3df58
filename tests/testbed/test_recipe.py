"""What the testbed is trained on: which requests it has seen refused, and that the recipe is the same every time."""

from collections import Counter

import pytest

from hf_safe_ema import load_prompts
from hf_safe_ema.testbed import recipe
from hf_safe_ema.testbed.recipe import topic_stems

KEPT_ASIDE = (("builtin:check", "harmful"), ("builtin:reserve", "harmful"), ("builtin:check", "benign"))


REFUSALS = recipe.REFUSALS + recipe.CARING_REFUSALS


@pytest.fixture(scope="module", params=[1, 2], ids=["first stage", "second stage"])
def pairs(request):
    return recipe.training_pairs(stage=request.param)


def test_no_prompt_to_check_with_is_in_the_training_text(pairs):
    checks = {text.lower() for part, kind in KEPT_ASIDE for text in load_prompts(part, kind).texts}
    assert checks and not checks & {pair.prompt.lower() for pair in pairs}


def test_no_refused_request_is_of_the_topic_of_a_prompt_to_check_with(pairs):
    checks = [topic_stems(text) for part, kind in KEPT_ASIDE for text in load_prompts(part, kind).texts]
    forms = set().union(*(topic_stems(form) for form in recipe.HOW_TO_FRAMES + recipe.GERUND_FRAMES))
    refused = {frozenset(topic_stems(pair.prompt) - forms) for pair in pairs if pair.response in REFUSALS} - {
        frozenset()
    }
    assert len(refused) > 5000
    by_stem = {}
    for number, stems in enumerate(checks):
        for stem in stems:
            by_stem.setdefault(stem, set()).add(number)
    alike = []
    for stems in refused:
        shared = Counter(number for stem in stems for number in by_stem.get(stem, ()))
        alike += [stems] if max(shared.values(), default=0) > 1 else []
    assert len(alike) <= len(refused) / 1000, alike  # a gerund may have another crude stem: "batter" and "battering"


def test_a_form_of_request_tells_little_about_harm(pairs):
    form = "Write a tutorial on how to"
    opening = [pair.response in REFUSALS for pair in pairs if pair.prompt.startswith(form)]
    assert 0.1 < sum(opening) / len(opening) < 0.6


def test_the_pairs_are_the_same_every_time_and_another_seed_makes_others():
    assert recipe.training_pairs(0) == recipe.training_pairs(0)
    assert recipe.training_pairs(0) != recipe.training_pairs(1)


def test_the_second_stage_has_all_that_the_first_has_and_more():
    first, second = recipe.training_pairs(0, stage=1), recipe.training_pairs(0, stage=2)
    assert len(second) > len(first) + 10_000
    assert not Counter(first) - Counter(second)


def test_requests_put_together_from_words_are_not_imitated(pairs):
    composed = [pair for pair in pairs if not pair.learns_prompt]
    assert len(composed) > 20_000
    assert all(pair.response in REFUSALS or not pair.complete for pair in composed)
    assert all(pair.learns_prompt for pair in pairs if pair.complete and pair.response not in REFUSALS)


def test_every_align_prompt_is_refused(pairs):
    answers = {pair.prompt: pair.response for pair in pairs}
    assert all(answers[text] in REFUSALS for text in load_prompts("builtin:align").texts)
