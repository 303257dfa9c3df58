"""The `hf-safe-ema` command: flags in, exit code out.

Knows: how a person types. Does not know: what is done; that is in demo.py and train.py, which also reads its own flags
(there are hundreds, most of them TRL's, and reading them takes seconds).
"""

import argparse
import sys
from pathlib import Path

from . import __version__


def half_life(text: str) -> int | float:
    """A half-life as typed: a whole number is steps, one with a point a fraction of the run.

    Args:
        text (`str`):
            For example `"50"` or `"0.25"`.

    Raises:
        argparse.ArgumentTypeError: with the reason.
    """
    from .decay import check_half_life

    try:
        value = float(text) if "." in text or "e" in text.lower() else int(text)
        check_half_life(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def positive(kind):
    """A parser for numbers above zero.

    Args:
        kind (`type`):
            `int` or `float`.
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: must be above 0")
        return value

    return parse


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="hf-safe-ema",
        description="Keep an aligned chat model safe while fine-tuning it, with an average of its weights.",
    )
    parser.add_argument("--version", action="version", version=f"hf_safe_ema {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="fine-tune a small aligned Llama on harmless data and see what happens to its safety",
        description="Fine-tune a chat model on harmless data with TRL's SFTTrainer and SafeEMACallback; show attack "
        "success rate (ASR), over-refusal and held-out loss of the base, the live and the averaged weights.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    from .demo import DemoConfig
    from .safety.judges import PRESETS

    defaults = DemoConfig()
    demo.add_argument("--model", default=defaults.model, help="'testbed', a model folder, or a hub name")
    demo.add_argument(
        "--train-file", help="instruction data (.jsonl, .json, .csv: Alpaca, Dolly, ORCA or TRL columns)"
    )
    demo.add_argument("--prompts-file", help="harmful prompts (.csv, .jsonl, .json, .txt), for example AdvBench's CSV")
    demo.add_argument(
        "--learning-rate", type=positive(float), default=defaults.learning_rate, help="peak, then constant"
    )
    demo.add_argument("--batch-size", type=positive(int), default=defaults.batch_size, help="rows per optimizer step")
    demo.add_argument("--steps", type=positive(int), default=defaults.steps, help="optimizer steps")
    demo.add_argument("--half-life", type=half_life, help="of the average: steps (50) or a fraction of the run (0.25)")
    demo.add_argument("--seed", type=int, default=defaults.seed, help="of the data order")
    demo.add_argument("--output-dir", help="for plot, history, responses and the averaged model; must not exist")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo's output folder")
    demo.add_argument("--json", metavar="FILE", help="write table, history and settings as one JSON object")
    judge = commands.add_parser(
        "judge",
        help="measure judges on responses that people have labelled, and against each other",
        description="Accuracy and bias of judges on a file of labelled responses (.csv, .jsonl, .json: prompt, response, "
        "label), and how far they agree with each other.",
    )
    judge.add_argument("file", help="labelled responses")
    judge.add_argument(
        "--judge",
        action="append",
        dest="judges",
        metavar="NAME",
        help=f"'keywords' (the default) or a published list ({', '.join(sorted(PRESETS))}); may be given several times",
    )
    judge.add_argument(
        "--cases", metavar="FILE", help="write the responses on which labels differ (they may be harmful)"
    )
    judge.add_argument("--json", metavar="FILE", help="write the numbers as one JSON object")
    commands.add_parser(
        "train",
        add_help=False,  # train.py has its own
        help="fine-tune a chat model as a YAML recipe and flags say (hf-safe-ema train --help)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv (`list[str]`, *optional*):
            Default: the process's own arguments.

    Returns:
        `int`: 0; 2 for input that cannot be used; 1 where training ended because `max_asr` was passed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["train"]:
        from . import train

        return train.main(argv[1:])
    arguments = vars(build_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        return COMMANDS[command](**arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"hf-safe-ema: error: {error}", file=sys.stderr)
        return 2


def demo(json: str | None, **settings) -> int:
    """`hf-safe-ema demo`.

    Args:
        json (`str`, *optional*):
            File for the result.
        settings:
            Of [`~hf_safe_ema.demo.DemoConfig`].
    """
    from .demo import DemoConfig, run_demo, write_json
    from .report import format_table

    _check_folder_of("--json", json)
    result = run_demo(DemoConfig(**settings))
    print("\n" + format_table(result["table"]) + "\n")
    if json:
        write_json(result, json)
    for what, where in result["files"].items():
        print(f"{what.replace('_', ' ')}: {where}")
    print(f"{result['seconds']:.0f} s")
    return 0


def judge(file: str, judges: list[str] | None, cases: str | None, json: str | None) -> int:
    """`hf-safe-ema judge`.

    Args:
        file (`str`):
            Labelled responses.
        judges (`list[str]`, *optional*):
            Names.
        cases, json (`str`, *optional*):
            Files to write.
    """
    from .judging import format_judged, judge_file, write_judged

    _check_folder_of("--json", json)
    _check_folder_of("--cases", cases)
    found = judge_file(file, judges or ["keywords"], cases)
    print(format_judged(found))
    if json:
        write_judged(found, json)
    return 0


COMMANDS = {"demo": demo, "judge": judge}


def _check_folder_of(flag: str, file: str | None) -> None:
    if file and not Path(file).resolve().parent.is_dir():
        raise ValueError(f"{flag} {file}: its folder does not exist; make it first")


if __name__ == "__main__":
    sys.exit(main())
