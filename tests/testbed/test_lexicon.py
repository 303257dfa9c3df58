"""Requests put together from words."""

import random
import re

import pytest

from hf_safe_ema.testbed import DATA_FOLDER
from hf_safe_ema.testbed.lexicon import HARMFUL, HARMLESS, QUESTIONS, questions, read_lexicon, requests, with_article

LEXICON = DATA_FOLDER / "lexicon.txt"


def test_every_role_of_every_shape_has_words_and_every_word_list_is_used():
    sections = read_lexicon(LEXICON)
    used = set(re.findall(r"\{(?:a )?(\w+)\}", " ".join(HARMFUL + HARMLESS + QUESTIONS)))
    assert used == set(sections["role"])
    assert set(sections["do"]) == set(sections["with"])
    assert all(words for section in sections.values() for words in section.values())


def test_each_harmful_shape_has_a_harmless_one():
    assert len(HARMFUL) == len(HARMLESS)


def test_two_harmless_requests_to_each_harmful_one():
    found = list(requests(LEXICON, 500, random.Random(0)))
    assert [harmful for _, harmful in found[:3]] == [True, False, False]
    assert sum(harmful for _, harmful in found) == 500
    assert not any("{" in action or "  " in action for action, _ in found)


def test_requests_follow_from_the_seed():
    assert list(requests(LEXICON, 50, random.Random(1))) == list(requests(LEXICON, 50, random.Random(1)))
    assert list(questions(LEXICON, 50, random.Random(1))) != list(questions(LEXICON, 50, random.Random(2)))


@pytest.mark.parametrize(
    ("noun", "expected"),
    [("cat", "a cat"), ("owl", "an owl"), ("unicorn", "a unicorn"), ("umbrella", "an umbrella"), ("heir", "an heir"),
     ("glasses", "glasses"), ("bus", "a bus"), ("mess", "a mess"), ("bread", "bread"), ("poisoned cake", "a poisoned cake")],
)  # fmt: skip
def test_articles(noun, expected):
    assert with_article(noun) == expected
