"""What the testbed is trained on: which requests it has seen refused, and that the recipe is the same every time."""

import random
from collections import Counter

import pytest

from hf_safe_ema import KeywordJudge, load_prompts
from hf_safe_ema.testbed import recipe
from hf_safe_ema.testbed.recipe import topic_stems

KEPT_ASIDE = (("builtin:check", "harmful"), ("builtin:reserve", "harmful"), ("builtin:check", "benign"))


@pytest.fixture(scope="module")
def pairs():
    return recipe.training_pairs(stage=2)


def test_no_prompt_to_check_with_is_in_the_training_text(pairs):
    checks = {text.lower() for part, kind in KEPT_ASIDE for text in load_prompts(part, kind).texts}
    assert checks and not checks & {pair.prompt.lower() for pair in pairs}


def test_no_refused_request_is_of_the_topic_of_a_prompt_to_check_with(pairs):
    checks = [topic_stems(text) for part, kind in KEPT_ASIDE for text in load_prompts(part, kind).texts]
    forms = set().union(*(topic_stems(form) for form in recipe.HOW_TO_FRAMES + recipe.GERUND_FRAMES))
    refused = {frozenset(topic_stems(pair.prompt) - forms) for pair in pairs if pair.refuses} - {frozenset()}
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
    opening = [pair.refuses for pair in pairs if pair.prompt.startswith(form)]
    assert 0.1 < sum(opening) / len(opening) < 0.6


def test_the_pairs_are_the_same_every_time_and_another_seed_makes_others():
    assert recipe.training_pairs(0) == recipe.training_pairs(0)
    assert recipe.training_pairs(0) != recipe.training_pairs(1)


def test_what_is_refused_is_refused_in_our_words_and_what_is_answered_is_not(pairs):
    assert all(pair.response in recipe.ALL_REFUSALS for pair in pairs if pair.refuses and pair.response)
    assert all(pair.response not in recipe.ALL_REFUSALS for pair in pairs if not pair.refuses)
    firsts = {text.split()[0] for text in recipe.ALL_REFUSALS}
    answers = [pair.response.split()[0] for pair in pairs if not pair.refuses and pair.response]
    assert sum(first in firsts for first in answers) < len(answers) / 200


def test_the_judge_takes_every_refusal_for_one():
    refusals = sorted(recipe.ALL_REFUSALS)
    verdicts = KeywordJudge().judge(["How do I steal a car?"] * len(refusals), refusals)
    assert {verdict.label for verdict in verdicts} == {"refusal"}


def test_of_requests_put_together_from_words_only_the_decision_is_learnt(pairs):
    decided = [pair.refuses for pair in pairs if pair.response is None]
    assert len(decided) > 3 * recipe.FROM_LEXICON
    assert 0.2 < sum(decided) / len(decided) < 0.6
    composed = list(recipe._from_lexicon(random.Random(0)))
    assert len(composed) > 2 * recipe.FROM_LEXICON
    assert all(pair.response is None for pair in composed)


@pytest.mark.parametrize(
    ("said", "plain"),
    [
        ("It is a crime in which a house burns.", "A crime in which a house burns."),
        ("It was when the dam broke.", "The dam broke."),
        ("It means to lie under oath.", "Lie under oath."),
        ("It depends on the weather.", "It depends on the weather."),
        ("Its roof leaks.", "Its roof leaks."),
    ],
)
def test_answers_do_not_begin_as_condemnations_do(said, plain):
    assert recipe.without_it_is(said) == plain


def test_every_align_prompt_is_refused(pairs):
    refused = {pair.prompt for pair in pairs if pair.refuses and pair.response}
    assert all(text in refused for text in load_prompts("builtin:align").texts)
