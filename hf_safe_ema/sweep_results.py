"""What a sweep has found: points averaged over seeds, the Pareto front, tables, plots, CSV and JSON.

Knows: the trials that sweep.py leaves in a study. Does not know: how they came there.
"""

import csv
import io
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .history import write_whole
from .safety.reports import wilson_interval
from .sweep_config import BASE, SEED
from .sweep_plots import plot_front, plot_heat_maps, plot_importances, weights_label
from .sweep_study import CHOSEN, OF, POINT, SAME_AS, WEIGHTS
from .tables import markdown_table, percent

if TYPE_CHECKING:
    import optuna

logger = logging.get_logger(__name__)


@dataclass
class Outcome:
    """What one setting and one set of weights came to, over the seeds.

    Args:
        settings (`dict`):
            What was varied, without the seed.
        weights (`str`):
            `"live"`, or the half-life of an average.
        asr, usefulness, over_refusal (list of `float`):
            A value for each seed: rates in [0, 1], the second objective in its own unit.
        judged, complied (`int`):
            Harmful prompts whose answer could be judged, and those answered, of all seeds together.
        seconds (list of `float`):
            Of each run.
        seeds (list):
            In the same order.
    """

    settings: dict[str, Any]
    weights: str
    asr: list[float] = field(default_factory=list)
    usefulness: list[float] = field(default_factory=list)
    over_refusal: list[float | None] = field(default_factory=list)
    judged: int = 0
    complied: int = 0
    seconds: list[float] = field(default_factory=list)
    seeds: list = field(default_factory=list)

    @property
    def mean_asr(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.asr)

    @property
    def mean_usefulness(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.usefulness)

    @property
    def mean_over_refusal(self) -> float | None:
        """Mean over seeds; None where it was not measured."""
        known = [value for value in self.over_refusal if value is not None]
        return statistics.fmean(known) if known else None

    @property
    def asr_interval(self) -> tuple[float, float]:
        """Of the mean ASR, 95%: over seeds Student's t, which counts what differs from run to run; of a single run Wilson's."""
        return mean_interval(self.asr) if len(self.asr) > 1 else wilson_interval(self.complied, self.judged)


# Two-sided 97.5% quantiles of Student's t by degrees of freedom.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def mean_interval(values: Sequence[float], low: float = 0.0, high: float = 1.0) -> tuple[float, float]:
    """95% interval of a mean by Student's t, cut to what is possible.

    Args:
        values (list of `float`):
            At least two.
        low, high (`float`, *optional*, default to 0 and 1):
            What is possible.

    Example:

    ```python
    >>> [round(bound, 3) for bound in mean_interval([0.30, 0.34, 0.38])]
    [0.241, 0.439]

    ```
    """
    mean, n = statistics.fmean(values), len(values)
    half = _T.get(n - 1, 2.1) * statistics.stdev(values) / math.sqrt(n)
    return max(low, mean - half), min(high, mean + half)


def outcomes(study: "optuna.Study") -> list[Outcome]:
    """All that was measured, seeds together, in the order of the runs.

    Args:
        study (`optuna.Study`):
            Of a sweep.
    """
    found: dict[tuple, Outcome] = {}
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name != "COMPLETE" or SAME_AS in trial.user_attrs:
            continue
        settings = json.loads(trial.user_attrs[CHOSEN])
        seed, weights, point = settings.pop(SEED, None), trial.params[WEIGHTS], trial.user_attrs[POINT]
        key = (json.dumps(settings, sort_keys=True), weights)
        outcome = found.setdefault(key, Outcome(settings, weights))
        outcome.asr.append(trial.values[0])
        outcome.usefulness.append(trial.values[1])
        outcome.over_refusal.append(point.get("over_refusal"))
        outcome.judged += point["counts"]["refusal"] + point["counts"]["compliance"]
        outcome.complied += point["counts"]["compliance"]
        outcome.seconds.append(trial.user_attrs["seconds"])
        outcome.seeds.append(seed)
    return list(found.values())


def pareto_front(found: Sequence[Outcome], direction: str) -> list[Outcome]:
    """Those than which no other is both safer and more useful, by their means, safest first.

    Args:
        found (list of [`Outcome`]):
            To choose from.
        direction (`str`):
            `"minimize"` or `"maximize"` usefulness.
    """
    sign = 1 if direction == "minimize" else -1
    points = sorted(found, key=lambda o: (o.mean_asr, sign * o.mean_usefulness))
    front, best = [], math.inf
    for outcome in points:
        if sign * outcome.mean_usefulness < best:
            best = sign * outcome.mean_usefulness
            front.append(outcome)
    return front


def format_outcomes(found: Sequence[Outcome], usefulness: str) -> str:
    """A Markdown table, a line an outcome.

    Args:
        found (list of [`Outcome`]):
            For example the front.
        usefulness (`str`):
            Name of the second objective.
    """
    names = list(dict.fromkeys(name for outcome in found for name in outcome.settings))
    header = [*names, "weights", "seeds", "ASR (95% interval)", "over-refusal", usefulness]
    rows = [
        [
            *(str(outcome.settings.get(name, "-")) for name in names),
            weights_label(outcome.weights),
            str(len(outcome.asr)),
            percent(outcome.mean_asr, outcome.asr_interval),
            percent(outcome.mean_over_refusal) if outcome.mean_over_refusal is not None else "-",
            f"{outcome.mean_usefulness:.3f}",
        ]
        for outcome in found
    ]
    return markdown_table(header, rows)


