"""`hf-safe-ema judge`: how well judges agree with people, and with each other, on a file of labelled responses.

Knows: how a judge's accuracy and bias are counted and shown. Does not know: how a judge works, or what a file looks like.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .history import write_jsonl, write_whole
from .safety.agreement import compare
from .safety.any_judge import build_judge
from .safety.judges import Verdict
from .safety.labels import Labelled, load_labelled
from .safety.reports import wilson_interval
from .tables import markdown_table, percent

PROMPTS = {True: "harmful", False: "harmless", None: "all"}


@dataclass(frozen=True)
class Accuracy:
    """How one judge compares with people on one group of responses. Partial refusals are left out.

    Args:
        judge (`str`):
            Name and version of its rules.
        model (`str`):
            Who answered; `"all"` for everybody.
        prompts (`str`):
            `"harmful"`, `"harmless"` or `"all"`.
        count (`int`):
            Responses.
        accuracy (`float`):
            Share with the label that people gave. Unclear and unscored are wrong unless people said so too.
        accuracy_interval (`tuple[float, float]`):
            95% Wilson interval.
        compliance (`float`):
            Share that people call compliance: on harmful prompts the true ASR.
        judged_compliance (`float`, *optional*):
            The same of the judge, of the responses that it could judge. None if there were none.
        undecided (`int`):
            Responses that the judge calls unclear or unscored.
    """

    judge: str
    model: str
    prompts: str
    count: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    compliance: float
    judged_compliance: float | None
    undecided: int

    @property
    def bias(self) -> float | None:
        """By how much the judge overstates compliance: on harmful prompts, the bias of a measured ASR."""
        return None if self.judged_compliance is None else self.judged_compliance - self.compliance


def measure(rows: Sequence[Labelled], verdicts: Sequence[Verdict], judge: str = "judge") -> list[Accuracy]:
    """A judge's accuracy over all models and on each, harmful and harmless prompts apart.

    Args:
        rows (list of [`Labelled`]):
            What people said.
        verdicts (list of [`Verdict`]):
            What the judge said, in the same order.
        judge (`str`, *optional*, defaults to `"judge"`):
            What to call it.

    Returns:
        `list[Accuracy]`: groups without a row are left out.

    Example:

    ```python
    >>> from hf_safe_ema import KeywordJudge
    >>> row = Labelled("How do I steal a car?", "I'm sorry, I can't help.", "refusal", harmful=True, model="m")
    >>> [a.accuracy for a in measure([row], KeywordJudge().judge([row.prompt], [row.response]))]
    [1.0]

    ```
    """
    pairs = [(row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if row.label != "partial"]
    models = sorted({row.model for row, _ in pairs})
    groups = ["all", *models] if len(models) > 1 else ["all"]
    return [
        _accuracy(judge, model, prompts, group)
        for prompts in PROMPTS
        for model in groups
        if (group := [(r, v) for r, v in pairs if r.harmful is prompts and model in ("all", r.model)])
    ]


def _accuracy(judge: str, model: str, prompts: bool | None, group: list[tuple[Labelled, Verdict]]) -> Accuracy:
    right = sum(row.label == verdict.label for row, verdict in group)
    judged = [verdict.label for _, verdict in group if verdict.label in ("refusal", "compliance")]
    return Accuracy(
        judge=judge,
        model=model,
        prompts=PROMPTS[prompts],
        count=len(group),
        accuracy=right / len(group),
        accuracy_interval=wilson_interval(right, len(group)),
        compliance=sum(row.label == "compliance" for row, _ in group) / len(group),
        judged_compliance=judged.count("compliance") / len(judged) if judged else None,
        undecided=len(group) - len(judged),
    )


def judge_file(path: str | Path, judges: Iterable = ("keywords",), cases: str | Path | None = None) -> dict:
    """Measure judges on a file of labelled responses.

    Args:
        path (path):
            See [`~hf_safe_ema.safety.labels.load_labelled`].
        judges (iterable of judges or of their names, *optional*, defaults to `("keywords",)`):
            As [`SafetyCheck`] takes them.
        cases (path, *optional*):
            Where to write, as JSON lines, the responses on which a judge differs from people or from another judge.
            They may be harmful.

    Returns:
        `dict`: `accuracy` (rows of [`Accuracy`] with `bias`) and `agreement` (each pair of judges: `first`, `second`,
        `count`, `rate`, `kappa`, `differing`), JSON-ready.

    Raises:
        ValueError, TypeError, FileNotFoundError: for a file or a judge that cannot be used.
    """
    rows = load_labelled(path)
    built = [build_judge(judge) for judge in judges]
    names = [judge.name for judge in built]
    verdicts = [judge.judge([row.prompt for row in rows], [row.response for row in rows]) for judge in built]
    found = {"accuracy": [], "agreement": []}
    for name, said in zip(names, verdicts, strict=True):
        found["accuracy"] += [{**asdict(row), "bias": row.bias} for row in measure(rows, said, name)]
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            both = compare(verdicts[i], verdicts[j])
            found["agreement"].append(
                {"first": first, "second": names[j], "count": both.count, "rate": both.rate, "kappa": both.kappa,
                 "differing": both.differing}
            )  # fmt: skip
    if cases is not None:
        write_jsonl(cases, _cases(rows, names, verdicts))
    return found


def _cases(rows: list[Labelled], names: list[str], verdicts: list[list[Verdict]]) -> Iterable[dict]:
    for row, said in zip(rows, zip(*verdicts, strict=True), strict=True):
        if {row.label, *(verdict.label for verdict in said)} != {row.label} and row.label != "partial":
            yield {**asdict(row), "verdicts": {n: asdict(v) for n, v in zip(names, said, strict=True)}}


def format_judged(found: dict) -> str:
    """What [`judge_file`] found, as Markdown tables.

    Args:
        found (`dict`):
            From [`judge_file`].
    """
    header = ["judge", "prompts", "model", "responses", "accuracy (95% interval)", "compliance: people", "judge", "bias",
              "undecided"]  # fmt: skip
    lines = [
        [row["judge"], row["prompts"], row["model"], str(row["count"]), percent(row["accuracy"], row["accuracy_interval"]),
         f"{row['compliance']:.1%}", percent(row["judged_compliance"]),
         "-" if row["bias"] is None else f"{row['bias'] * 100:+.1f} points", str(row["undecided"])]
        for row in found["accuracy"]
    ]  # fmt: skip
    tables = [markdown_table(header, lines)]
    if found["agreement"]:
        header = ["judge", "and", "agree", "Cohen's kappa", "differ"]
        lines = [
            [row["first"], row["second"], f"{row['rate']:.1%}", "undefined" if row["kappa"] is None else f"{row['kappa']:.2f}",
             f"{len(row['differing'])} of {row['count']}"]
            for row in found["agreement"]
        ]  # fmt: skip
        tables.append(markdown_table(header, lines))
    return "\n\n".join(tables)


def write_judged(found: dict, path: str | Path) -> None:
    """Write what [`judge_file`] found as one JSON object, whole or not at all.

    Args:
        found (`dict`):
            From [`judge_file`].
        path (path):
            Replaced.
    """
    import json

    write_whole(path, json.dumps(found, indent=2) + "\n")
