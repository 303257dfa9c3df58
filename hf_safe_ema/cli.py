"""The `hf-safe-ema` command: flags in, exit code out.

Knows: how a person types. Does not know: what is done; that is in demo.py and train.py, which also reads its own flags
(there are hundreds, most of them TRL's, and reading them takes seconds).
"""

import argparse
import sys
from pathlib import Path

from . import __version__
from .safety.judges import PRESETS


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
    _add_check(commands)
    _add_report(commands)
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
    _add_sweep(commands)
    commands.add_parser(
        "train",
        add_help=False,  # train.py has its own
        help="fine-tune a chat model as a YAML recipe and flags say (hf-safe-ema train --help)",
    )
    return parser


def _add_check(commands) -> None:
    check = commands.add_parser(
        "check",
        help="check models or endpoints as they are, without training",
        description="Ask models harmful and harmless prompts, and judge the answers. Answers and verdicts are kept in the "
        "output folder: a check that was stopped, or is called again with more models, sets or judges, does what is missing.",
    )
    check.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="'testbed', a folder or hub name of a model or adapter, or an endpoint as http://HOST/v1#MODEL",
    )
    check.add_argument("--output-dir", required=True, help="for answers, verdicts and results; may hold earlier ones")
    check.add_argument(
        "--prompts",
        nargs="*",
        default=["builtin"],
        metavar="SET",
        help="harmful: 'builtin', 'advbench', a hub name, a file",
    )
    check.add_argument(
        "--benign",
        nargs="*",
        default=["builtin"],
        metavar="SET",
        help="harmless: 'builtin', 'xstest', a hub name, a file",
    )
    check.add_argument(
        "--judge",
        action="append",
        dest="judges",
        metavar="NAME",
        help=f"'keywords' (the default), a published list ({', '.join(sorted(PRESETS))}), 'llama-guard:MODEL', "
        "'harmbench:MODEL', or 'llm:RUBRIC:MODEL' with rubric qi, strongreject, refusal, or mt-bench for the answers to tasks; "
        "may be given several times",
    )
    check.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="FILE",
        help="what the models are to be useful for (.jsonl, .json, .csv, .parquet: GSM8K, MT-Bench, Alpaca, Dolly, or prompt "
        "and answer): exact match where references hold '#### NUMBER', else ROUGE-L; they may need a larger --max-new-tokens",
    )
    check.add_argument("--num-prompts", type=positive(int), help="at most so many of each set and file, evenly spaced")
    check.add_argument("--max-new-tokens", type=positive(int), default=128, help="longest answer (128)")
    check.add_argument("--system-prompt", help="sent before each prompt")
    check.add_argument(
        "--batch-size", type=positive(int), help="prompts at a time in memory (default: as many as fit)"
    )
    check.add_argument("--dtype", default="auto", help="of weights in memory (auto)")
    check.add_argument("--device", help="for weights in memory (default: an accelerator if there is one)")
    check.add_argument("--end-early", action="store_true", help="end answers once all verdicts are settled")
    check.add_argument("--timeout", type=positive(float), default=60.0, help="of an endpoint's reply, in seconds (60)")
    check.add_argument("--concurrency", type=positive(int), default=8, help="requests at a time to an endpoint (8)")
    check.add_argument("--judge-url", help="endpoint of an llm judge (default: OPENAI_BASE_URL, or OpenAI)")
    check.add_argument("--judge-max-requests", type=positive(int), help="an llm judge's budget")
    check.add_argument("--judge-max-tokens", type=positive(int), help="an llm judge's budget")
    check.add_argument(
        "--judge-price", nargs=2, type=positive(float), metavar="USD", help="per million tokens in and out"
    )
    check.add_argument("--json", metavar="FILE", help="write the results as one JSON object")
    check.add_argument("--html", metavar="FILE", help="write the results and responses as one page")


def _add_sweep(commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="fine-tune with many settings and find what is safe and useful",
        description="Make the runs that a YAML file describes, as an Optuna study of attack success rate against held-out loss; "
        "write their Pareto front, heat maps, importances, CSV and JSON. Called again it goes on; several processes or machines "
        "may call it at once with the same storage.",
    )
    sweep.add_argument(
        "--config", required=True, metavar="SWEEP.yaml", help="what is varied (examples/sweep.yaml is one)"
    )
    sweep.add_argument("--output-dir", help="in place of the file's output_dir")
    sweep.add_argument(
        "--storage", metavar="URL", help="database that machines share, as Optuna takes it (default: SQLite)"
    )
    sweep.add_argument("--trials", type=positive(int), help="in place of the file's trials: runs that a sampler makes")
    sweep.add_argument("--retry-failed", action="store_true", help="make runs again that failed before")
    sweep.add_argument("--dry-run", action="store_true", help="say which runs there are, and make none")
    sweep.add_argument(
        "--report-only", action="store_true", help="write tables and plots of what there is, and make no run"
    )


