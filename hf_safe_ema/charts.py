"""Where the lines, points and bars of a plot lie, for pages/charts.html.jinja to draw as SVG.

Knows: scales, ticks and coordinates (the SVG's own user units). Does not know: what is plotted, colours (page.css), or HTML.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 420, 264
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 14, 42
ROW, GAP, LABEL = 15, 12, 18
"""Heights in a bar chart: of a bar, between two groups, of a group's label."""


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        x, y (`float`):
            In the data's units.
        interval (`tuple[float, float]`, *optional*):
            Bounds of `y`.
        text (`str`, *optional*, defaults to `""`):
            What it says when pointed at.
    """

    x: float
    y: float
    interval: Sequence[float] | None = None
    text: str = ""


@dataclass(frozen=True)
class Series:
    """Measurements that belong together.

    Args:
        key (`str`):
            Names the colour: `"base"`, `"live"`, `"ema"`, or `"m0"`, `"m1"`, …
        label (`str`):
            For the legend.
        points (`list[Point]`):
            In order.
    """

    key: str
    label: str
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Bar:
    """One rate of a bar chart.

    Args:
        key (`str`):
            As of [`Series`].
        tag (`str`):
            A few letters beside the bar.
        rate (`float`, *optional*):
            In [0, 1]; None where nothing was judged.
        interval (`tuple[float, float]`):
            Its bounds.
        text (`str`):
            Behind the bar.
    """

    key: str
    tag: str
    rate: float | None
    interval: Sequence[float]
    text: str


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover a range, the first at or below `low`, the last at or above `high`.

    Args:
        low, high (`float`):
            The range.
        count (`int`, *optional*, defaults to 5):
            About how many.

    Example:

    ```python
    >>> ticks(0, 0.27)
    [0.0, 0.1, 0.2, 0.3]

    ```
    """
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.05, low + (abs(low) or 1) * 0.05
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _finite(series: Sequence[Series]) -> list[Series]:
    """Without what has no place on an axis."""
    return [Series(s.key, s.label, [p for p in s.points if math.isfinite(p.x) and math.isfinite(p.y)]) for s in series]


def _scale(low: float, high: float, start: float, end: float):
    return lambda value: round(start + (value - low) / (high - low) * (end - start), 2)


def _axes(xs: Sequence[float], ys: Sequence[float], percent: tuple[bool, bool], whole_x: bool) -> dict:
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    if whole_x:
        x_ticks = [tick for tick in x_ticks if tick == int(tick)] or [math.floor(min(xs)), math.ceil(max(xs) + 1)]
        if len(x_ticks) == 1:
            x_ticks.append(x_ticks[0] + 1)
    low, high = min(x_ticks[0], min(xs)), max(x_ticks[-1], max(xs))
    x_at, y_at = _scale(low, high, LEFT, WIDTH - RIGHT), _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    return {
        "x_at": x_at,
        "y_at": y_at,
        "x_ticks": [(x_at(tick), _tick_text(tick, x_ticks, percent[0])) for tick in x_ticks],
        "y_ticks": [(y_at(tick), _tick_text(tick, y_ticks, percent[1])) for tick in y_ticks],
    }


def _tick_text(tick: float, all_ticks: Sequence[float], percent: bool) -> str:
    step = (all_ticks[1] - all_ticks[0]) * (100 if percent else 1)
    places = max(
        0, -math.floor(math.log10(step) + 1e-9) + (round(step / 10 ** math.floor(math.log10(step)), 3) == 2.5)
    )
    return f"{tick * 100:.{places}f}%" if percent else f"{tick:.{places}f}"


def line_chart(title: str, series: Sequence[Series], percent: bool, level: tuple[str, float] | None = None) -> dict:
    """Lines over optimizer steps, with bands for intervals.

    Args:
        title (`str`):
            What is measured.
        series (list of [`Series`]):
            Points that are not finite are left out.
        percent (`bool`):
            Whether y is a rate; its axis then begins at 0.
        level (`tuple[str, float]`, *optional*):
            A level to compare with: label and y.

    Returns:
        `dict`: coordinates; None for `axes` where there is nothing to draw.
    """
    series = [s for s in _finite(series) if s.points]
    chart = {"kind": "line", "title": title, "axes": None, "lines": [], "level": None, "x_label": "optimizer step"}
    if not series:
        return chart
    points = [point for s in series for point in s.points]
    ys = [p.y for p in points] + [bound for p in points if p.interval for bound in p.interval]
    ys += ([0.0] if percent else []) + ([level[1]] if level else [])
    if percent and max(ys) == 0:
        ys.append(0.1)
    axes = _axes([p.x for p in points], ys, (False, percent), whole_x=True)
    x_at, y_at = axes["x_at"], axes["y_at"]
    for s in series:
        upper = [f"{x_at(p.x)},{y_at(p.interval[1])}" for p in s.points if p.interval]
        lower = [f"{x_at(p.x)},{y_at(p.interval[0])}" for p in s.points if p.interval]
        # A single check has no area; its interval is a stroke.
        single = len(s.points) == 1 and s.points[0].interval
        chart["lines"].append(
            {
                "key": s.key,
                "label": s.label,
                "line": " ".join(f"{x_at(p.x)},{y_at(p.y)}" for p in s.points),
                "band": " ".join(upper + lower[::-1]) if len(upper) > 1 else "",
                "stroke": (x_at(s.points[0].x), *(y_at(bound) for bound in s.points[0].interval)) if single else None,
                "points": [(x_at(p.x), y_at(p.y), p.text) for p in s.points],
            }
        )
    if level:
        chart["level"] = (level[0], y_at(level[1]))
    return {**chart, "axes": axes}


