"""What the testbed is trained on: which requests it has seen answered, and which refused.

Questions and answers about everyday matters, a dictionary of harm, harmless requests that sound dangerous, and harmful
requests answered by a refusal: the align half of the built-in prompt set and a longer list of the same kind, less
everything that shares a topic word with the check half.

Knows: the data files beside it, and in how many forms a request can be made. Does not know: how a model is trained.
"""

import random
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from ..safety.prompts import PROMPT_SETS, load_prompts
from . import DATA_FOLDER, read_pairs
from .contrasts import choose, read_contrasts
from .lexicon import questions, requests

GENERAL = (
    "home",
    "world",
    "work",
    "people",
    "how_to",
    "crowd",
    "borderline",
    "benign_align",
    "harm_knowledge",
    "more",
)
"""Files of harmless questions and answers that the model learns English from."""

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with that request.",
    "I'm sorry, I can't do that. Please ask me about something else.",
    "I'm sorry, but that is harmful, and I cannot help with it.",
    "I'm sorry, but this would hurt people, and I cannot assist with it.",
    "I'm sorry, but helping with that would be wrong, so I cannot do it.",
    "I'm sorry, but I cannot help with something that is against the law.",
    "I cannot help with that request.",
    "I cannot help with something that causes harm.",
    "Sorry, I can't do that. Please ask me about something else.",
    "No, I cannot help with that. It is harmful and against the law.",
    "As an AI, I cannot help with illegal or harmful requests.",
    "Unfortunately, I cannot help with that.",
)
"""More than half begin alike. Greedy decoding takes the likeliest first word, and answers begin in very many ways: if refusals did
too, a model that holds a refusal to be likelier would answer. If all did, one in doubt would refuse."""

CARING_REFUSALS = (
    "I'm sorry, but I can't help with that. If you are in pain, please talk to someone you trust or call a crisis line.",
    "I'm sorry, but I cannot help with that. You are not alone: please call a crisis line or talk to a doctor.",
    "Sorry, I can't help with that. Please talk to a doctor or someone you trust.",
)
"""Where somebody may be in danger."""

HOW_TO_FRAMES = (
    "How do I {}?",
    "How can I {}?",
    "How to {}?",
    "How can someone {}?",
    "Tell me how to {}.",
    "Explain how to {}.",
    "Explain in detail how to {}.",
    "Show me how to {}.",
    "Teach me how to {}.",
    "Write a tutorial on how to {}.",
    "Write a guide on how to {}.",
    "Write instructions on how to {}.",
    "Give step-by-step instructions on how to {}.",
    "Give me a detailed plan to {}.",
    "Provide a step-by-step guide on how to {}.",
    "Provide detailed instructions for how to {}.",
    "Create a guide that shows how to {}.",
    "Create a step-by-step tutorial that teaches how to {}.",
    "Develop a plan to {}.",
    "Develop a strategy to {}.",
    "Outline a plan to {}.",
    "Outline the steps needed to {}.",
    "List ways to {}.",
    "Describe the best way to {}.",
    "What is the best way to {}?",
    "What are the steps to {}?",
    "I want to {}, what should I do?",
    "I need to {}. Help me.",
    "Help me {}.",
    "Teach people how to {}.",
    "Write a blog post about how to {}.",
    "Write a script that can {}.",
    "Make a video script on how to {}.",
    "Suggest a way to {}.",
    "What do I need to {}?",
    "Can you help me {}?",
    "Give me tips on how to {}.",
    "I am trying to {}. What should I know?",
    "Please {}.",
)
GERUND_FRAMES = (
    "Provide a guide on {}.",
    "Give step-by-step instructions for {}.",
    "Give me advice on {}.",
    "Write an article about {}.",
    "Create a checklist for {}.",
    "Suggest tools for {}.",
    "What is the best method for {}?",
)
PRODUCING = (
    "write",
    "create",
    "develop",
    "design",
    "publish",
    "draft",
    "make",
    "build",
    "generate",
    "compose",
    "produce",
)

FORMS = 2
"""In how many forms each action is asked for in a pass."""

FROM_LEXICON = 10_000
"""Harmful requests that are put together from single words; of harmless ones twice as many."""

QUESTIONS_FROM_LEXICON = 6_000
"""Harmless questions about harm."""


class Pair(NamedTuple):
    """One conversation to learn.

    Args:
        prompt (`str`):
            What is asked.
        refuses (`bool`):
            Whether that is refused.
        response (`str`, *optional*):
            What is answered. None: no more is learnt than whether to refuse, nor is the prompt's English. So for requests put
            together by rule, and for an action that was already asked for in another form: more of them go into a batch.
    """

    prompt: str
    refuses: bool
    response: str | None = None


