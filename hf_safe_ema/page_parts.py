"""The parts of a page that are made of numbers: plots, headline figures, tables, for a run and for a check.

Knows: rows of a history, results of a check, and which plot shows what of them. Does not know: HTML, files or responses.
"""

from collections.abc import Sequence

from .charts import Bar, Point, Series, bar_chart, line_chart, trade_off_chart
from .meaning import SETTINGS
from .report import LABELS, losses_by_step
from .safety.reports import Rate
from .tables import percent

_TITLES = {
    "asr": "Attack success rate (harmful prompts answered)",
    "over_refusal": "Over-refusal (harmless prompts refused)",
    "loss": "Held-out loss (nats per token)",
}
_SET_NAMES = {
    "harmful_set": "Harmful prompts",
    "benign_set": "Harmless prompts",
    "judge": "Judge",
    "benign_judge": "Judge of harmless prompts' answers",
    "template": "Chat template",
    "system_prompt": "System prompt",
    "max_new_tokens": "Longest answer, in tokens",
}


CHECK_HEADER = [
    "step", "weights", "ASR (95% interval)", "answered", "unclear", "unscored",
    "over-refusal (95% interval)", "refused", "unclear", "unscored", "held-out loss", "distance to base",
]  # fmt: skip


def run_parts(rows: Sequence[dict], summary: Sequence[dict]) -> dict:
    """Plots, headline figures and the table of all checks of a run.

    Args:
        rows (list of `dict`):
            Of a history.
        summary (list of `dict`):
            Of the same rows.

    Returns:
        `dict`: `charts`, `category_charts`, `check_header`, `checks` and `settings`, for run.html.jinja.
    """
    reports = [row for row in rows if row["type"] == "report"]
    losses = losses_by_step(rows)
    charts = [
        _over_steps(reports, "asr", "Lower is safer."),
        _over_steps(reports, "over_refusal", "Lower is more useful."),
        _losses(losses),
        _trade_off(reports, losses),
    ]
    last = {row["weights"]: row for row in reports}
    return {
        "charts": [{**chart, "id": f"plot-{number}"} for number, chart in enumerate(charts, 1)] if summary else [],
        "category_charts": _run_categories(last),
        "check_header": CHECK_HEADER,
        "checks": [_check_cells(row, losses) for row in reports],
        "settings": _settings(reports),
    }


def _over_steps(reports: Sequence[dict], key: str, note: str) -> dict:
    series, base = [], next((r for r in reports if r["weights"] == "base" and r[key] is not None), None)
    for weights in ("live", "ema"):
        own = [r for r in reports if r["weights"] == weights and r[key] is not None]
        chosen = ([base] if base and own else []) + own
        points = [Point(r["step"], r[key], r[f"{key}_interval"], _says(LABELS[r["weights"]], r, key)) for r in chosen]
        series.append(Series(weights, LABELS[weights], points))
    if base and not any(s.points for s in series):
        series = [
            Series("base", "base", [Point(base["step"], base[key], base[f"{key}_interval"], _says("base", base, key))])
        ]
    chart = line_chart(_TITLES[key], series, percent=True, level=("base", base[key]) if base else None)
    legend = [(line["key"], line["label"]) for line in chart["lines"]]
    if base and ("base", "base") not in legend:
        legend.append(("base", "base (dashed)"))
    return {
        **chart,
        "note": f"{note} Bands: 95% intervals." if chart["axes"] else "",
        "missing": "Not measured in this run.",
        "legend": legend,
        "description": "; ".join(p.text for s in series for p in s.points) or "nothing measured",
    }


def _says(name: str, row: dict, key: str) -> str:
    return f"{name}, step {row['step']}: {percent(row[key], row[f'{key}_interval'])}"


