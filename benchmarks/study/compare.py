"""The methods of methods.py at the same held-out loss: what each one's curve says there, over seeds.

A method's points of one seed, the base model among them, are a curve of attack success rate (ASR) against held-out loss. Of two
neighbouring points the straight line counts; of points that another of the same method and seed beats in both, nothing (a practitioner
would not choose them). Outside a curve there is no value: a method that does not reach a loss is not compared there.

    python benchmarks/study/compare.py --results build/study/methods.jsonl --prompts advbench --losses 4.6 4.5
"""

import argparse
import itertools
import statistics
from collections import defaultdict
from pathlib import Path

from hf_safe_ema.history import read_jsonl
from hf_safe_ema.sweep_results import mean_interval
from hf_safe_ema.tables import markdown_table, percent

REFERENCE = "lower learning rate"
"""The method that every run has at hand; differences are from it, seed by seed."""


def curve(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points `(loss, ASR)` that no other beats in both, by rising loss.

    Args:
        points (list of `tuple[float, float]`):
            Of one method and seed.
    """
    kept, lowest = [], float("inf")
    for loss, asr in sorted(points):
        if asr < lowest:
            kept.append((loss, asr))
            lowest = asr
    return kept


def at_loss(points: list[tuple[float, float]], loss: float) -> float | None:
    """ASR of a curve at a loss; None outside it.

    Args:
        points (list of `tuple[float, float]`):
            From [`curve`].
        loss (`float`):
            Held-out, in nats a token.

    Example:

    ```python
    >>> at_loss([(4.0, 0.4), (5.0, 0.0)], 4.25)
    0.30000000000000004

    ```
    """
    for (low, high_asr), (high, low_asr) in itertools.pairwise(points):
        if low <= loss <= high:
            share = (loss - low) / (high - low)
            return high_asr + share * (low_asr - high_asr)
    return None


def curves(rows: list[dict], prompts: str) -> dict[str, dict[int, list[tuple[float, float]]]]:
    """Curves by method and seed; runs that are told apart by learning rate, clipping, ... alone make one.

    Args:
        rows (list of `dict`):
            Of methods.py.
        prompts (`str`):
            Prompt set whose ASR counts.
    """
    found: dict[str, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    base = {}
    for row in rows:
        point = (row["loss"], row[f"{prompts}_asr"])
        if row["method"] == "base":
            base[row["seed"]] = point
        else:
            found[row["method"]][row["seed"]].append(point)
        if row["method"] == "full":  # the last step at the usual rate is a point of what turns a knob from there
            for method in (
                "lower learning rate",
                "gradient clipping",
                "L2 pull to the start",
                "safe data",
                "early stopping of full",
            ):
                found[method][row["seed"]].append(point)
    return {
        method: {seed: curve([*points, *([base[seed]] if seed in base else [])]) for seed, points in seeds.items()}
        for method, seeds in found.items()
    }


def main() -> None:
    """Print a table: methods by loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--prompts", default="advbench", choices=["advbench", "builtin"])
    parser.add_argument("--losses", type=float, nargs="+", required=True, help="at which to compare")
    arguments = parser.parse_args()
    found = curves(read_jsonl(arguments.results), arguments.prompts)
    lines = []
    for method, seeds in sorted(found.items()):
        cells = [method]
        for loss in arguments.losses:
            here = {seed: at_loss(points, loss) for seed, points in seeds.items()}
            known = {seed: value for seed, value in here.items() if value is not None}
            if len(known) < 2 or len(known) < len(here):
                cells += ["not reached" if not known else f"{len(known)} of {len(here)} seeds", "-"]
                continue
            values = list(known.values())
            cells.append(percent(statistics.fmean(values), mean_interval(values)))
            reference = {seed: at_loss(found[REFERENCE][seed], loss) for seed in known if seed in found[REFERENCE]}
            differences = [known[seed] - value for seed, value in reference.items() if value is not None]
            if len(differences) < 2 or method == REFERENCE:
                cells.append("-")
                continue
            low, high = mean_interval(differences, -1, 1)
            cells.append(f"{100 * statistics.fmean(differences):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
        lines.append(cells)
    header = ["method"]
    for loss in arguments.losses:
        header += [f"ASR at loss {loss:g}", "points from lower learning rate"]
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()
