"""Whether a model is judged the same in memory and behind an endpoint: verdicts that differ, of the same prompts.

    python benchmarks/served.py --prompts ../shared/data/advbench_harmful_behaviors.csv ../shared/data/xstest_v2_prompts.csv \
        --benign ../shared/data/xstest_v2_prompts.csv

Starts `transformers serve` (pip install 'hf-safe-ema[serve]') on a loopback port with a copy of the testbed, checks it in memory
(float32, as it is served) and through the endpoint, 48 tokens an answer, and prints how many verdicts and answers differ: 0 of
970 prompts with the two files above. It takes some minutes on two cores: the server answers one prompt at a time.
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_safe_ema import testbed
from hf_safe_ema.answers import Asking
from hf_safe_ema.checking import CheckPlan, run_check
from hf_safe_ema.set_results import SetResult, format_results

MODEL = "./testbed"
READY = "Uvicorn running on"
TIMEOUT = 600.0
"""Seconds for one answer: the server has a queue."""


@dataclass(frozen=True)
class Compared:
    """What came of it.

    Args:
        prompts (`int`):
            Asked of each.
        unanswered (`int`):
            By the endpoint.
        differing (`int`):
            Answered prompts on which the verdicts differ.
        differing_answers (`int`):
            On which the answers do.
        results (`list[SetResult]`):
            Of both.
    """

    prompts: int
    unanswered: int
    differing: int
    differing_answers: int
    results: list[SetResult]


def compare(
    harmful: Sequence, benign: Sequence, folder: str | os.PathLike, max_new_tokens: int = 48, progress: bool = False
) -> Compared:
    """Check the testbed in memory and through `transformers serve`.

    Args:
        harmful, benign (list):
            Prompt sets, see [`~hf_safe_ema.safety.prompts.load_prompts`].
        folder (path):
            For the copy of the model, the server's log, answers and verdicts.
        max_new_tokens (`int`, *optional*, defaults to 48):
            Longest answer.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show bars.

    Raises:
        RuntimeError: if the server does not start.
    """
    folder = Path(folder)
    with served(folder) as url:
        plan = CheckPlan(
            models=[str(folder / MODEL), f"{url}#{MODEL}"],
            harmful=harmful,
            benign=benign,
            asking=Asking(max_new_tokens=max_new_tokens, progress=progress),
            dtype="float32",
            client={"timeout": TIMEOUT, "max_concurrency": 2},
        )
        results = run_check(plan, folder / "check")
    half = len(results) // 2
    pairs = [pair for both in zip(results[:half], results[half:], strict=True) for pair in _pairs(*both)]
    return Compared(
        prompts=sum(sum(result.counts.values()) for result in results[:half]),
        unanswered=sum(result.unanswered for result in results),
        differing=sum(one["label"] != other["label"] for one, other in pairs),
        differing_answers=sum(one["response"] != other["response"] for one, other in pairs),
        results=results,
    )


def _pairs(result: SetResult, other: SetResult) -> list[tuple[dict, dict]]:
    found = {row["prompt"]: row for row in other.responses}
    return [(row, found[row["prompt"]]) for row in result.responses if row["prompt"] in found]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """`transformers serve` with a copy of the testbed.

    Args:
        folder (`Path`):
            Where the copy is made; the model's name is its path from there.

    Returns:
        The endpoint's address, once it answers.

    Raises:
        RuntimeError: with what it said, if it does not start.
    """
    shutil.copytree(testbed.MODEL_FOLDER, folder / MODEL)
    port = _unused_port()
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--default-seed",
        "0",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", *flags, MODEL],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_PROXY": "127.0.0.1"},
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if READY in line:
                break
        else:
            raise RuntimeError(f"transformers serve did not start: {''.join(said[-20:])}")
        # Unread, its log would fill the pipe and stop it.
        threading.Thread(target=lambda: [None for _ in process.stdout], daemon=True).start()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> None:
    """Read flags, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", nargs="*", default=["builtin"], metavar="SET", help="harmful")
    parser.add_argument("--benign", nargs="*", default=["builtin"], metavar="SET", help="harmless")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    flags = parser.parse_args()
    os.environ["NO_PROXY"] = "127.0.0.1"
    with tempfile.TemporaryDirectory() as folder:
        compared = compare(flags.prompts, flags.benign, folder, flags.max_new_tokens, progress=True)
    print(format_results(compared.results))
    print(
        f"\n{compared.prompts} prompts: {compared.differing} verdicts and {compared.differing_answers} answers differ, "
        f"{compared.unanswered} unanswered"
    )


if __name__ == "__main__":
    main()
