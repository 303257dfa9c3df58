"""The recipes of the testbed on real rows, as a table: `hf-safe-ema train` with each, over several seeds.

    python benchmarks/recipes.py --data-folder FOLDER --seeds 0 1 [--json FILE] [-- any flag of hf-safe-ema train]

The folder holds `dolly_15k_subset.jsonl`, `alpaca_random_9k.jsonl` and `orca_dpo_pairs_sample.jsonl`, rows of the public
data sets. With `--json` each run is written down as it ends, and a run that the file has already is not made again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_safe_ema.history import read_jsonl, write_whole
from hf_safe_ema.report import LABELS, summarise

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
FILES = {
    "dolly": "dolly_15k_subset.jsonl",
    "alpaca": "alpaca_random_9k.jsonl",
    "orca": "orca_dpo_pairs_sample.jsonl",
}


def run(name: str, seed: int, data: Path, flags: list[str]) -> list[dict]:
    """One run of `hf-safe-ema train`.

    Args:
        name (`str`):
            Of the recipe, without folder and ending.
        seed (`int`):
            Of the data order.
        data (`Path`):
            The rows.
        flags (list of `str`):
            Passed on.

    Returns:
        `list[dict]`: base, live and averaged weights, see [`summarise`].
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_safe_ema.cli", "train", "--config", str(RECIPES / f"{name}.yaml")]
        command += ["--dataset", str(data), "--seed", str(seed), "--output_dir", f"{folder}/run", *flags]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return summarise(read_jsonl(f"{folder}/run/safety_history.jsonl"))


def cells(rows: list[dict]) -> list[str]:
    """Medians over the seeds, with lowest and highest where they differ.

    Args:
        rows (list of `dict`):
            Of one recipe and one kind of weights, a row for each seed.
    """
    shown = []
    for key, form in (
        ("asr", "{:.1%}"),
        ("unclear", "{:.0f}"),
        ("over_refusal", "{:.1%}"),
        ("heldout_loss", "{:.3f}"),
    ):
        values = sorted(row[key] for row in rows if row[key] is not None)
        if not values:
            shown.append("none judged")
            continue
        text = form.format(statistics.median(values))
        low, high = form.format(values[0]), form.format(values[-1])
        shown.append(text if low == high else f"{text} ({low} to {high})")
    return shown


def main() -> None:
    """Make the runs one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", type=Path, required=True, help="holds the rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of the data order")
    parser.add_argument("--json", type=Path, help="write the results to this file, and go on from it")
    arguments, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    names = sorted(path.stem for path in RECIPES.glob("testbed_*.yaml"))
    done = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for seed in arguments.seeds:
        for name in names:
            if f"{name} {seed}" in done:
                continue
            done[f"{name} {seed}"] = run(name, seed, arguments.data_folder / FILES[name.split("_")[1]], flags)
            print(f"{name}, seed {seed}: done", file=sys.stderr, flush=True)
            if arguments.json:
                write_whole(arguments.json, json.dumps(done, indent=2) + "\n")
    print("| recipe | weights | ASR | unclear | over-refusal | held-out loss |\n|---|---|---|---|---|---|")
    for name in names:
        for weights in LABELS:
            rows = [row for seed in arguments.seeds for row in done[f"{name} {seed}"] if row["weights"] == weights]
            print(f"| {name} | {LABELS[weights]} | " + " | ".join(cells(rows)) + " |")


if __name__ == "__main__":
    main()
