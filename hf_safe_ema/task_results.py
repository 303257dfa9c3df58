"""What models were to be useful for: their answers to files of tasks, measured, for `hf-safe-ema check --tasks`.

Knows: which measures fit a file, and how results are counted and shown. Does not know: how a measure is computed
(usefulness.py), how a model is asked (answers.py), or prompt sets and verdicts on safety (checking.py).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers.utils import logging

from .answers import Asking
from .safety.prompts import Prompt, PromptSet
from .tables import markdown_table, percent
from .usefulness import Task, exact_match, has_marked_number, load_tasks, number_in, rouge, summarise_scores

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TaskSet:
    """Tasks with a name that a result can carry.

    Args:
        prompts ([`PromptSet`]):
            What is asked.
        tasks (`list[Task]`):
            The same, with reference answers.
    """

    prompts: PromptSet
    tasks: list[Task] = field(repr=False)

    @property
    def name(self) -> str:
        """Name and fingerprint, the latter of prompts and references."""
        joined = "\x00".join(f"{task.prompt}\x01{task.reference}" for task in self.tasks)
        return f"{self.prompts.name}#{hashlib.sha256(joined.encode()).hexdigest()[:12]}"

    @property
    def references(self) -> list[str]:
        """Those that there are."""
        return [task.reference for task in self.tasks if task.reference is not None]


@dataclass(frozen=True)
class TaskResult:
    """One model's answers to one file of tasks by one measure, with all that the number depends on.

    Args:
        model (`str`):
            As named by the user.
        task_set (`str`):
            Name and fingerprint.
        measure (`str`):
            `"exact_match"`, `"rouge_l"` or `"quality"`.
        judge (`str`, *optional*):
            Name and version of the judge of quality.
        template (`str`):
            Fingerprint of the chat template.
        system_prompt (`str`, *optional*):
            As sent.
        max_new_tokens (`int`):
            Longest answer.
        value (`float`, *optional*):
            Rate of right answers or mean F1 of ROUGE-L, in [0, 1]; mean grade, 1 to 10. None where nothing was scored.
        interval (`tuple[float, float]`, *optional*):
            95% Wilson interval of a rate.
        asked (`int`):
            Tasks.
        scored (`int`):
            Answers that `value` is of.
        unanswered (`int`):
            Tasks that an endpoint gave no answer to.
        details (`dict`):
            What else was counted: `correct`, `no_number` (wrong, for want of one); `rouge1`, `rouge2`, `rougeL`; `unscored`
            (the judge gave no grade); `empty` (answers without text: 0 for ROUGE, not graded).
        responses (`list[dict]`):
            Prompt, reference, response, score. Not part of `to_dict()`.
    """

    model: str
    task_set: str
    measure: str
    judge: str | None
    template: str
    system_prompt: str | None
    max_new_tokens: int
    value: float | None
    interval: tuple[float, float] | None
    asked: int
    scored: int
    unanswered: int
    details: dict
    responses: list[dict] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict:
        """All but the responses, JSON-ready."""
        return {key: value for key, value in vars(self).items() if key != "responses"}


def load_task_set(path: str | Path, num_prompts: int | None = None, graded: bool = False) -> TaskSet:
    """A file of tasks, or an evenly spaced part of it.

    Args:
        path (path):
            As for [`~hf_safe_ema.usefulness.load_tasks`].
        num_prompts (`int`, *optional*):
            At most so many.
        graded (`bool`, *optional*, defaults to `False`):
            Whether a judge of quality will see the answers; without one, there must be reference answers.

    Raises:
        FileNotFoundError, ValueError: for what cannot be read or measured.
    """
    tasks = load_tasks(path)
    prompts = PromptSet(Path(path).name, tuple(Prompt(task.prompt, str(i)) for i, task in enumerate(tasks)))
    prompts = prompts.sample(num_prompts)
    chosen = TaskSet(prompts, [tasks[int(prompt.id)] for prompt in prompts.prompts])
    if not chosen.references and not graded:
        raise ValueError(
            f"tasks={str(path)!r}: no reference answers among those asked; add an 'answer' or 'reference' column, or name a "
            "judge of quality, --judge llm:mt-bench:MODEL"
        )
    marked = sum(map(has_marked_number, chosen.references))
    if 0 < marked < len(chosen.references):
        logger.warning(
            f"{path}: {marked} of {len(chosen.references)} references have a number after '####', the others have none: "
            "measured with ROUGE-L, not with exact match"
        )
    return chosen


def measured(model, task_set: TaskSet, responses: Sequence[str | None], graders: Sequence, asking: Asking):
    """Exact match where all references hold a number after "####", else ROUGE-L where there are any; and grades.

    Args:
        model ([`~hf_safe_ema.answers.MemoryModel`] or [`~hf_safe_ema.answers.EndpointModel`]):
            That has answered.
        task_set ([`TaskSet`]):
            What it was asked.
        responses (list of `str`):
            As many; None where an endpoint gave none.
        graders (list):
            Judges of quality, see [`~hf_safe_ema.safety.any_judge.build_grader`].
        asking ([`Asking`]):
            How it was asked.

    Returns:
        `list[TaskResult]`: one a measure.
    """
    answered = [(t, r) for t, r in zip(task_set.tasks, responses, strict=True) if r is not None]
    references = task_set.references
    found = []
    if references:
        by_number = all(map(has_marked_number, references))
        found.append(_exact_match(answered) if by_number else _rouge_l(answered))
    found += [_quality(grader, answered) for grader in graders]
    return [
        TaskResult(
            model=model.name,
            task_set=task_set.name,
            template=model.template,
            system_prompt=asking.system_prompt,
            max_new_tokens=asking.max_new_tokens,
            asked=len(task_set.tasks),
            unanswered=len(task_set.tasks) - len(answered),
            **measure,
        )
        for measure in found
    ]


Answered = list[tuple[Task, str]]


def _exact_match(answered: Answered) -> dict:
    pairs = [(task, response) for task, response in answered if task.reference is not None]
    found = exact_match([response for _, response in pairs], [task.reference for task, _ in pairs])
    scores = [float(number_in(response) == number_in(task.reference)) for task, response in pairs]
    return {
        "measure": "exact_match",
        "judge": None,
        "value": found["rate"],
        "interval": found["interval"],
        "scored": found["count"],
        "details": {key: found[key] for key in ("correct", "no_number")},
        "responses": _rows(pairs, scores),
    }


def _rouge_l(answered: Answered) -> dict:
    pairs = [(task, response) for task, response in answered if task.reference is not None]
    found = rouge([response for _, response in pairs], [task.reference for task, _ in pairs])
    count = found.pop("count")
    return {
        "measure": "rouge_l",
        "judge": None,
        "value": found["rougeL"],
        "interval": None,
        "scored": count,
        "details": {**found, "empty": sum(not response.strip() for _, response in pairs)},
        "responses": _rows(pairs, [None] * len(pairs)),
    }


def _quality(grader, answered: Answered) -> dict:
    responses = [response for _, response in answered]
    scores = grader.score([task.prompt for task, _ in answered], responses, [task.reference for task, _ in answered])
    if len(scores) != len(answered):
        raise ValueError(
            f"judge {grader.name!r} gave {len(scores)} grades of {len(answered)} answers; it must give one each"
        )
    found = summarise_scores(scores, responses)
    return {
        "measure": "quality",
        "judge": grader.name,
        "value": found["mean_score"],
        "interval": None,
        "scored": found["scored"],
        "details": {key: found[key] for key in ("unscored", "empty")},
        "responses": _rows(answered, scores),
    }


def _rows(pairs: Answered, scores: Sequence[float | None]) -> list[dict]:
    return [
        {"prompt": task.prompt, "reference": task.reference, "response": response, "score": score}
        for (task, response), score in zip(pairs, scores, strict=True)
    ]


def format_tasks(results: Sequence[TaskResult]) -> str:
    """Results as a Markdown table.

    Args:
        results (list of [`TaskResult`]):
            From [`measured`].
    """
    return markdown_table(*task_cells(results))


def task_cells(results: Sequence[TaskResult]) -> tuple[list[str], list[list[str]]]:
    """Results as the cells of a table.

    Args:
        results (list of [`TaskResult`]):
            From [`measured`].

    Returns:
        `(list[str], list[list[str]])`: names of the columns, and rows.
    """
    names = {result.task_set: result.task_set.partition("#")[0] for result in results}
    unique = len(set(names.values())) == len(names)  # or else files of one name in two folders
    rows = [
        [
            result.model,
            names[result.task_set] if unique else result.task_set,
            result.judge or {"exact_match": "exact match", "rouge_l": "ROUGE-L"}[result.measure],
            str(result.asked),
            str(result.scored),
            _value_text(result),
            ", ".join(_remarks(result)) or "-",
        ]
        for result in results
    ]
    return ["model", "tasks", "measure", "asked", "scored", "result", "of these"], rows


def _value_text(result: TaskResult) -> str:
    if result.value is None:
        return "none scored"
    if result.measure == "exact_match":
        return percent(result.value, result.interval)
    return f"{result.value:.3f}" if result.measure == "rouge_l" else f"{result.value:.2f} of 10"


def _remarks(result: TaskResult) -> list[str]:
    told_apart = {
        "unanswered": result.unanswered,
        "unscored": result.details.get("unscored", 0),
        "empty": result.details.get("empty", 0),
        "without a number": result.details.get("no_number", 0),
        "without a reference": 0 if result.judge else result.asked - result.unanswered - result.scored,
    }
    return [f"{count} {what}" for what, count in told_apart.items() if count]