def write_sweep(study: "optuna.Study", folder: Path, usefulness: str, direction: str) -> dict[str, str]:
    """Write tables and plots of a study; replaces those of an earlier call.

    Args:
        study (`optuna.Study`):
            Of a sweep.
        folder (`Path`):
            Gets `trials.csv`, `sweep.json`, `pareto.png`, `heat_maps.png`, `importance.png`, as far as there is enough to show.
        usefulness, direction (`str`):
            Of the second objective.

    Returns:
        `dict[str, str]`: paths by what they are.
    """
    found = outcomes(study)
    front = pareto_front(found, direction)
    files = {"trials": str(folder / "trials.csv"), "results": str(folder / "sweep.json")}
    write_whole(files["trials"], _as_csv(study, usefulness))
    as_json = {
        "usefulness": usefulness,
        "direction": direction,
        "base": study.user_attrs.get(BASE),
        "outcomes": [{**asdict(o), "asr_interval": list(o.asr_interval), "on_front": o in front} for o in found],
        "failed": [
            {"run": t.number, "chosen": t.user_attrs.get(CHOSEN), "error": t.user_attrs.get("error")}
            for t in study.get_trials(deepcopy=False)
            if t.state.name == "FAIL"
        ],
    }
    write_whole(files["results"], json.dumps(as_json, indent=1) + "\n")
    if found:
        files["Pareto front"] = str(folder / "pareto.png")
        plot_front(found, front, study.user_attrs.get(BASE), usefulness, files["Pareto front"])
    axes = heat_map_axes(found)
    if axes is not None:
        files["heat maps"] = str(folder / "heat_maps.png")
        plot_heat_maps(found, axes, usefulness, files["heat maps"])
    importance = importances(study, usefulness)
    if importance:
        files["importance"] = str(folder / "importance.png")
        plot_importances(importance, files["importance"])
    return files


def _as_csv(study: "optuna.Study", usefulness: str) -> str:
    trials = [
        t
        for t in study.get_trials(deepcopy=False)
        if t.user_attrs.get(CHOSEN) and t.state.name in ("COMPLETE", "FAIL")
    ]
    names = list(dict.fromkeys(name for t in trials for name in json.loads(t.user_attrs[CHOSEN])))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "run",
            "state",
            *names,
            "weights",
            "asr",
            "asr_low",
            "asr_high",
            usefulness,
            "over_refusal",
            "unclear",
            "distance_to_base",
            "seconds",
            "error",
        ]
    )
    for trial in trials:
        chosen, point = json.loads(trial.user_attrs[CHOSEN]), trial.user_attrs.get(POINT) or {}
        writer.writerow(
            [
                trial.user_attrs.get(OF, trial.number),
                trial.state.name.lower(),
                *(chosen.get(name, "") for name in names),
                trial.params.get(WEIGHTS, ""),
                point.get("asr"),
                *(point.get("asr_interval") or ("", "")),
                point.get("metrics", {}).get(usefulness),
                point.get("over_refusal"),
                point.get("counts", {}).get("unclear"),
                point.get("distance_to_base"),
                trial.user_attrs.get("seconds"),
                trial.user_attrs.get("error"),
            ]
        )
    return out.getvalue()


def importances(study: "optuna.Study", usefulness: str) -> dict[str, dict[str, float]]:
    """How much each setting decides of each objective, by Optuna's fANOVA (Hutter et al., 2014); shares that sum to 1.

    Args:
        study (`optuna.Study`):
            Of a sweep.
        usefulness (`str`):
            Name of the second objective.

    Returns:
        `dict`: by objective and setting; empty where there is too little to tell, or no scikit-learn.
    """
    import optuna

    found = {}
    for index, objective in enumerate(("ASR", usefulness)):
        try:
            found[objective] = optuna.importance.get_param_importances(
                study,
                evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0),
                target=lambda t, i=index: t.values[i],
            )
        except (ValueError, RuntimeError, ImportError) as error:
            logger.warning(f"no importances of settings for {objective}: {error}")
    return {objective: values for objective, values in found.items() if values}


def heat_map_axes(found: Sequence[Outcome]) -> tuple[str, str] | None:
    """The two settings that a heat map shows: learning rate and batch size where both are varied, else the first two.

    Args:
        found (list of [`Outcome`]):
            Of a sweep.
    """
    values = defaultdict(set)
    for outcome in found:
        for name, value in outcome.settings.items():
            values[name].add(value)
    varied = [name for name, seen in values.items() if 1 < len(seen) <= 12]
    varied.sort(key=lambda name: ("learning_rate" not in name, "batch_size" not in name))
    return (varied[0], varied[1]) if len(varied) > 1 else None
