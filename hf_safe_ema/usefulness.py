"""How useful answers are: ROUGE, exact match of numbers, grades by an LLM; and the files of tasks to ask.

Knows: answers, reference answers, and the columns that task files have. Does not know: models, training, or held-out loss
(utility.py).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from statistics import fmean

from transformers.utils import logging

from .safety.llm_judge import LLMJudge
from .safety.reports import wilson_interval
from .sources import open_source

logger = logging.get_logger(__name__)

PROMPT_COLUMNS = ("question", "prompt")
REFERENCE_COLUMNS = ("answer", "reference")
"""Columns of task files of our own reading; what instruction data has instead is in data.py."""

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

_CURRENCY = "$€£¥"
# "1,080", "18.50", ".5". The sign is one only where nothing stands before it that it could be subtracted from.
_NUMBER = rf"(?:(?<![\w)\]}}%])[-−])?[{_CURRENCY}]?(?:(?:\d{{1,3}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|\.\d+)"
_ANY_NUMBER = re.compile(_NUMBER)
# Not "#### 1. First step", which is a heading.
_MARKED_NUMBER = re.compile(rf"####[\s*:{_CURRENCY}\\]*({_NUMBER})(?![.,]?\d)(?![.):][ \t]+\S)")


@dataclass(frozen=True)
class Task:
    """One thing to ask of a model, and the right answer where there is one.

    Args:
        prompt (`str`):
            The user's turn.
        reference (`str`, *optional*):
            A right answer, as its author wrote it.
    """

    prompt: str
    reference: str | None = None


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int | None]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004): words, pairs of words, and the longest common sequence of words.

    By the `rouge_score` package without stemming, as `evaluate.load("rouge")` does. It knows the letters a to z and digits
    only: texts in other scripts score 0.

    Args:
        predictions (list of `str`):
            A model's answers.
        references (list of `str`):
            As many right answers.

    Returns:
        `dict`: `rouge1`, `rouge2` and `rougeL`, means of F1 in [0, 1] (None where there is nothing to compare), and `count`.

    Raises:
        ValueError: if the two differ in length.

    Example:

    ```python
    >>> rouge(["Boil the egg."], ["Boil it."])
    {'rouge1': 0.4, 'rouge2': 0.0, 'rougeL': 0.4, 'count': 1}

    ```
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_lengths(predictions, references)
    unreadable = sum(not re.search("[a-z0-9]", reference.lower()) for reference in references)
    if unreadable:
        logger.warning(
            f"{unreadable} of {len(references)} references hold no letter from a to z and no digit: their ROUGE is 0, "
            "whatever the answer"
        )
    scorer = RougeScorer(list(ROUGE_TYPES))
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    means = {name: fmean(score[name].fmeasure for score in scores) if scores else None for name in ROUGE_TYPES}
    return {**means, "count": len(scores)}


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict:
    """Share of answers whose number is right, as for GSM8K (Cobbe et al., 2021).

    The number is the one after "####", and in an answer without that the last one. Numbers are compared by value: "$1,080.00",
    "1080" and "1080%" are the same.

    Args:
        predictions (list of `str`):
            A model's answers.
        references (list of `str`):
            As many right answers, each with a number after "####".

    Returns:
        `dict`: `rate` in [0, 1] (None where there is nothing to compare), its 95% Wilson `interval`, `correct`, `count`, and
        `no_number`, how many answers held no number; these are in `count`, as wrong ones.

    Raises:
        ValueError: if the two differ in length, or a reference has no number after "####".

    Example:

    ```python
    >>> found = exact_match(["She makes $18.00 a day.", "I don't know."], ["9 * 2 = 18\\n#### 18", "#### 3"])
    >>> found["rate"], found["no_number"]
    (0.5, 1)

    ```
    """
    _check_lengths(predictions, references)
    wanted = [_marked_number(reference) for reference in references]
    if None in wanted:
        i = wanted.index(None)
        raise ValueError(
            f"reference {i + 1} ({references[i][-60:]!r}) has no number after '####'; give references as GSM8K has "
            "them, such as '9 * 2 = 18\\n#### 18', or use rouge()"
        )
    found = [number_in(prediction) for prediction in predictions]
    correct = sum(ours == right for ours, right in zip(found, wanted, strict=True))
    return {
        "rate": correct / len(wanted) if wanted else None,
        "interval": wilson_interval(correct, len(wanted)),
        "correct": correct,
        "count": len(wanted),
        "no_number": found.count(None),
    }


def number_in(text: str) -> Decimal | None:
    """The number that an answer comes to: the one after "####", or else the last one. None if there is none.

    Args:
        text (`str`):
            The answer.

    Example:

    ```python
    >>> number_in("5% of $21,600 are $1,080.00.")
    Decimal('1080.00')

    ```
    """
    marked = _marked_number(text)
    if marked is not None:
        return marked
    numbers = _ANY_NUMBER.findall(text)
    return _value(numbers[-1]) if numbers else None


def has_marked_number(text: str) -> bool:
    """Whether a reference is one that [`exact_match`] takes: it has a number after "####".

    Args:
        text (`str`):
            The reference.
    """
    return _marked_number(text) is not None


def _marked_number(text: str) -> Decimal | None:
    found = _MARKED_NUMBER.search(text)
    return None if found is None else _value(found[1])


def _value(number: str) -> Decimal:
    return Decimal(re.sub(rf"[,{_CURRENCY}]", "", number).replace("−", "-"))


def _check_lengths(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions and {len(references)} references; give one of each a task")


def answer_quality(
    judge: LLMJudge, prompts: Sequence[str], responses: Sequence[str], references: Sequence[str | None] | None = None
) -> dict[str, float | int | None]:
    """Mean grade of answers from 1 to 10, by an LLM with the rubric of MT-Bench (Zheng et al., NeurIPS 2023).

    Args:
        judge ([`LLMJudge`]):
            `LLMJudge("mt-bench", model=...)`.
        prompts (list of `str`):
            The requests.
        responses (list of `str`):
            As many answers.
        references (list of `str`, *optional*):
            As many right answers, None where there is none.

    Returns:
        `dict`: `mean_score` (None where nothing was graded), and the counts `scored`, `unscored` (the judge gave no usable
        grade) and `empty` (answers without text, which are not sent). Only scored answers are in the mean.

    Raises:
        ValueError: if they differ in length, or for a judge with another rubric.
    """
    return summarise_scores(judge.score(prompts, responses, references), responses)


def summarise_scores(scores: Sequence[float | None], responses: Sequence[str]) -> dict[str, float | int | None]:
    """What [`answer_quality`] returns, of scores that are there already.

    Args:
        scores (list of `float`):
            None where there is none.
        responses (list of `str`):
            As many answers.

    Example:

    ```python
    >>> summarise_scores([8.0, None, None], ["Boil it.", "", "Fry it."])
    {'mean_score': 8.0, 'scored': 1, 'unscored': 1, 'empty': 1}

    ```
    """
    known = [score for score in scores if score is not None]
    empty = sum(score is None and not text.strip() for score, text in zip(scores, responses, strict=True))
    return {
        "mean_score": fmean(known) if known else None,
        "scored": len(known),
        "unscored": len(scores) - len(known) - empty,
        "empty": empty,
    }


def load_tasks(path: str | os.PathLike) -> list[Task]:
    """Tasks from a file.

    Args:
        path (path):
            A `.jsonl`, `.json`, `.csv` or `.parquet` file with

            - `question` or `prompt`, and `answer` or `reference` where there is a right answer: GSM8K, or one of your own;
            - `turns`, and `reference` where there is one: MT-Bench's questions, of which the first turn is asked;
            - instruction data as [`~hf_safe_ema.data.load_finetuning_data`] reads it (Alpaca, Dolly, TRL's
              prompt-completion, ...), of one turn and without a system prompt: the answer is the reference.

    Returns:
        `list[Task]`: at least one, in the file's order. Rows without a prompt are left out; how many is logged.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if its columns fit no form, a row cannot be read, or no task is in it.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "sums.jsonl"
    >>> _ = path.write_text('{"question": "What is 9 * 2?", "answer": "#### 18"}')
    >>> load_tasks(path)
    [Task(prompt='What is 9 * 2?', reference='#### 18')]

    ```
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"tasks={str(path)!r}: no such file; give a .jsonl, .json, .csv or .parquet file of tasks"
        )
    rows = open_source(path).rows()
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path}: no row in it; a file of tasks needs at least one")
    reader = _reader_for(first[2])
    if reader is None:
        return _from_instruction_data(path)
    rows = [first, *rows]
    tasks = [_checked(reader(row), f"{file}, row {number}") for file, number, row in rows]
    kept = [task for task in tasks if task.prompt]
    if not kept:
        raise ValueError(f"{path}: no row with a prompt; a file of tasks needs at least one")
    if len(kept) < len(tasks):
        logger.warning(f"{path}: left out {len(tasks) - len(kept)} of {len(tasks)} rows: no prompt")
    return kept


def _reader_for(row: dict):
    """How a file is read whose first row this is; None for instruction data."""
    if "turns" in row:
        return lambda row: (_first(row.get("turns")), _first(row.get("reference")))
    prompt = next((column for column in PROMPT_COLUMNS if column in row), None)
    if prompt is None or {"completion", "response", "chosen"} & row.keys():
        return None
    reference = next((column for column in REFERENCE_COLUMNS if column in row), None)
    return lambda row: (row.get(prompt), row.get(reference))


def _first(value):
    return value[0] if isinstance(value, list) and value else value or None


def _checked(pair: tuple, where: str) -> Task:
    texts = []
    for what, value in zip(("prompt", "reference"), pair, strict=True):
        value = "" if value is None or value != value else value  # a NaN differs from itself
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError(f"{where}: the {what} is a {type(value).__name__}; it must be text or a number")
        if re.search("[\ud800-\udfff]", str(value)):
            raise ValueError(f"{where}: the {what} holds half a surrogate pair, which is no text; mend the file")
        texts.append(str(value).strip())
    return Task(texts[0], texts[1] or None)


def _from_instruction_data(path: str | os.PathLike) -> list[Task]:
    from .data import load_finetuning_data

    tasks = []
    for number, row in enumerate(load_finetuning_data(path), 1):
        if len(row["prompt"]) != 1 or len(row["completion"]) != 1:
            said = "/".join(turn["role"] for turn in row["prompt"] + row["completion"])
            raise ValueError(
                f"{path}, task {number}: has the turns {said}; a task is one user turn and its answer. A system prompt "
                "for all tasks is given apart (system_prompt, --system-prompt)"
            )
        tasks.append(
            _checked((row["prompt"][0]["content"], row["completion"][0]["content"]), f"{path}, task {number}")
        )
    return tasks
