"""The responses in an output folder, by prompt, for a page that people read.

Knows: which files hold them, and in which order they are best compared. Does not know: what is done with them; none of it is
trusted.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .history import RESPONSES_FOLDER, read_jsonl

LONGEST = 4000
"""Characters of a prompt or a response that a page shows."""

MOST = 6000
"""Responses that a page shows: about 4 MB."""

_KEYS = ("prompt", "response", "label", "reason")
_ORDER = {"base": 0, "live": 1, "ema": 2}


@dataclass(frozen=True)
class Answer:
    """One response with its verdict, and what it can be chosen by.

    Args:
        kind (`str`):
            `"harmful"` or `"benign"`.
        group (`str`):
            Prompt set, or `""` where there is one of each kind.
        category, prompt, response, label, reason (`str`):
            As in the file.
        score (`float`, *optional*):
            The judge's.
        facets (`dict[str, str]`):
            Who answered when: for a run `weights` and `step`, for a check `model` and `judge`.
    """

    kind: str
    group: str
    category: str
    prompt: str
    response: str
    label: str
    reason: str
    score: float | None
    facets: dict[str, str]


def answer_of(row: dict, kind: str, group: str, facets: dict[str, str]) -> Answer:
    """A row of a file of responses.

    Args:
        row (`dict`):
            With `prompt`, `response`, `label`, `reason`.
        kind, group, facets:
            See [`Answer`].

    Raises:
        ValueError: for a row without these, or with something else than text in them.
    """
    for key in _KEYS:
        if not isinstance(row.get(key), str):
            raise ValueError(f"a response has {key}={row.get(key)!r}: must be text")
    score = row.get("score")
    return Answer(
        kind,
        group,
        str(row.get("category") or ""),
        *(row[key] for key in _KEYS),
        score if isinstance(score, int | float) else None,
        facets,
    )


def folder_of(output_dir: str | Path) -> Path | None:
    """Where a run keeps its responses: `safety/` or, if it pushes to the hub, `_safety/`; the newer one of two.

    Args:
        output_dir (path):
            Of the run.

    Returns:
        `Path`: None if there is none with responses in it.
    """
    found = {}
    for name in (RESPONSES_FOLDER, f"_{RESPONSES_FOLDER}"):
        files = list((Path(output_dir) / name).glob("step-*.jsonl"))
        if files:
            found[Path(output_dir) / name] = max(file.stat().st_mtime for file in files)
    return max(found, key=found.get) if found else None


def read_run(output_dir: str | Path, steps: Iterable[int]) -> tuple[list[Answer], list[str]]:
    """Responses of a run.

    Args:
        output_dir (path):
            Of the run.
        steps (iterable of `int`):
            That its history has reports of.

    Returns:
        `(list[Answer], list[str])`: and a sentence for each step whose responses cannot be had.
    """
    folder, answers, problems = folder_of(output_dir), [], []
    if folder is None:
        return [], [f"The folder of the responses ({RESPONSES_FOLDER}/) is not there or is empty: none is shown."]
    for step in sorted(set(steps)):
        file = folder / f"step-{step:06d}.jsonl"
        if not file.exists():
            problems.append(f"The responses of step {step} are not shown: {folder.name}/{file.name} is missing.")
            continue
        try:
            rows = read_jsonl(file)
            answers += [
                answer_of(row, row["kind"], "", {"weights": str(row["weights"]), "step": str(step)}) for row in rows
            ]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            problems.append(f"The responses of step {step} are not shown: {folder.name}/{file.name}: {error}")
    return answers, problems


def read_results(output_dir: str | Path) -> tuple[list, list, list[str]]:
    """Results of `hf-safe-ema check`, with their responses where the folder has them.

    Args:
        output_dir (path):
            Of the check.

    Returns:
        `(list[SetResult], list[TaskResult], list[str])`: and a sentence for each whose responses cannot be had.

    Raises:
        ValueError: if `results.json` holds something else.
    """
    from .checking import RESULTS_NAME
    from .set_results import SetResult
    from .task_results import TaskResult

    path, problems = Path(output_dir) / RESULTS_NAME, []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results = [SetResult(**row) for row in found["results"]]
        tasks = [TaskResult(**row) for row in found.get("tasks", ())]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of hf-safe-ema check ({error}); run the check again") from error
    for result in results:
        name = str(result.verdicts)
        file = path.parent / "verdicts" / Path(name).name
        try:
            rows = read_jsonl(file) if name else []
            for row in rows:
                answer_of(row, result.kind, result.prompt_set, {})
        except (ValueError, AttributeError, OSError) as error:
            rows = []
            problems.append(f"{file.name}: {error}")
        if rows:
            result.responses.extend(rows)
            if len(rows) != sum(result.counts.values()):
                problems.append(
                    f"{file.name} holds {len(rows)} different answers, the counts are of {sum(result.counts.values())}: "
                    "prompts that are in the set twice, or answers of an earlier check."
                )
        else:
            problems.append(
                f"The responses of {result.model} to {result.prompt_set} are not shown: their file was not found. Run the "
                "check again with the same output folder: what is there already is not asked again."
            )
    return results, tasks, problems


def select(answers: Sequence[Answer], most: int = MOST) -> tuple[list[Answer], int]:
    """As many responses as a page bears: the base's and those of the last steps first.

    Args:
        answers (list of [`Answer`]):
            All.
        most (`int`, *optional*):
            How many.

    Returns:
        `(list[Answer], int)`: chosen, and how many were left out.
    """
    if len(answers) <= most:
        return list(answers), 0
    wanted = sorted(
        range(len(answers)),
        key=lambda i: (answers[i].facets.get("weights") != "base", -int(answers[i].facets.get("step", 0)), i),
    )
    return [answers[i] for i in sorted(wanted[:most])], len(answers) - most


def by_prompt(answers: Iterable[Answer]) -> list[list[Answer]]:
    """Answers to the same prompt beside each other: harmful prompts first, base before live before EMA, by step.

    Args:
        answers (iterable of [`Answer`]):
            Any.
    """
    groups: dict[tuple, list[Answer]] = {}
    for answer in answers:
        groups.setdefault((answer.kind, answer.group, answer.prompt), []).append(answer)
    ordered = sorted(groups.items(), key=lambda item: item[0][0] != "harmful")
    return [sorted(members, key=_place) for _, members in ordered]


def _place(answer: Answer) -> tuple:
    return int(answer.facets.get("step", 0)), _ORDER.get(answer.facets.get("weights", ""), 3)
