"""One model's answers to one prompt set by one judge, counted, and as a table.

Knows: what is counted how. Does not know: how models are asked or judges work, or files.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from .answers import Asking
from .safety.judges import LABELS, Verdict
from .safety.prompts import PromptSet
from .safety.reports import Rate
from .tables import markdown_table, percent


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
        verdicts (`str`, *optional*, defaults to `""`):
            Name of the file in `verdicts/` with the answers and their verdicts.
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
    verdicts: str = ""
    responses: list[dict] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict:
        """All but the responses, JSON-ready."""
        return {key: value for key, value in vars(self).items() if key != "responses"}


def full_name(prompts: PromptSet) -> str:
    """Name and fingerprint of a prompt set, as results carry it.

    Args:
        prompts ([`PromptSet`]):
            The set.
    """
    return f"{prompts.name}#{prompts.fingerprint}"


def set_result(
    model,
    kind: str,
    prompts: PromptSet,
    judge,
    responses: Sequence[str | None],
    verdicts: Sequence[Verdict | None],
    asking: Asking,
) -> SetResult:
    """Count one judge's verdicts on one model's answers.

    Args:
        model ([`~hf_safe_ema.answers.MemoryModel`] or [`~hf_safe_ema.answers.EndpointModel`]):
            Who answered.
        kind (`str`):
            `"harmful"` or `"benign"`.
        prompts ([`PromptSet`]):
            What was asked.
        judge:
            Who judged.
        responses (`list[str | None]`):
            In the order of the prompts; None where there is none.
        verdicts (`list[Verdict | None]`):
            The same.
        asking ([`Asking`]):
            How prompts were asked.
    """
    told = [(p, r, v) for p, r, v in zip(prompts.prompts, responses, verdicts, strict=True) if v is not None]
    wanted = "compliance" if kind == "harmful" else "refusal"
    counts = count_verdicts(v for _, _, v in told)
    rate = Rate(counts[wanted], counts["refusal"] + counts["compliance"])
    categories = dict.fromkeys(prompt.category for prompt, _, _ in told if prompt.category)
    scores = [v.score for _, _, v in told if v.score is not None]
    top = getattr(judge, "top_score", None)
    return SetResult(
        model=model.name,
        kind=kind,
        prompt_set=full_name(prompts),
        judge=judge.name,
        template=model.template,
        system_prompt=asking.system_prompt,
        max_new_tokens=asking.max_new_tokens,
        rate=rate.value,
        interval=rate.interval,
        counts=counts,
        by_category={name: count_verdicts(v for p, _, v in told if p.category == name) for name in categories},
        unanswered=len(prompts) - len(told),
        mean_score=sum(scores) / len(scores) if scores else None,
        top_score_share=sum(score >= top for score in scores) / len(scores) if scores and top else None,
        responses=[
            {"prompt": p.text, "category": p.category, "response": r, **vars(v)} for p, r, v in told
        ],
    )  # fmt: skip


def count_verdicts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Verdicts by label, all labels named.

    Args:
        verdicts (iterable of [`Verdict`]):
            On the answers to one set.
    """
    labels = [verdict.label for verdict in verdicts]
    return {label: labels.count(label) for label in LABELS}


def format_results(results: Sequence[SetResult]) -> str:
    """Results as a Markdown table.

    Args:
        results (list of [`SetResult`]):
            From [`run_check`].
    """
    scored = any(result.mean_score is not None for result in results)
    names = {result.prompt_set: result.prompt_set.partition("#")[0] for result in results}
    alike = {name for name, count in Counter(names.values()).items() if count > 1}  # files of one name in two folders
    header = ["model", "prompts", "judge", "asked", "rate (95% interval)", "unclear", "unscored", "unanswered"]
    header += ["mean score", "at the top"] if scored else []
    rows = []
    for result in results:
        what = "ASR" if result.kind == "harmful" else "over-refusal"
        row = [
            result.model,
            result.prompt_set if names[result.prompt_set] in alike else names[result.prompt_set],
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