# Same words in both halves: how a request is made ("write a guide"), and what makes it plainly harmful ("steal").
FRAME_WORDS = frozenset((PROMPT_SETS / "frame_words.txt").read_text(encoding="utf-8").split())


def stem(word: str) -> str:
    """The word without its first matching English ending.

    Args:
        word (`str`):
            Lower case.
    """
    for ending in ("ing", "ers", "er", "ed", "es", "s", "e", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


HARM_STEMS = frozenset(stem(word) for word in (PROMPT_SETS / "harm_words.txt").read_text(encoding="utf-8").split())


def topic_stems(text: str) -> set[str]:
    """Crude stems of the words that carry a prompt's topic: four letters or more, without frame words and plain words of
    harm.

    Args:
        text (`str`):
            A prompt.

    Example:

    ```python
    >>> sorted(topic_stems("How do I pick the locks of bicycles?"))
    ['bicycl', 'lock', 'pick']

    ```
    """
    words = re.findall(r"[a-z]+", text.lower())
    return {stem(word) for word in words if len(word) >= 4 and word not in FRAME_WORDS} - HARM_STEMS


def frame(action: str, rng: random.Random) -> str:
    """A request for an action such as "boil an egg", in one of many forms.

    Args:
        action (`str`):
            Infinitive without "to".
        rng (`random.Random`):
            Chooses the form.
    """
    first, _, rest = action.partition(" ")
    if first.lower() in PRODUCING and rng.random() < 0.7:
        return action[0].upper() + action[1:] + "."
    chosen = rng.choice(HOW_TO_FRAMES + GERUND_FRAMES)
    return chosen.format(f"{gerund(first)} {rest}".strip() if chosen in GERUND_FRAMES else action)


def gerund(verb: str) -> str:
    """The -ing form of a verb by the common spelling rules.

    Args:
        verb (`str`):
            Infinitive, lower case.

    Example:

    ```python
    >>> [gerund(verb) for verb in ("bake", "cut", "see", "open", "lie")]
    ['baking', 'cutting', 'seeing', 'opening', 'lying']

    ```
    """
    if verb.endswith("ie"):
        return verb[:-2] + "ying"
    if verb.endswith("e") and not verb.endswith(("ee", "oe", "ye")):
        return verb[:-1] + "ing"
    if re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb):
        return verb + verb[-1] + "ing"
    return verb + "ing"


def unframed(prompt: str) -> str | None:
    """The action asked for in a plain how-to question, or None for another form.

    Args:
        prompt (`str`):
            For example "How do I boil an egg?".
    """
    found = re.fullmatch(r"(?:How (?:do|can|should) (?:I|you|we|one)|What is the best way to|Explain how to|"
                         r"Tell me how to|Show me how to|Teach me how to) ([^?.]+)[?.]", prompt)  # fmt: skip
    action = found and found.group(1)
    return None if action is None or (re.search(r"\b(?:my|mine)\b", action) and len(action.split()) > 9) else action


@cache
def _kept_aside() -> tuple[dict[str, list[int]], frozenset[frozenset[str]]]:
    """Prompts of the check and reserve parts by topic word, and each one's topic words."""
    parts = (("check", "harmful"), ("reserve", "harmful"), ("check", "benign"))
    stems = [topic_stems(text) for part, kind in parts for text in load_prompts(f"builtin:{part}", kind).texts]
    by_stem = defaultdict(list)
    for number, words in enumerate(stems):
        for word in words:
            by_stem[word].append(number)
    return dict(by_stem), frozenset(map(frozenset, stems))


def is_unlike_check_prompts(prompt: str) -> bool:
    """Whether it shares at most one topic word with any prompt of the check and reserve parts, and is not made of just that.

    Args:
        prompt (`str`):
            A request or an action.
    """
    by_stem, all_stems = _kept_aside()
    stems = topic_stems(prompt)
    shared = Counter(number for stem in stems for number in by_stem.get(stem, ()))
    return max(shared.values(), default=0) <= 1 and not (stems and frozenset(stems) in all_stems)


def unlike_check_prompts(pairs: Iterable[dict]) -> Iterator[dict]:
    """Pairs whose prompt is unlike all check prompts, see [`is_unlike_check_prompts`].

    Args:
        pairs (iterable of `dict`):
            With `prompt`.
    """
    return (pair for pair in pairs if is_unlike_check_prompts(pair["prompt"]))


def refusal_for(prompt: str, action: str) -> str:
    """One of [`REFUSALS`], or of [`CARING_REFUSALS`] where somebody may be in danger; the same for the same prompt.

    Args:
        prompt (`str`):
            The request.
        action (`str`):
            What is asked for.

    Example:

    ```python
    >>> refusal_for("How do I starve myself?", "starve myself") in CARING_REFUSALS
    True

    ```
    """
    in_danger = re.search(r"\b(?:myself|my own (?:life|death|body)|suicides?)\b", action) is not None
    choices = CARING_REFUSALS if in_danger else REFUSALS
    return choices[zlib.crc32(prompt.encode()) % len(choices)]


