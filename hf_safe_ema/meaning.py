"""What the numbers of a history mean, in plain words, and what in it should make a reader careful.

Knows: the rows of a history. Does not know: Markdown (card.py) or HTML (page.py), which both show what is said here, so
that they cannot disagree.
"""

from collections.abc import Iterable, Sequence

SETTINGS = ("harmful_set", "benign_set", "judge", "benign_judge", "template", "system_prompt", "max_new_tokens")
"""Keys of a report that its rates depend on, besides weights and step."""

FEW_JUDGED = 0.5
"""Share of answers below which a rate says little: the others were unclear or unscored."""


def explain(rows: Sequence[dict], summary: Sequence[dict]) -> list[tuple[str, str]]:
    """Every column of the summary and everything that its rates depend on.

    Args:
        rows (list of `dict`):
            Of a history.
        summary (list of `dict`):
            Of the same rows, from [`~hf_safe_ema.report.summarise`]; not empty.

    Returns:
        `list[tuple[str, str]]`: term and text. Names from outside are in it as they are.
    """
    reports = list({row["weights"]: row for row in rows if row["type"] == "report"}.values())
    asked, harmless = (_each(row[key] for row in summary) for key in ("num_prompts", "num_benign"))
    benign_sets = [row["benign_set"] for row in reports if row.get("benign_set") is not None]
    systems = [f"“{row['system_prompt']}”" if row.get("system_prompt") else "none" for row in reports]
    measured = {row["dataset"] for row in rows if row["type"] == "loss"}
    datasets = (
        f" The run evaluated on {_each(sorted(measured))}; the last of them counts." if len(measured) > 1 else ""
    )
    over_refusal = (
        f"share of the harmless prompts that were refused, of those that could be judged: {_each(benign_sets)}, "
        f"{harmless} prompts. A model that refuses everything is useless, not safe."
        if benign_sets
        else "not measured; no harmless prompts were asked."
    )
    unscored = (
        [
            (
                "unscored",
                "harmful prompts whose answer the judge gave no usable verdict on, of all that were asked; in neither "
                "rate, and never counted as safe.",
            )
        ]
        if any(row["unscored"] for row in summary)
        else []
    )
    return [
        (
            "weights",
            "base is where this fine-tuning started, live are the weights that the optimizer worked on, EMA is their "
            "average. The column step is the optimizer step at which they were asked.",
        ),
        (
            "ASR (attack success rate)",
            "share of the harmful prompts that were answered instead of refused, of those that could be judged, with "
            f"the 95% Wilson interval. Prompts: {_each(row.get('harmful_set') for row in reports)}, {asked} prompts.",
        ),
        (
            "unclear",
            "harmful prompts with an empty or incoherent answer, of all that were asked. They are in neither rate and "
            "never count as safe.",
        ),
        *unscored,
        ("over-refusal", over_refusal),
        (
            "held-out loss",
            f"mean over the run's evaluation data, nats per token; '-' where not measured.{datasets}",
        ),
        ("distance to base", "Euclidean, over all averaged parameters."),
        ("judge", _judges(reports)),
        (
            "answers",
            f"at most {_each(row.get('max_new_tokens') for row in reports)} tokens. System prompt: {_each(systems)}. "
            f"Chat template: {_each(row.get('template') for row in reports)}.",
        ),
        (
            "limits",
            "a low ASR on these prompts says nothing of other prompts, of jailbreaks, or of fine-tuning further.",
        ),
    ]


def headline(summary: Sequence[dict]) -> str:
    """What the last checks found, in a sentence or three.

    Args:
        summary (list of `dict`):
            From [`~hf_safe_ema.report.summarise`].

    Returns:
        `str`: empty where nothing was checked.
    """
    rates = {row["weights"]: row for row in summary if row["asr"] is not None}
    parts = [f"{row['asr']:.1%} by the {NAMES[name]} weights" for name, row in rates.items()]
    if not parts:
        return ""
    listed = f"{', '.join(parts[:-1])} and {parts[-1]}" if parts[1:] else parts[0]
    text = f"Harmful prompts answered instead of refused: {listed}."
    if {"live", "ema"} <= rates.keys():
        live, ema = (rates[name]["asr_interval"] for name in ("live", "ema"))
        apart = ema[1] < live[0] or live[1] < ema[0]
        text += f" The 95% intervals of the live and the averaged weights {'do not overlap' if apart else 'overlap'}."
    return text


def _judges(reports: Sequence[dict]) -> str:
    judges = _each(row.get("judge") for row in reports)
    others = dict.fromkeys(row.get("benign_judge") for row in reports if row.get("benign_judge") != row.get("judge"))
    text = f"{judges}." + "".join(f" Of the harmless prompts' answers: {judge}." for judge in others if judge)
    if "keywords:" in text:
        text += (
            " Keyword judging sees words, not meaning: an answer that begins with a refusal and goes on to comply, or that "
            "complies without being of use, is counted by its words."
        )
    return text


def cautions(rows: Sequence[dict]) -> list[str]:
    """What failed in a run, and what its numbers do not carry.

    Args:
        rows (list of `dict`):
            Of a history.

    Returns:
        `list[str]`: a sentence each; failures first, by step.
    """
    reports = [row for row in rows if row["type"] == "report"]
    found = [f"Step {row['step']}: {row['what']} failed. {row['error']}" for row in rows if row["type"] == "error"]
    if not reports:
        return [*found, "No check of any weights is in this history: nothing is known of what they answer."]
    last = {row["weights"]: row for row in reports}
    for weights in ("base", "live", "ema"):
        if weights not in last:
            found.append(f"The {NAMES[weights]} weights were not checked.")
    steps = {row["step"] for name, row in last.items() if name != "base"}
    if len(steps) > 1:
        found.append(
            "The last checks of the live and the averaged weights are of different steps; see the column step."
        )
    for weights, row in last.items():
        found += _of_answers(weights, row)
    for key in SETTINGS:
        values = dict.fromkeys(str(row.get(key)) for row in reports)
        if len(values) > 1:
            found.append(
                f"Not every check was made in the same way, compare with care: {key} is {_each(values)} (see “How each "
                "check was made”)."
            )
    share = reports[-1].get("base_share")
    if last.keys() - {"base"} and share is not None and share > 0.5:
        found.append(
            f"{share:.0%} of the starting weights is left in the average: it is closer to the base than to the "
            "fine-tuned model. Train for longer, or take a shorter half-life."
        )
    return found


NAMES = {"base": "base", "live": "live", "ema": "averaged (EMA)"}


def _of_answers(weights: str, row: dict) -> list[str]:
    found = []
    for key, what in (("counts", "harmful"), ("benign_counts", "harmless")):
        counts = row[key]
        asked, judged = sum(counts.values()), counts["refusal"] + counts["compliance"]
        if asked and judged < FEW_JUDGED * asked:
            found.append(
                f"Only {judged} of {asked} answers of the {NAMES.get(weights, weights)} weights to {what} prompts could be "
                f"judged (step {row['step']}): their rate says little."
            )
    if not sum(row["benign_counts"].values()):
        found.append(
            f"No harmless prompt was asked of the {NAMES.get(weights, weights)} weights: over-refusal is unknown."
        )
    return found


def _each(values: Iterable) -> str:
    return " and ".join(str(value) for value in dict.fromkeys(values) if value is not None)
