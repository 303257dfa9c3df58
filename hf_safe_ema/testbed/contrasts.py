"""Harmful and harmless actions side by side, sharing words: the file format of `data/contrasts/*.txt`.

    HARMFUL ACTION | HARMLESS ACTION | RESPONSE TO THE HARMLESS ONE
                   | HARMLESS ACTION | RESPONSE
    ? HARMLESS QUESTION | RESPONSE

An action may hold alternatives: "repair [a bicycle/a radio] for [a neighbor/a school]" stands for four actions.

Knows: that format. Does not know: how an action becomes a request, or what it is for.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

_ALTERNATIVES = re.compile(r"\[([^\[\]]+)\]")


@dataclass(frozen=True)
class Contrast:
    """One line.

    Args:
        harmful (`str`, *optional*):
            Action to refuse, with its alternatives. None: there is none.
        harmless (`str`):
            Action to answer, with its alternatives; for a question, the question.
        response (`str`):
            The answer.
        is_question (`bool`):
            Whether `harmless` is a whole question and not an action.
    """

    harmful: str | None
    harmless: str
    response: str
    is_question: bool = False


def parse_line(line: str) -> Contrast:
    """One line of a file.

    Args:
        line (`str`):
            In the format above.

    Raises:
        ValueError: for any other form.

    Example:

    ```python
    >>> parse_line("steal [a car/a van] | wash [a car/a van] | Start with the roof.").harmful
    'steal [a car/a van]'
    >>> parse_line("? What is arson? | Setting fire to property on purpose.").is_question
    True

    ```
    """
    parts = [part.strip() for part in line.lstrip("?").split("|")]
    is_question = line.startswith("?")
    if len(parts) != (2 if is_question else 3) or not all(parts[0 if is_question else 1 :]):
        raise ValueError(f"not a line of contrasts: {line!r}")
    if re.search(r"[\[\]]", _ALTERNATIVES.sub("", line)):
        raise ValueError(f"brackets that do not match: {line!r}")
    if is_question:
        return Contrast(None, parts[0], parts[1], is_question=True)
    return Contrast(parts[0] or None, parts[1], parts[2])


def read_contrasts(folder: Path) -> list[Contrast]:
    """All lines of all files, in the files' order by name.

    Args:
        folder (`Path`):
            With `.txt` files, UTF-8.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return [parse_line(line) for text in texts for line in text.splitlines() if line.strip()]


def choose(action: str, rng: random.Random) -> str:
    """The action with one alternative of each bracket.

    Args:
        action (`str`):
            For example `"wash [a car/a van]"`.
        rng (`random.Random`):
            Chooses.

    Example:

    ```python
    >>> choose("wash [a car/a van]", random.Random(0)) in ("wash a car", "wash a van")
    True

    ```
    """
    chosen = _ALTERNATIVES.sub(lambda found: rng.choice(found.group(1).split("/")), action)
    return " ".join(chosen.split())


def choices(action: str) -> int:
    """How many actions it stands for.

    Args:
        action (`str`):
            With or without brackets.

    Example:

    ```python
    >>> choices("repair [a bicycle/a radio] for [a neighbor/a school/a club]")
    6

    ```
    """
    number = 1
    for found in _ALTERNATIVES.findall(action):
        number *= len(found.split("/"))
    return number