def _losses(losses: dict[int, dict]) -> dict:
    series = [
        Series(
            weights,
            LABELS[weights],
            [
                Point(step, row[weights], None, f"{LABELS[weights]}, step {step}: {row[weights]:.3f}")
                for step, row in sorted(losses.items())
                if row[weights] is not None
            ],
        )
        for weights in ("live", "ema")
    ]
    chart = line_chart(_TITLES["loss"], series, percent=False)
    return {
        **chart,
        "note": "Lower is more useful." if chart["axes"] else "",
        "missing": "Not measured: the run had no evaluation data, or the average's loss could not be had.",
        "legend": [(line["key"], line["label"]) for line in chart["lines"]],
        "description": "; ".join(p.text for s in series for p in s.points) or "nothing measured",
    }


def _trade_off(reports: Sequence[dict], losses: dict[int, dict]) -> dict:
    series = []
    for weights in LABELS:
        points = []
        for row in (r for r in reports if r["weights"] == weights and r["asr"] is not None and r["step"] in losses):
            loss = losses[row["step"]]["live" if weights == "base" else weights]
            if loss is not None:
                text = f"{LABELS[weights]}, step {row['step']}: ASR {percent(row['asr'])} at loss {loss:.3f}"
                points.append(Point(loss, row["asr"], None, text))
        series.append((weights, points, [r["step"] for r in reports if r["weights"] == weights]))
    chart = trade_off_chart("Trade-off: ASR against held-out loss", [Series(w, LABELS[w], p) for w, p, _ in series])
    labels = []
    for line in chart["lines"]:
        x, y, text = line["points"][-1]
        # "live, step 60: …": the plot itself says only which weights and when.
        place, right = text.partition(":")[0], x > 300
        labels.append((x - 8 if right else x + 8, y - 7, place, "end" if right else "start"))
    return {
        **chart,
        "note": "One point a check, arrows in the order of training." if chart["axes"] else "",
        "missing": "No check has both a rate and a held-out loss at its step: evaluate at the steps that are checked.",
        "legend": [(line["key"], line["label"]) for line in chart["lines"]],
        "labels": _apart(labels),
        "description": "; ".join(p.text for _, points, _ in series for p in points) or "nothing measured",
    }


def _apart(labels: list[tuple]) -> list[tuple]:
    """Labels moved down where they would lie on one another."""
    placed: list[tuple] = []
    for x, y, text, anchor in sorted(labels, key=lambda label: label[1]):
        while any(abs(y - other[1]) < 13 and abs(x - other[0]) < 110 for other in placed):
            y += 13
        placed.append((x, y, text, anchor))
    return placed


def _run_categories(last: dict[str, dict]) -> list[dict]:
    names = dict.fromkeys(name for row in last.values() for name in row.get("by_category", {}))
    if not names:
        return []
    shown = [weights for weights in LABELS if weights in last]
    groups = [
        (name, [_bar(w, LABELS[w], last[w].get("by_category", {}).get(name, {}), "compliance") for w in shown])
        for name in names
    ]
    title = "ASR by category, last check of each weights"
    return _columns(title, groups, [(w, f"{LABELS[w]}, step {last[w]['step']}") for w in shown], "plot-category")


def _bar(key: str, tag: str, counts: dict, wanted: str) -> Bar:
    rate = Rate(counts.get(wanted, 0), counts.get("refusal", 0) + counts.get("compliance", 0))
    text = "none judged" if rate.value is None else f"{rate.value:.0%} ({rate.count}/{rate.judged})"
    return Bar(key, tag, rate.value, rate.interval, text)


def _columns(
    title: str, groups: Sequence, legend: Sequence[tuple[str, str]], id: str, kind: str = "compliance"
) -> list[dict]:
    """One or two bar charts on one scale's kind, so that many groups need no long scroll."""
    half = (len(groups) + 1) // 2 if len(groups) > 4 else len(groups)
    parts = [part for part in (groups[:half], groups[half:]) if part]
    what = "answered" if kind == "compliance" else "refused"
    top = max((bar.interval[1] for _, bars in groups for bar in bars if bar.rate is not None), default=0.0)
    charts = []
    for number, part in enumerate(parts, 1):
        name = title if len(parts) == 1 else f"{title} ({number} of {len(parts)})"
        said = "; ".join(f"{label}: {bar.tag} {bar.text}" for label, bars in part for bar in bars)
        charts.append(
            {**bar_chart(name, part, top), "id": f"{id}-{number}", "note": f"Share {what}, of the answers that could be judged. Strokes: 95% intervals.",
             "description": said, "legend": list(legend)}
        )  # fmt: skip
    return charts


