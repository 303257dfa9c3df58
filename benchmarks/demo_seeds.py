"""The demo over several seeds, as a table: mean and range of attack success rate, over-refusal and held-out loss.

Each seed is a run of its own of `hf-safe-ema demo` in a process of its own, so that the numbers are those a user gets.

    python benchmarks/demo_seeds.py --seeds 0 1 2 3 4 [-- any flag of hf-safe-ema demo]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PERCENT = ("asr", "over_refusal")


def run_seed(seed: int, flags: list[str], folder: Path) -> dict:
    """One demo run.

    Args:
        seed (`int`):
            Passed on.
        flags (list of `str`):
            Of `hf-safe-ema demo`.
        folder (`Path`):
            To write to.

    Returns:
        `dict`: what `--json` wrote.
    """
    result = folder / f"seed-{seed}.json"
    command = [sys.executable, "-m", "hf_safe_ema.cli", "demo", "--seed", str(seed), "--json", str(result)]
    command += ["--output-dir", str(folder / f"seed-{seed}"), *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(result.read_text(encoding="utf-8"))


def show(value: float | None, key: str) -> str:
    """A number as the table has it.

    Args:
        value (`float`, *optional*):
            To show.
        key (`str`):
            What it is.
    """
    if value is None:
        return "-"
    return f"{value:.1%}" if key in PERCENT else f"{value:.3f}"


def main() -> None:
    """Run the seeds one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the data order")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    arguments, flags = parser.parse_known_args()
    flags = [flag for flag in flags if flag != "--"]
    with tempfile.TemporaryDirectory() as folder:
        results = []
        for seed in arguments.seeds:
            results.append(run_seed(seed, flags, Path(folder)))
            print(f"seed {seed}: {results[-1]['seconds']:.0f} s", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    keys = ("asr", "over_refusal", "heldout_loss")
    print(
        "| weights | "
        + " | ".join(f"{key.replace('_', ' ')}: mean (lowest to highest)" for key in keys)
        + " | by seed: asr |"
    )
    print("|---" * (len(keys) + 2) + "|")
    for weights in ("base", "live", "ema"):
        rows = [row for result in results for row in result["table"] if row["weights"] == weights]
        cells = []
        for key in keys:
            values = [row[key] for row in rows if row[key] is not None]
            low, high, mean = min(values), max(values), statistics.mean(values)
            cells.append(f"{show(mean, key)} ({show(low, key)} to {show(high, key)})")
        print(
            f"| {weights} | " + " | ".join(cells) + " | " + ", ".join(show(row["asr"], "asr") for row in rows) + " |"
        )


if __name__ == "__main__":
    main()