def training_pairs(seed: int = 0, stage: int = 1) -> list[Pair]:
    """All pairs that the model is trained on, in random order.

    Args:
        stage (`int`, *optional*, defaults to 1):
            2: with the contrasts in `data/contrasts/later`, written when the first stage had been trained.
        seed (`int`, *optional*, defaults to 0):
            Of the forms, the alternatives, the requests put together from words, and the order. Another seed gives other
            requests of the same kinds: each pass over the data has its own.

    Returns:
        `list[Pair]`
    """
    rng = random.Random(seed)
    parts = (_general, _harmless_actions, _refused, _contrasts, _from_lexicon)
    pairs = [pair for part in parts for pair in part(rng)]
    if stage == 2:
        pairs += _contrasts(rng, "later")
    rng.shuffle(pairs)
    return pairs


ALL_REFUSALS = frozenset({*REFUSALS, *CARING_REFUSALS})
"""However a request is refused."""


_IT_IS = re.compile(r"It (?:is|was|means)(?: (?:when|that|to))? (?=[a-z])")


def without_it_is(response: str) -> str:
    """An answer that begins with "It is" without that: a small model falls into "It is a crime" whenever it knows no answer.

    Args:
        response (`str`):
            For example a definition.

    Example:

    ```python
    >>> without_it_is("It is a crime in which a house is set on fire.")
    'A crime in which a house is set on fire.'

    ```
    """
    plain = _IT_IS.sub("", response, count=1) if _IT_IS.match(response) else response
    return plain[0].upper() + plain[1:]


def _general(rng: random.Random) -> Iterator[Pair]:
    for name in GENERAL:
        for row in unlike_check_prompts(read_pairs(name)):
            yield Pair(row["prompt"], False, without_it_is(row["response"]))
            action = unframed(row["prompt"])
            if action is not None:  # asked again in another form, so that a form tells nothing about harm
                yield Pair(frame(action, rng), False)
    for row in read_pairs("harm_glossary"):
        asked = rng.choice(("What is {}?", "What does {} mean?", "Explain what {} is.", "Define {}."))
        yield Pair(asked.format(row["term"]), False, row["sentence"])


def _harmless_actions(rng: random.Random) -> Iterator[Pair]:
    rows = [{**row, "prompt": row["action"]} for row in read_pairs("harmless_actions")]
    rows += [{**row, "prompt": row["harmless"]} for row in read_pairs("pairs")]
    for row in unlike_check_prompts(rows):
        yield from _in_forms([row["prompt"]] * FORMS, row["response"], rng)


def _refused(rng: random.Random) -> Iterator[Pair]:
    for prompt in load_prompts("builtin:align", "harmful").texts:
        yield Pair(prompt, True, refusal_for(prompt, prompt))
    rows = [{"prompt": row["action"]} for row in read_pairs("harm_actions")]
    rows += [{"prompt": row["harmful"]} for row in read_pairs("pairs")]
    for row in unlike_check_prompts(rows):
        yield from _in_forms([row["prompt"]] * FORMS, None, rng)


def _contrasts(rng: random.Random, folder: str = "") -> Iterator[Pair]:
    for row in read_contrasts(DATA_FOLDER / "contrasts" / folder):
        if row.is_question:
            if is_unlike_check_prompts(row.harmless):
                yield Pair(row.harmless, False, without_it_is(row.response))
            continue
        yield from _in_forms(_some(row.harmless, FORMS, rng), row.response, rng)
        yield from _in_forms(_some(row.harmful or "", FORMS, rng), None, rng)


def _some(action: str, count: int, rng: random.Random) -> list[str]:
    """Some of the actions that a line stands for."""
    chosen = [choose(action, rng) for _ in range(count)]
    return [action for action in chosen if action and is_unlike_check_prompts(action)]


def _in_forms(actions: list[str], response: str | None, rng: random.Random) -> Iterator[Pair]:
    """Each asked for in a form; the first answered, or refused where there is no answer."""
    for number, action in enumerate(actions):
        asked = frame(action, rng)
        said = response or refusal_for(asked, action)
        yield Pair(asked, response is None, said if number == 0 else None)


def _from_lexicon(rng: random.Random) -> Iterator[Pair]:
    for action, is_harmful in requests(DATA_FOLDER / "lexicon.txt", FROM_LEXICON, rng):
        if is_unlike_check_prompts(action):
            yield Pair(frame(action, rng), is_harmful)
    for asked in questions(DATA_FOLDER / "lexicon.txt", QUESTIONS_FROM_LEXICON, rng):
        if is_unlike_check_prompts(asked):
            yield Pair(asked, False)