def _check_cells(row: dict, losses: dict[int, dict]) -> list[str]:
    counts, benign = row["counts"], row["benign_counts"]
    judged, benign_judged = (c["refusal"] + c["compliance"] for c in (counts, benign))
    loss = losses.get(row["step"], {}).get("live" if row["weights"] == "base" else row["weights"])
    return [
        str(row["step"]),
        LABELS.get(row["weights"], row["weights"]),
        percent(row["asr"], row["asr_interval"]),
        f"{counts['compliance']}/{judged}",
        f"{counts['unclear']}",
        f"{counts.get('unscored', 0)}",
        percent(row["over_refusal"], row["over_refusal_interval"]),
        f"{benign['refusal']}/{benign_judged}",
        f"{benign['unclear']}",
        f"{benign.get('unscored', 0)}",
        "-" if loss is None else f"{loss:.3f}",
        f"{row['distance_to_base']:.2f}",
    ]


def _settings(reports: Sequence[dict]) -> list[dict]:
    """The different ways in which checks were made, and which checks each is of."""
    found: dict[tuple, list[str]] = {}
    for row in reports:
        found.setdefault(tuple(row.get(key) for key in SETTINGS), []).append(
            f"{LABELS.get(row['weights'], row['weights'])} at {row['step']}"
        )
    return [
        {
            "checks": "all checks" if len(found) == 1 else ", ".join(checks),
            "entries": [
                (_SET_NAMES[key], "none" if value is None else str(value))
                for key, value in zip(SETTINGS, values, strict=True)
            ],
        }
        for values, checks in found.items()
    ]


def check_parts(results: Sequence) -> dict:
    """Plots and tables of a check of models as they are.

    Args:
        results (list of [`~hf_safe_ema.set_results.SetResult`]):
            From [`~hf_safe_ema.checking.run_check`].

    Returns:
        `dict`: `charts`, `category_charts`, `header`, `lines`, `meaning` and `cautions`, for check.html.jinja.
    """
    models = list(dict.fromkeys(result.model for result in results))
    number = {model: index for index, model in enumerate(models)}
    legend = [(f"m{number[model] % 8}", f"{number[model] + 1}: {model}") for model in models]
    charts, categories = [], []
    for kind, title in (("harmful", "Attack success rate"), ("benign", "Over-refusal")):
        wanted, groups = ("compliance" if kind == "harmful" else "refusal"), {}
        for result in (r for r in results if r.kind == kind):
            groups.setdefault((result.prompt_set, result.judge), []).append(result)
        bars = [
            (
                _group_name(*key),
                [_bar(f"m{number[r.model] % 8}", str(number[r.model] + 1), r.counts, wanted) for r in members],
            )
            for key, members in groups.items()
        ]
        if bars:
            charts += _columns(title, bars, legend, f"plot-{kind}", wanted)
        for index, (key, members) in enumerate(groups.items(), 1):
            names = dict.fromkeys(name for r in members for name in r.by_category)
            split = [
                (
                    name,
                    [
                        _bar(f"m{number[r.model] % 8}", str(number[r.model] + 1), r.by_category.get(name, {}), wanted)
                        for r in members
                    ],
                )
                for name in names
            ]
            if len(split) > 1:
                categories += _columns(
                    f"{title} by category: {_group_name(*key)}", split, legend, f"plot-{kind}-category-{index}", wanted
                )
    header, lines = _result_cells(results)
    return {"charts": charts, "category_charts": categories, "legend": legend, "header": header, "lines": lines,
            "meaning": _check_meaning(results), "cautions": _check_cautions(results)}  # fmt: skip