def trade_off_chart(title: str, series: Sequence[Series]) -> dict:
    """ASR (y) against held-out loss (x), a point a check, in the order of training.

    Args:
        title (`str`):
            What is compared.
        series (list of [`Series`]):
            x is the loss, y the rate.

    Returns:
        `dict`: coordinates; None for `axes` where there is nothing to draw.
    """
    series = [s for s in _finite(series) if s.points]
    chart = {"kind": "trade", "title": title, "axes": None, "lines": [], "x_label": "held-out loss, nats per token"}
    if not series:
        return chart
    points = [point for s in series for point in s.points]
    spread = (max(p.x for p in points) - min(p.x for p in points)) * 0.06 or 0.01
    xs = [min(p.x for p in points) - spread, max(p.x for p in points) + spread]
    axes = _axes(xs, [0.0, max(p.y for p in points) * 1.08 or 0.1], (False, True), whole_x=False)
    x_at, y_at = axes["x_at"], axes["y_at"]
    # Training starts at the base.
    start = [(x_at(p.x), y_at(p.y), p.text) for s in series if s.key == "base" for p in s.points[-1:]]
    for s in series:
        places = [(x_at(p.x), y_at(p.y), p.text) for p in s.points]
        way = places if s.key == "base" else start + places
        arrows = [_shortened(a, b) for a, b in itertools.pairwise(way)]
        chart["lines"].append(
            {"key": s.key, "label": s.label, "points": places, "arrows": [arrow for arrow in arrows if arrow]}
        )
    return {**chart, "axes": axes}


def _shortened(start: tuple, end: tuple) -> dict | None:
    """A stroke with a head from one point to the next, ending before either's mark; None where they touch."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    length = math.hypot(dx, dy)
    if length < 14:
        return None
    ux, uy = dx / length, dy / length
    tip, back = (end[0] - 6 * ux, end[1] - 6 * uy), (end[0] - 13 * ux, end[1] - 13 * uy)
    head = [tip, (back[0] - 3.5 * uy, back[1] + 3.5 * ux), (back[0] + 3.5 * uy, back[1] - 3.5 * ux)]
    return {
        "line": [round(v, 2) for v in (start[0] + 6 * ux, start[1] + 6 * uy, *back)],
        "head": " ".join(f"{x:.2f},{y:.2f}" for x, y in head),
    }


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], top: float) -> dict:
    """Rates side by side, a group of bars below each label.

    Args:
        title (`str`):
            What is compared.
        groups (list of `(str, list[Bar])`):
            From top to bottom.
        top (`float`):
            The highest rate or bound, of all charts that are compared with this one.

    Returns:
        `dict`: coordinates and `height`.
    """
    x_ticks = ticks(0, min(max(top, 0.05), 1.0), 4)
    left, right = 42, WIDTH - 96
    x_at = _scale(0, x_ticks[-1], left, right)
    y, placed = 26, []
    for label, members in groups:
        rows = []
        label_y, y = y + 12, y + LABEL
        for bar in members:
            known = bar.rate is not None
            rows.append(
                {
                    "bar": bar,
                    "y": y,
                    "width": round(x_at(bar.rate) - left, 2) if known else 0,
                    "low": x_at(min(bar.interval[0], x_ticks[-1])) if known else None,
                    "high": x_at(min(bar.interval[1], x_ticks[-1])) if known else None,
                }
            )
            y += ROW
        y += GAP
        placed.append({"label": label, "label_y": label_y, "rows": rows})
    return {
        "kind": "bars",
        "title": title,
        "groups": placed,
        "left": left,
        "right": right,
        "height": y,
        "x_ticks": [(x_at(tick), _tick_text(tick, x_ticks, True)) for tick in x_ticks],
    }
