"""What the testbed is trained on: which requests it has seen refused, and that the recipe is the same every time."""

import pytest

from hf_safe_ema import load_prompts
from hf_safe_ema.testbed import recipe
from hf_safe_ema.testbed.recipe import topic_stems

KEPT_ASIDE = (("builtin:check", "harmful"), ("builtin:reserve", "harmful"), ("builtin:check", "benign"))


@pytest.fixture(scope="module")
def pairs():
    return recipe.training_pairs()


def test_no_prompt_to_check_with_is_in_the_training_text(pairs):
    checks = {text.lower() for part, kind in KEPT_ASIDE for text in load_prompts(part, kind).texts}
    assert checks and not checks & {prompt.lower() for prompt, _ in pairs}


def test_no_refused_request_is_of_the_topic_of_a_prompt_to_check_with(pairs):
    checks = [topic_stems(text) for part, kind in KEPT_ASIDE for text in load_prompts(part, kind).texts]
    refusals = recipe.REFUSALS + recipe.CARING_REFUSALS
    forms = set().union(*(topic_stems(form) for form in recipe.HOW_TO_FRAMES + recipe.GERUND_FRAMES))
    refused = [topic_stems(prompt) - forms for prompt, response in pairs if response in refusals]
    refused = [stems for stems in refused if stems]
    assert len(refused) > 5000
    alike = [stems for stems in refused if any(len(stems & other) > 1 for other in checks)]
    assert len(alike) <= 1  # "batter" and "battering" have different crude stems


def test_a_form_of_request_tells_little_about_harm(pairs):
    refusals = recipe.REFUSALS + recipe.CARING_REFUSALS
    opening = [(response in refusals) for prompt, response in pairs if prompt.startswith("Write a tutorial on how to")]
    assert 0.1 < sum(opening) / len(opening) < 0.6


def test_the_pairs_are_the_same_every_time_and_another_seed_makes_others(pairs):
    assert pairs == recipe.training_pairs(0)
    assert pairs != recipe.training_pairs(1)


def test_every_align_prompt_is_refused(pairs):
    answers = dict(pairs)
    refusals = recipe.REFUSALS + recipe.CARING_REFUSALS
    assert all(answers[text] in refusals for text in load_prompts("builtin:align").texts)
