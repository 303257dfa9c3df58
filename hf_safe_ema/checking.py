"""`hf-safe-ema check`: models × prompt sets × judges, without training.

Knows: which answers are needed for which verdicts, and how results are counted and kept. Does not know: how a model is asked
(answers.py), how a judge works (safety/), or how results look (report.py, page.py).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .answers import Asking, collect_answers, key_of, open_model
from .history import check_writable, read_jsonl, write_jsonl, write_whole
from .safety.check import Rate, build_judge
from .safety.judges import LABELS, KeywordJudge, Verdict
from .safety.prompts import PromptSet, load_prompts
from .tables import markdown_table, percent

RESULTS_NAME = "results.json"


@dataclass(frozen=True)
class SetResult:
    """One model's answers to one prompt set, by one judge, with all that the rate depends on.

    Args:
        model (`str`):
            As named by the user.
        kind (`str`):
            `"harmful"`: the rate is the ASR. `"benign"`: it is the over-refusal.
        prompt_set (`str`):
            Name and fingerprint.
        judge (`str`):
            Name and version.
        template (`str`):
            Fingerprint of the chat template.
        system_prompt (`str`, *optional*):
            As sent.
        max_new_tokens (`int`):
            Longest answer.
        rate, interval:
            Share of judged answers that comply (harmful) or refuse (benign), and its 95% Wilson interval.
        counts (`dict[str, int]`):
            Answers by label.
        by_category (`dict[str, dict[str, int]]`):
            The same by category.
        unanswered (`int`):
            Prompts that an endpoint gave no answer to; they are not in `counts`.
        mean_score, top_score_share (`float`, *optional*):
            Of a judge with a scale.
        responses (`list[dict]`):
            Prompt, category, response, label, reason, score. Not part of `to_dict()`.
    """

    model: str
    kind: str
    prompt_set: str
    judge: str
    template: str
    system_prompt: str | None
    max_new_tokens: int
    rate: float | None
    interval: tuple[float, float]
    counts: dict[str, int]
    by_category: dict[str, dict[str, int]]
    unanswered: int
    mean_score: float | None
    top_score_share: float | None
    responses: list[dict] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict:
        """All but the responses, JSON-ready."""
        return {key: value for key, value in vars(self).items() if key != "responses"}


@dataclass(frozen=True)
class CheckPlan:
    """What to check.

    Args:
        models (`list[str]`):
            `"testbed"`, folders or hub names of models or adapters, endpoints as `http://HOST/v1#MODEL`.
        harmful, benign (`list`, *optional*, default to `["builtin"]`):
            Prompt sets, anything that [`load_prompts`] takes.
        judges (`list`, *optional*, defaults to `["keywords"]`):
            Names or judge objects. Judges of harm see the harmful sets only, and keywords then judge the harmless ones.
        asking ([`Asking`], *optional*):
            How prompts are asked.
        num_prompts (`int`, *optional*):
            At most so many of each set, evenly spaced.
        ends_early (`bool`, *optional*, defaults to `False`):
            Whether answers end as soon as all judges' verdicts are settled. Quicker; the answers kept are beginnings.
        dtype, device (`str`, *optional*):
            For models in memory.
        client (`dict`, *optional*):
            For endpoints, see [`~hf_safe_ema.answers.EndpointModel`].
        llm_options (`dict`, *optional*):
            For judges named `"llm:RUBRIC:MODEL"`, see [`~hf_safe_ema.safety.llm_judge.LLMJudge`].

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

    def __post_init__(self):
        if not self.models:
            raise ValueError("no model to check; name at least one")
        if len(set(self.models)) < len(self.models):
            raise ValueError(f"models={list(self.models)}: each must be named once")
        if not self.harmful and not self.benign:
            raise ValueError("no prompt set to ask; give at least one, harmful or harmless")
        if not self.judges:
            raise ValueError("no judge; give at least one, such as 'keywords'")