def _group_name(prompt_set: str, judge: str) -> str:
    return f"{prompt_set.partition('#')[0]} · {judge}"


def _result_cells(results: Sequence) -> tuple[list[str], list[list[str]]]:
    scored = any(result.mean_score is not None for result in results)
    header = ["model", "prompts", "judge", "rate", "95% interval", "judged", "unclear", "unscored", "unanswered"]
    header += ["mean score", "at the top"] if scored else []
    header += ["template", "system prompt", "tokens"]
    lines = []
    for r in results:
        wanted = "compliance" if r.kind == "harmful" else "refusal"
        rate = (
            "none judged"
            if r.rate is None
            else f"{'ASR' if r.kind == 'harmful' else 'over-refusal'} {percent(r.rate)}"
        )
        bounds = f"{r.interval[0]:.1%} to {r.interval[1]:.1%}"
        line = [r.model, r.prompt_set, r.judge, rate, bounds]
        line += [f"{r.counts[wanted]}/{r.counts['refusal'] + r.counts['compliance']}"]
        line += [str(r.counts.get(label, 0)) for label in ("unclear", "unscored")] + [str(r.unanswered)]
        if scored:
            line += ["-" if r.mean_score is None else f"{r.mean_score:.2f}"]
            line += ["-" if r.top_score_share is None else percent(r.top_score_share)]
        lines.append(
            [*line, r.template, "none" if r.system_prompt is None else r.system_prompt, str(r.max_new_tokens)]
        )
    return header, lines


def _check_meaning(results: Sequence) -> list[tuple[str, str]]:
    found = [
        ("ASR (attack success rate)", "share of the harmful prompts that were answered instead of refused (for a judge of harm: "
         "whose answer does harm), of those that could be judged, with the 95% Wilson interval."),
        ("over-refusal", "share of the harmless prompts that were refused, of those that could be judged. A model that refuses "
         "everything is useless, not safe."),
        ("judged", "answers with the property that the rate counts, of the answers that the judge could tell apart."),
        ("unclear", "empty or incoherent answers. They are in neither rate and never count as safe."),
        ("unscored", "answers that the judge gave no usable verdict on; in neither rate, and never counted as safe."),
        ("unanswered", "prompts that an endpoint gave no answer to; in no other count."),
        ("prompts, template", "after # the fingerprint of the prompts: the same one, the same prompts. The template's fingerprint is "
         "of the chat template that the prompts were put into."),
    ]  # fmt: skip
    if any(r.mean_score is not None for r in results):
        found.append(("mean score", "of the judge's own scale; at the top: share of the scored answers at its end."))
    if any(r.judge.startswith("keywords:") for r in results):
        found.append(("keyword judges", "see words, not meaning: an answer that begins with a refusal and goes on to comply, or "
                      "that complies without being of use, is counted by its words."))  # fmt: skip
    found.append(
        ("limits", "a low ASR on these prompts says nothing of other prompts, of jailbreaks, or of fine-tuning.")
    )
    return found


def _check_cautions(results: Sequence) -> list[str]:
    found = [] if results else ["Nothing was checked: there are no results."]
    for r in results:
        answered = sum(r.counts.values())
        judged = r.counts["refusal"] + r.counts["compliance"]
        if judged < (answered + r.unanswered) / 2:
            found.append(
                f"{r.model}, {r.prompt_set}, {r.judge}: only {judged} of {answered + r.unanswered} answers could be judged; the rate says little."
            )
        if r.unanswered:
            found.append(
                f"{r.model}, {r.prompt_set}: {r.unanswered} prompts got no answer. Run the check again to ask them."
            )
    if results and not any(r.kind == "benign" for r in results):
        found.append("No harmless prompts were asked: over-refusal is unknown.")
    if results and not any(r.kind == "harmful" for r in results):
        found.append("No harmful prompts were asked: the ASR is unknown.")
    return list(dict.fromkeys(found))
