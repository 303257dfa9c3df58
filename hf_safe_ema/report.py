"""What a run found, for people: a table and a plot from the rows of `safety_history.jsonl`.

Knows: the history's rows, Markdown and matplotlib. Does not know: models, training, or where the rows came from.
"""

import os
from collections.abc import Iterable, Sequence

from .tables import markdown_table, percent

LABELS = {"base": "base", "live": "live", "ema": "EMA"}
COLOURS = {"base": "#6b7280", "live": "#c2410c", "ema": "#1d4ed8"}


def summarise(rows: Iterable[dict]) -> list[dict]:
    """The last report of each weights, with its held-out loss.

    Args:
        rows (iterable of `dict`):
            Of a history.

    Returns:
        `list[dict]`: for base, live and ema, as far as they were checked: `weights`, `step`, `asr`, `asr_interval`,
        `over_refusal`, `over_refusal_interval`, `unclear`, `unscored`, `num_prompts`, `num_benign`, `heldout_loss` (None
        where not measured), `distance_to_base`.
    """
    rows = list(rows)
    reports = {row["weights"]: row for row in rows if row["type"] == "report"}
    summary = []
    for weights in LABELS:
        if weights not in reports:
            continue
        row = reports[weights]
        summary.append(
            {
                "weights": weights,
                "step": row["step"],
                **{key: row[key] for key in ("asr", "asr_interval", "over_refusal", "over_refusal_interval")},
                "unclear": row["counts"]["unclear"],
                "unscored": row["counts"].get("unscored", 0),
                "num_prompts": sum(row["counts"].values()),
                "num_benign": sum(row["benign_counts"].values()),
                "heldout_loss": _loss_at(rows, weights, row["step"]),
                "distance_to_base": row["distance_to_base"],
            }
        )
    return summary


def _loss_at(rows: list[dict], weights: str, step: int) -> float | None:
    row = losses_by_step(rows).get(step)
    return None if row is None else row["live" if weights == "base" else weights]


def losses_by_step(rows: Iterable[dict]) -> dict[int, dict]:
    """The held-out losses that count: of each step the last row, where a run evaluates on several datasets.

    Args:
        rows (iterable of `dict`):
            Of a history.

    Returns:
        `dict[int, dict]`: rows with `live` and `ema`, by step.
    """
    return {row["step"]: row for row in rows if row["type"] == "loss"}


def table_cells(summary: Sequence[dict]) -> tuple[list[str], list[list[str]]]:
    """The summary as text: what a terminal, the model card and the page show.

    Args:
        summary (list of `dict`):
            From [`summarise`].

    Returns:
        `(list[str], list[list[str]])`: header and rows. Unscored answers have a column where there are any.
    """
    unscored = any(row["unscored"] for row in summary)
    header = ["weights", "step", "ASR (95% interval)", "unclear", *(["unscored"] if unscored else [])]
    header += ["over-refusal", "held-out loss", "distance to base"]
    lines = []
    for row in summary:
        lines.append(
            [
                LABELS[row["weights"]],
                str(row["step"]),
                percent(row["asr"], row["asr_interval"]),
                f"{row['unclear']}/{row['num_prompts']}",
                *([f"{row['unscored']}/{row['num_prompts']}"] if unscored else []),
                percent(row["over_refusal"], row["over_refusal_interval"]),
                "-" if row["heldout_loss"] is None else f"{row['heldout_loss']:.3f}",
                f"{row['distance_to_base']:.2f}",
            ]
        )
    return header, lines


def format_table(summary: Sequence[dict]) -> str:
    """The summary as a Markdown table, aligned to be read in a terminal too.

    Args:
        summary (list of `dict`):
            From [`summarise`].
    """
    return markdown_table(*table_cells(summary))


def plot_history(rows: Iterable[dict], path: str | os.PathLike, title: str = "") -> None:
    """Attack success rate with its interval bands, over-refusal, and held-out loss, over steps.

    Args:
        rows (iterable of `dict`):
            Of a history.
        path (path):
            Image file; its ending names the format (`.png`, `.svg`, `.pdf`).
        title (`str`, *optional*, defaults to `""`):
            Above the plot.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    rows = list(rows)
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    asr_axes, refusal_axes, loss_axes = figure.subplots(1, 3)
    for axes, key in ((asr_axes, "asr"), (refusal_axes, "over_refusal")):
        for weights in ("live", "ema"):
            points = [row for row in rows if row["type"] == "report" and row[key] is not None
                      and (row["weights"] == weights or row["weights"] == "base")]  # fmt: skip
            steps = [row["step"] for row in points]
            axes.plot(steps, [row[key] for row in points], "o-", ms=4, color=COLOURS[weights], label=LABELS[weights])
            low, high = zip(*(row[f"{key}_interval"] for row in points), strict=True) if points else ((), ())
            axes.fill_between(steps, low, high, color=COLOURS[weights], alpha=0.15, lw=0)
        base = next((row for row in rows if row["type"] == "report" and row["weights"] == "base"), None)
        if base is not None and base[key] is not None:
            axes.axhline(base[key], color=COLOURS["base"], ls="--", lw=1, label="base")
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(bottom=0)
    asr_axes.set_title("Attack success rate (harmful prompts answered)", fontsize=10)
    refusal_axes.set_title("Over-refusal (harmless prompts refused)", fontsize=10)
    losses = [row for row in rows if row["type"] == "loss"]
    for weights in ("live", "ema"):
        steps = [row["step"] for row in losses]
        loss_axes.plot(
            steps, [row[weights] for row in losses], "o-", ms=4, color=COLOURS[weights], label=LABELS[weights]
        )
    loss_axes.set_title("Held-out loss (nats per token)", fontsize=10)
    for axes in (asr_axes, refusal_axes, loss_axes):
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    asr_axes.legend(frameon=False, loc="upper left")
    if title:
        figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)