def _add_report(commands) -> None:
    report = commands.add_parser(
        "report",
        help="write what a run or a check has found as one HTML page",
        description="Write one self-contained HTML page from the output folder of hf-safe-ema demo, train or check, or of any "
        "run with SafeEMACallback: plots, tables, what is counted how, and the responses, which may be harmful.",
    )
    report.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a run or a check")
    report.add_argument("--html", metavar="FILE", help="page to write (default: report.html in OUTPUT_DIR)")
    report.add_argument("--without-responses", action="store_true", help="leave out what was asked and answered")


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
    except (ValueError, TypeError, OSError, ImportError) as error:
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


def check(
    models: list[str], output_dir: str, prompts: list[str], benign: list[str], judges: list[str] | None, **flags
) -> int:
    """`hf-safe-ema check`.

    Args:
        models (`list[str]`):
            Names.
        output_dir (`str`):
            Folder.
        prompts, benign (`list[str]`):
            Prompt sets.
        judges (`list[str]`, *optional*):
            Names.
        flags:
            The other flags.
    """
    from .answers import Asking
    from .checking import CheckPlan, run_plan, write_results
    from .set_results import format_results
    from .task_results import format_tasks

    for flag in ("json", "html"):
        _check_folder_of(f"--{flag}", flags[flag])
    plan = CheckPlan(
        models=models,
        harmful=prompts,
        benign=benign,
        judges=judges or ["keywords"],
        asking=Asking(flags["system_prompt"], flags["max_new_tokens"], flags["batch_size"] or "auto"),
        num_prompts=flags["num_prompts"],
        ends_early=flags["end_early"],
        dtype=flags["dtype"],
        device=flags["device"],
        client={"timeout": flags["timeout"], "max_concurrency": flags["concurrency"]},
        llm_options={
            "base_url": flags["judge_url"],
            "cache": Path(output_dir) / "judge-cache.sqlite",
            "max_requests": flags["judge_max_requests"],
            "max_tokens": flags["judge_max_tokens"],
            "price_per_million": flags["judge_price"] and tuple(flags["judge_price"]),
        },
        tasks=flags["tasks"],
    )
    checked = run_plan(plan, output_dir)
    results, tasks = checked.results, checked.tasks
    tables = (format_results(results) if results else "", format_tasks(tasks) if tasks else "")
    print("\n\n".join(filter(None, tables)))
    if flags["json"]:
        write_results(results, flags["json"], tasks)
    if flags["html"]:
        from .page import write_check_page

        write_check_page(results, flags["html"], tasks=tasks)
    return 0


def sweep(config: str, retry_failed: bool, dry_run: bool, report_only: bool, **instead) -> int:
    """`hf-safe-ema sweep`.

    Args:
        config (`str`):
            YAML file.
        retry_failed (`bool`):
            Whether to make failed runs again.
        dry_run, report_only (`bool`):
            Whether to make no run.
        instead:
            Settings in place of the file's.
    """
    from .sweep import count_runs, run_sweep
    from .sweep_config import read_sweep
    from .sweep_results import format_outcomes, outcomes, pareto_front, write_sweep
    from .sweep_study import open_study

    settings = read_sweep(config, **instead)
    if dry_run:
        print(
            f"{count_runs(settings)} runs, each of {', '.join(settings.weights)} weights; study {settings.storage_url}"
        )
        for chosen in settings.grid():
            print(", ".join(f"{name} {value}" for name, value in chosen.items()))
        return 0
    study = open_study(settings) if report_only else run_sweep(settings, retry_failed)
    found = outcomes(study)
    files = write_sweep(study, Path(settings.output_dir), settings.usefulness, settings.direction)
    if found:
        front = pareto_front(found, settings.direction)
        print(f"\nPareto front, {len(front)} of {len(found)}:\n\n{format_outcomes(front, settings.usefulness)}\n")
    else:
        print("no run has finished")
    for what, where in files.items():
        print(f"{what}: {where}")
    return 0


def report(output_dir: str, html: str | None, without_responses: bool) -> int:
    """`hf-safe-ema report`.

    Args:
        output_dir (`str`):
            Of a run or a check.
        html (`str`, *optional*):
            File to write.
        without_responses (`bool`):
            Whether to leave out what was asked and answered.
    """
    from .page import write_page

    _check_folder_of("--html", html)
    print(f"report: {write_page(output_dir, html, responses=not without_responses)}")
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


COMMANDS = {"check": check, "demo": demo, "judge": judge, "report": report, "sweep": sweep}


def _check_folder_of(flag: str, file: str | None) -> None:
    if file and not Path(file).resolve().parent.is_dir():
        raise ValueError(f"{flag} {file}: its folder does not exist; make it first")


if __name__ == "__main__":
    sys.exit(main())