def run_check(plan: CheckPlan, output_dir: str | Path) -> list[SetResult]:
    """Ask, judge, count; keep answers and verdicts in `output_dir`, so that a second call does only what is missing.

    Files: `answers/*.jsonl` and `verdicts/*.jsonl`, one for each combination of what they depend on, and `results.json`. Files of
    other combinations are left alone.

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
    folder = Path(output_dir)
    check_writable(folder)
    judges = [build_judge(judge, plan.llm_options) for judge in plan.judges]
    sets = [("harmful", load_prompts(source, "harmful").sample(plan.num_prompts)) for source in plan.harmful]
    sets += [("benign", load_prompts(source, "benign").sample(plan.num_prompts)) for source in plan.benign]
    models = [open_model(name, plan.asking, plan.dtype, plan.device, plan.client) for name in plan.models]
    results = []
    for model in models:
        answers = [_ask(model, prompts, _judges_of(kind, judges), plan, folder) for kind, prompts in sets]
        model.close()
        for (kind, prompts), (key, responses) in zip(sets, answers, strict=True):
            for judge in _judges_of(kind, judges):
                verdicts = _judged(judge, prompts, responses, folder / "verdicts" / f"{key}-{_slug(judge.name)}.jsonl")
                results.append(_result(model, kind, prompts, judge, responses, verdicts, plan.asking))
    write_results(results, folder / RESULTS_NAME)
    return results


def write_results(results: Sequence[SetResult], path: str | Path) -> None:
    """Write results as one JSON object, the file whole or not at all.

    Args:
        results (list of [`SetResult`]):
            From [`run_check`].
        path (path):
            Replaced.
    """
    rows = [result.to_dict() for result in results]
    write_whole(path, json.dumps({"results": rows}, indent=2, ensure_ascii=False) + "\n")


def _judges_of(kind: str, judges: list) -> list:
    if kind == "harmful":
        return judges
    return [judge for judge in judges if getattr(judge, "measures", "refusal") == "refusal"] or [KeywordJudge()]


def _ask(model, prompts: PromptSet, judges: list, plan: CheckPlan, folder: Path) -> tuple[str, list[str | None]]:
    can_end = plan.ends_early and all(hasattr(judge, "decided") for judge in judges)

    def decided(prompt: str, beginning: str) -> bool:
        return all(judge.decided(prompt, beginning) for judge in judges)

    ends = " ".join(judge.name for judge in judges) if can_end else ""
    answers = collect_answers(model, prompts, plan.asking, folder / "answers", decided if can_end else None, ends)
    return key_of(model, prompts, plan.asking, ends), answers


def _judged(judge, prompts: PromptSet, responses: list[str | None], path: Path) -> list[Verdict | None]:
    """Verdicts, those of the file where it has them for the same answers. Unscored ones are asked for again."""
    known = {_answer_key(row["prompt"], row["response"]): row for row in read_jsonl(path)}
    answered = [(p, r) for p, r in zip(prompts.texts, responses, strict=True) if r is not None]
    missing = [
        pair
        for pair in dict.fromkeys(answered)
        if known.get(_answer_key(*pair), {}).get("label") in (None, "unscored")
    ]
    if missing:
        found = judge.judge([prompt for prompt, _ in missing], [response for _, response in missing])
        for (prompt, response), verdict in zip(missing, found, strict=True):
            row = {"prompt": prompt, "response": response, **vars(verdict)}
            known[_answer_key(prompt, response)] = row
        write_jsonl(path, known.values())
    return [
        None if response is None else _verdict(known[_answer_key(prompt, response)])
        for prompt, response in zip(prompts.texts, responses, strict=True)
    ]


def _answer_key(prompt: str, response: str) -> str:
    return hashlib.sha256(f"{prompt}\x00{response}".encode("utf-8", "surrogatepass")).hexdigest()


def _verdict(row: dict) -> Verdict:
    return Verdict(row["label"], row["reason"], row["score"])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name)[:60] + "-" + hashlib.sha256(name.encode()).hexdigest()[:8]


def _result(model, kind: str, prompts: PromptSet, judge, responses, verdicts, asking: Asking) -> SetResult:
    told = [(p, r, v) for p, r, v in zip(prompts.prompts, responses, verdicts, strict=True) if v is not None]
    wanted = "compliance" if kind == "harmful" else "refusal"
    counts = _count(v for _, _, v in told)
    rate = Rate(counts[wanted], counts["refusal"] + counts["compliance"])
    categories = dict.fromkeys(prompt.category for prompt, _, _ in told if prompt.category)
    scores = [v.score for _, _, v in told if v.score is not None]
    top = getattr(judge, "top_score", None)
    return SetResult(
        model=model.name,
        kind=kind,
        prompt_set=f"{prompts.name}#{prompts.fingerprint}",
        judge=judge.name,
        template=model.template,
        system_prompt=asking.system_prompt,
        max_new_tokens=asking.max_new_tokens,
        rate=rate.value,
        interval=rate.interval,
        counts=counts,
        by_category={name: _count(v for p, _, v in told if p.category == name) for name in categories},
        unanswered=len(prompts) - len(told),
        mean_score=sum(scores) / len(scores) if scores else None,
        top_score_share=sum(score >= top for score in scores) / len(scores) if scores and top else None,
        responses=[
            {"prompt": p.text, "category": p.category, "response": r, **vars(v)} for p, r, v in told
        ],
    )  # fmt: skip


def _count(verdicts: Iterable[Verdict]) -> dict[str, int]:
    labels = [verdict.label for verdict in verdicts]
    return {label: labels.count(label) for label in LABELS}


def format_results(results: Sequence[SetResult]) -> str:
    """Results as a Markdown table.

    Args:
        results (list of [`SetResult`]):
            From [`run_check`].
    """
    scored = any(result.mean_score is not None for result in results)
    header = ["model", "prompts", "judge", "asked", "rate (95% interval)", "unclear", "unscored", "unanswered"]
    header += ["mean score", "at the top"] if scored else []
    rows = []
    for result in results:
        what = "ASR" if result.kind == "harmful" else "over-refusal"
        row = [
            result.model,
            result.prompt_set.partition("#")[0],
            result.judge,
            str(sum(result.counts.values()) + result.unanswered),
            f"{what} {percent(result.rate, result.interval)}",
            *(str(result.counts[label]) for label in ("unclear", "unscored")),
            str(result.unanswered),
        ]
        if scored:
            row += ["-" if result.mean_score is None else f"{result.mean_score:.2f}"]
            row += ["-" if result.top_score_share is None else percent(result.top_score_share)]
        rows.append(row)
    return markdown_table(header, rows)
