"""`hf-safe-ema check`: models × prompt sets × judges, without training.

Knows: which answers are needed for which verdicts, and how results are counted and kept. Does not know: how a model is asked
(answers.py), how a judge works (safety/), what is measured of tasks (task_results.py), or how results look (page.py).
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .answers import Asking, collect_answers, is_broken, key_of, open_model, pieces, read_kept
from .history import check_writable, write_jsonl, write_whole
from .safety.any_judge import (
    build_grader,
    build_judge,
    identity_of,
    measures_quality,
    measures_refusal,
    verdicts_of,
)
from .safety.check import check_count
from .safety.judges import KeywordJudge, Verdict
from .safety.prompts import PromptSet, load_prompts
from .set_results import SetResult, full_name, set_result
from .task_results import TaskResult, TaskSet, load_task_set, measured

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class CheckPlan:
    """What to check.

    Args:
        models (`list[str]`):
            `"testbed"`, folders or hub names of models or adapters, endpoints as `http://HOST/v1#MODEL`.
        harmful, benign (`list`, *optional*, default to `["builtin"]`):
            Prompt sets, anything that [`load_prompts`] takes.
        judges (`list`, *optional*, defaults to `["keywords"]`):
            Names or judge objects. Judges of harm see the harmful sets only; if there are no others, keywords judge the harmless
            ones. Verdicts are kept under a judge's name, so one of your own needs another with other rules. Judges of quality
            (`"llm:mt-bench:MODEL"`) grade the answers to tasks.
        asking ([`Asking`], *optional*):
            How prompts are asked.
        num_prompts (`int`, *optional*):
            At most so many of each set and of each file of tasks, evenly spaced.
        ends_early (`bool`, *optional*, defaults to `False`):
            Whether answers end as soon as all judges' verdicts are settled. Quicker; the answers kept are beginnings.
        dtype, device (`str`, *optional*):
            For models in memory.
        client (`dict`, *optional*):
            For endpoints, see [`~hf_safe_ema.answers.EndpointModel`].
        llm_options (`dict`, *optional*):
            For judges named `"llm:RUBRIC:MODEL"`, see [`~hf_safe_ema.safety.llm_judge.LLMJudge`].
        tasks (`list`, *optional*, defaults to `[]`):
            Files of what the models are to be useful for, see [`~hf_safe_ema.usefulness.load_tasks`].

    Raises:
        ValueError, TypeError, FileNotFoundError: for what cannot be checked, before anything is asked.
    """

    models: Sequence[str]
    harmful: Sequence = ("builtin",)
    benign: Sequence = ("builtin",)
    judges: Sequence = ("keywords",)
    asking: Asking = field(default_factory=Asking)
    num_prompts: int | None = None
    ends_early: bool = False
    dtype: str = "auto"
    device: str | None = None
    client: dict | None = None
    llm_options: dict | None = None
    tasks: Sequence = ()

    def __post_init__(self):
        for name in ("models", "harmful", "benign", "judges", "tasks"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name}={getattr(self, name)!r}: give a list, such as [{getattr(self, name)!r}]")
        if not self.models:
            raise ValueError("no model to check; name at least one")
        if not all(isinstance(model, str) for model in self.models):
            raise TypeError(f"models={list(self.models)}: each must be a name; for a model in memory use SafetyCheck")
        _check_once("model", self.models)
        if not self.harmful and not self.benign and not self.tasks:
            raise ValueError("no prompt set to ask; give at least one, harmful or harmless, or tasks")
        if not self.judges:
            raise ValueError("no judge; give at least one, such as 'keywords'")
        if self.num_prompts is not None:
            check_count("num_prompts", self.num_prompts)


def _check_once(what: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} {repeated[0]!r} is given twice; each must be given once")


@dataclass(frozen=True)
class Checked:
    """What a check has found.

    Args:
        results (`list[SetResult]`):
            Safety: by model, prompt set and judge, in the plan's order.
        tasks (`list[TaskResult]`):
            Usefulness: by model, file of tasks and measure.
    """

    results: list[SetResult]
    tasks: list[TaskResult]


def run_check(plan: CheckPlan, output_dir: str | Path) -> list[SetResult]:
    """[`run_plan`], of which it returns what was found of safety.

    Args:
        plan ([`CheckPlan`]):
            What to check.
        output_dir (path):
            Made if missing.

    Returns:
        `list[SetResult]`: by model, prompt set and judge, in the plan's order.

    Raises:
        ValueError, TypeError, OSError: for what cannot be checked or written.
    """
    return run_plan(plan, output_dir).results


def run_plan(plan: CheckPlan, output_dir: str | Path) -> Checked:
    """Ask, judge, count; keep answers and verdicts in `output_dir`, so that a second call does only what is missing.

    Files: `answers/*.jsonl` and `verdicts/*.jsonl`, one for each combination of what they depend on, and `results.json`. Files of
    other combinations are left alone. What comes from endpoints is remembered reply by reply in `answers/replies.sqlite` and
    `judge-cache.sqlite`. To have everything asked again, give another folder.

    Two processes may use one folder: each has its own `results.json` at its end, and finds the other's answers as far as they
    are written.

    Args:
        plan ([`CheckPlan`]):
            What to check.
        output_dir (path):
            Made if missing.

    Returns:
        [`Checked`]

    Raises:
        ValueError, TypeError, OSError: for what cannot be checked or written.
    """
    folder = Path(output_dir)
    check_writable(folder)
    judges, graders = _judges(plan, folder)
    sets, task_sets, models = _sets(plan), _task_sets(plan), _models(plan, folder)
    asked, done = [], []
    for model in models:
        asked.append([_ask(model, prompts, _judges_of(kind, judges), plan, folder) for kind, prompts in sets])
        done.append([collect_answers(model, tasks.prompts, plan.asking, folder / "answers") for tasks in task_sets])
        model.close()
    results = []
    for model, answers in zip(models, asked, strict=True):
        for (kind, prompts), (key, responses) in zip(sets, answers, strict=True):
            for judge in _judges_of(kind, judges):
                path = folder / "verdicts" / f"{key}-{_slug(judge)}.jsonl"
                verdicts = _judged(judge, prompts, responses, path)
                result = set_result(model, kind, prompts, judge, responses, verdicts, plan.asking)
                results.append(replace(result, verdicts=path.name))
    tasks = []
    for model, answers in zip(models, done, strict=True):
        for task_set, responses in zip(task_sets, answers, strict=True):
            tasks += measured(model, task_set, responses, graders, plan.asking)
    write_results(results, folder / RESULTS_NAME, tasks)
    return Checked(results, tasks)


def _judges(plan: CheckPlan, folder: Path) -> tuple[list, list]:
    """Of safety, and of quality where there are tasks for them."""
    options = {"cache": folder / "judge-cache.sqlite", **(plan.llm_options or {})}
    of_quality = [judge for judge in plan.judges if plan.tasks and measures_quality(judge)]
    of_safety = [judge for judge in plan.judges if judge not in of_quality] or ["keywords"]
    judges = [build_judge(judge, options, plan.asking.progress) for judge in of_safety]
    graders = [build_grader(judge, options, plan.asking.progress) for judge in of_quality]
    _check_once("judge", [judge.name for judge in judges + graders])
    return judges, graders


def _task_sets(plan: CheckPlan) -> list[TaskSet]:
    graded = any(map(measures_quality, plan.judges))
    sets = [load_task_set(path, plan.num_prompts, graded) for path in plan.tasks]
    for tasks in sets:
        _refuse_broken(tasks.prompts)
    _check_once("tasks", [tasks.name for tasks in sets])
    return sets


def _sets(plan: CheckPlan) -> list[tuple[str, PromptSet]]:
    sets = []
    for kind, sources in (("harmful", plan.harmful), ("benign", plan.benign)):
        sets += [(kind, load_prompts(source, kind).sample(plan.num_prompts)) for source in sources]
    for _, prompts in sets:
        _refuse_broken(prompts)
    _check_once("prompt set", [f"{full_name(prompts)} ({kind})" for kind, prompts in sets])
    return sets


def _refuse_broken(prompts: PromptSet) -> None:
    broken = [prompt.id for prompt in prompts.prompts if is_broken(prompt.text + prompt.category)]
    if broken:
        raise ValueError(
            f"{prompts.name}: prompt {broken[0]} holds half a surrogate pair, which is no text; mend the file"
        )


def _models(plan: CheckPlan, folder: Path) -> list:
    client = {"cache": folder / "answers" / "replies.sqlite", **(plan.client or {})}
    return [open_model(name, plan.asking, plan.dtype, plan.device, client) for name in plan.models]


def write_results(results: Sequence[SetResult], path: str | Path, tasks: Sequence[TaskResult] = ()) -> None:
    """Write results as one JSON object, the file whole or not at all.

    Args:
        results (list of [`SetResult`]):
            From [`run_check`].
        path (path):
            Replaced.
        tasks (list of [`TaskResult`], *optional*):
            From [`run_plan`].
    """
    found = {"results": [result.to_dict() for result in results], "tasks": [result.to_dict() for result in tasks]}
    write_whole(path, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _judges_of(kind: str, judges: list) -> list:
    if kind == "harmful":
        return judges
    return [judge for judge in judges if measures_refusal(judge)] or [KeywordJudge()]


def _ask(model, prompts: PromptSet, judges: list, plan: CheckPlan, folder: Path) -> tuple[str, list[str | None]]:
    can_end = plan.ends_early and all(hasattr(judge, "decided") for judge in judges)

    def decided(prompt: str, beginning: str) -> bool:
        return all(judge.decided(prompt, beginning) for judge in judges)

    ends = " ".join(judge.name for judge in judges) if can_end else ""
    answers = collect_answers(model, prompts, plan.asking, folder / "answers", decided if can_end else None, ends)
    return key_of(model, prompts, plan.asking, ends), answers


def _judged(judge, prompts: PromptSet, responses: list[str | None], path: Path) -> list[Verdict | None]:
    """Verdicts, those of the file where it has them for the same answers. Unscored ones are asked for again."""
    known = _verdicts_in(path)
    answered = [(p, r) for p, r in zip(prompts.texts, responses, strict=True) if r is not None]
    missing = [pair for pair in dict.fromkeys(answered) if not _is_scored(known.get(_answer_key(*pair)))]
    for piece in pieces(missing, getattr(judge, "client", None)):
        found = verdicts_of(judge, [prompt for prompt, _ in piece], [response for _, response in piece])
        for (prompt, response), verdict in zip(piece, found, strict=True):
            known[_answer_key(prompt, response)] = {"prompt": prompt, "response": response, **vars(verdict)}
        theirs = _verdicts_in(path)  # another process may have written meanwhile
        known |= {k: row for k, row in theirs.items() if k not in known or _is_scored(row) > _is_scored(known[k])}
        write_jsonl(path, known.values())
    return [
        None if response is None else _verdict(known[_answer_key(prompt, response)])
        for prompt, response in zip(prompts.texts, responses, strict=True)
    ]


def _verdicts_in(path: Path) -> dict[str, dict]:
    rows = read_kept(path, ("prompt", "response", "label", "reason", "score"))
    return {_answer_key(row["prompt"], row["response"]): row for row in rows}


def _is_scored(row: dict | None) -> bool:
    return row is not None and row["label"] != "unscored"


def _answer_key(prompt: str, response: str) -> str:
    return hashlib.sha256(f"{prompt}\x00{response}".encode()).hexdigest()


def _verdict(row: dict) -> Verdict:
    return Verdict(row["label"], row["reason"], row["score"])


def _slug(judge) -> str:
    digest = hashlib.sha256(identity_of(judge).encode()).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9.-]+", "_", judge.name)[:60] + "-" + digest
