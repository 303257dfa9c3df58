"""Plots of a sweep: safety against usefulness with its Pareto front, heat maps, what decides.

Knows: matplotlib, and outcomes by their attributes. Does not know: studies, or how anything was measured.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from .report import COLOURS
from .sweep_config import BASE, LIVE

AVERAGES = ("#1d4ed8", "#0891b2", "#7c3aed", "#059669", "#be185d", "#4d7c0f")
"""Colours of averages, in the order of their half-lives."""


def weights_label(weights: str) -> str:
    """How weights are named to people.

    Args:
        weights (`str`):
            As in a trial.

    Example:

    ```python
    >>> weights_label("live"), weights_label("0.25"), weights_label("50")
    ('live', 'EMA .25 of the run', 'EMA 50 steps')

    ```
    """
    if weights in (BASE, LIVE):
        return weights
    return f"EMA {weights.lstrip('0')} of the run" if "." in weights else f"EMA {weights} steps"


def _order(weights: str) -> tuple[bool, float]:
    return (weights != LIVE, 0.0 if weights in (BASE, LIVE) else float(weights))


def _colours(found: Sequence) -> dict[str, str]:
    averages = sorted({outcome.weights for outcome in found} - {LIVE}, key=_order)
    return {LIVE: COLOURS["live"]} | {w: AVERAGES[i % len(AVERAGES)] for i, w in enumerate(averages)}


def plot_front(found: Sequence, front: Sequence, base: dict[str, Any] | None, usefulness: str, path: str) -> None:
    """ASR against usefulness, each outcome with its interval, the front as a line.

    Args:
        found, front (list of [`Outcome`]):
            All, and those that no other beats in both.
        base (`dict`, *optional*):
            What was measured of the starting point.
        usefulness (`str`):
            Name of the second objective.
        path (`str`):
            Image file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for weights, colour in _colours(found).items():
        shown = [outcome for outcome in found if outcome.weights == weights]
        if not shown:
            continue
        x, y = [o.mean_usefulness for o in shown], [o.mean_asr for o in shown]
        low, high = zip(*(o.asr_interval for o in shown), strict=True)
        # Of few seeds an interval by Student's t may lie beside the mean once it is cut at 0 and 1.
        bars = [
            [max(0, v - b) for v, b in zip(y, low, strict=True)],
            [max(0, t - v) for v, t in zip(y, high, strict=True)],
        ]
        axes.errorbar(
            x, y, bars, fmt="o", ms=5, color=colour, alpha=0.8, lw=0.8, clip_on=False, label=weights_label(weights)
        )
    axes.plot(
        [o.mean_usefulness for o in front],
        [o.mean_asr for o in front],
        "-",
        color="#111827",
        lw=1,
        label="Pareto front",
    )
    if base and base.get("asr") is not None and usefulness in base.get("metrics", {}):
        axes.plot(base["metrics"][usefulness], base["asr"], "*", ms=11, color=COLOURS["base"], label="base")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("held-out loss (nats per token)" if usefulness == "loss" else usefulness)
    axes.set_ylabel("attack success rate")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def plot_heat_maps(found: Sequence, names: tuple[str, str], usefulness: str, path: str) -> None:
    """ASR and usefulness by two settings, the mean over all others; a column of maps for each weights.

    Args:
        found (list of [`Outcome`]):
            To show.
        names (`tuple[str, str]`):
            Settings along y and x.
        usefulness (`str`):
            Name of the second objective.
        path (`str`):
            Image file.
    """
    from matplotlib.figure import Figure

    weights = sorted({outcome.weights for outcome in found}, key=_order)
    rows, columns = (sorted({o.settings[name] for o in found if name in o.settings}, key=_as_number) for name in names)
    figure = Figure(figsize=(2.2 + (1.1 + 0.75 * len(columns)) * len(weights), 1.6 + 2 * (0.9 + 0.5 * len(rows))),
                    layout="constrained")  # fmt: skip
    grid = figure.subplots(2, len(weights), squeeze=False)
    for line, (title, value, shown) in enumerate((
        ("ASR", lambda o: o.mean_asr, "{:.0%}"), (usefulness, lambda o: o.mean_usefulness, "{:.3f}"))):  # fmt: skip
        tables = [_table([o for o in found if o.weights == held], names, rows, columns, value) for held in weights]
        known = [v for table in tables for cells in table for v in cells if not math.isnan(v)]
        for axes, held, table in zip(grid[line], weights, tables, strict=True):
            axes.imshow(table, cmap="YlOrRd" if line == 0 else "PuBu", vmin=min(known), vmax=max(known), aspect="auto")
            middle = (min(known) + max(known)) / 2
            for i, cells in enumerate(table):
                for j, v in enumerate(cells):
                    if not math.isnan(v):
                        colour = "white" if v > middle else "black"
                        axes.text(j, i, shown.format(v), ha="center", va="center", fontsize=8, color=colour)
            axes.set_xticks(range(len(columns)), [_short(v) for v in columns], fontsize=8)
            axes.set_yticks(range(len(rows)), [_short(v) for v in rows], fontsize=8)
            axes.set_title(f"{title}, {weights_label(held)}", fontsize=9)
            axes.set_xlabel(_plain(names[1]), fontsize=8)
            if held == weights[0]:
                axes.set_ylabel(_plain(names[0]), fontsize=8)
    figure.savefig(path, dpi=130)


def _table(found: Sequence, names: tuple[str, str], rows: list, columns: list, value) -> list[list[float]]:
    table = []
    for row in rows:
        cells = [
            [value(o) for o in found if (o.settings.get(names[0]), o.settings.get(names[1])) == (row, c)]
            for c in columns
        ]
        table.append([statistics.fmean(cell) if cell else math.nan for cell in cells])
    return table


def _as_number(value) -> tuple[bool, float, str]:
    is_number = isinstance(value, (int, float))
    return not is_number, float(value) if is_number else 0.0, str(value)


def _short(value) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plain(name: str) -> str:
    return {"per_device_train_batch_size": "batch size per device"}.get(name, name).replace("_", " ")


def plot_importances(importance: dict[str, dict[str, float]], path: str) -> None:
    """How much each setting decides, a group of bars for each.

    Args:
        importance (`dict`):
            Shares by objective and setting.
        path (`str`):
            Image file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    first = next(iter(importance.values()))
    names = sorted(first, key=first.get)
    figure = Figure(figsize=(7, 1.2 + 0.5 * len(names)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(importance)
    for i, (objective, values) in enumerate(importance.items()):
        at = [j - 0.4 + height * (i + 0.5) for j in range(len(names))]
        colour = (COLOURS["live"], COLOURS["ema"])[i % 2]
        axes.barh(at, [values.get(name, 0.0) for name in names], height, color=colour, label=objective)
    axes.set_yticks(range(len(names)), [_plain(name) for name in names])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the variance it explains (fANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
