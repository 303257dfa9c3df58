"""One HTML page of what a run or a check has found: nothing outside it is loaded, and nothing in a response can act.

Knows: the templates, how they are filled and escaped, and the page's own policy. Does not know: what numbers mean (meaning.py),
where things lie in a plot (charts.py), or where responses are kept (responses.py).
"""

import base64
import functools
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from transformers.utils import logging

from . import __version__
from .history import HISTORY_NAME, PAGE_NAME, RESPONSES_FOLDER, read_jsonl, write_whole
from .meaning import cautions, explain, headline
from .page_parts import check_parts, run_parts
from .report import LABELS as REPORT_LABELS
from .report import summarise, table_cells
from .responses import LONGEST, Answer, answer_of, by_prompt, read_results, read_run, select
from .safety.judges import LABELS
from .task_results import TaskResult, task_cells
from .visible import split_hidden, visible

logger = logging.get_logger(__name__)

_WORDS = {
    **REPORT_LABELS,
    "harmful": "harmful prompt",
    "benign": "harmless prompt",
    "refusal": "refused",
    "compliance": "answered",
}
_FACETS = {"kind": "prompts", "prompts": "set", "weights": "weights", "step": "step", "model": "model", "judge": "judge",
           "label": "verdict"}  # fmt: skip


def write_page(output_dir: str | os.PathLike, path: str | os.PathLike | None = None, responses: bool = True) -> Path:
    """Write the page of an output folder, of a run or of a check.

    Args:
        output_dir (path):
            Of `hf-safe-ema demo`, `train` or `check`, or of any run with the callback.
        path (path, *optional*):
            File to write. Default: `report.html` in `output_dir`; `_report.html`, which no upload to the hub takes along, if
            the run keeps its responses out of uploads.
        responses (`bool`, *optional*, defaults to `True`):
            Whether the page holds what was asked and answered.

    Returns:
        `Path`: of the page.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it holds nothing to report on, or something broken.

    Example:

    ```python
    >>> write_page("nowhere")
    Traceback (most recent call last):
    FileNotFoundError: nowhere: no such folder; give the output folder of hf-safe-ema demo, train or check

    ```
    """
    folder = Path(output_dir)
    advice = "give the output folder of hf-safe-ema demo, train or check"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; {advice}")
    if path is None:
        hidden = responses and (folder / f"_{RESPONSES_FOLDER}").is_dir()
        path = folder / (f"_{PAGE_NAME}" if hidden else PAGE_NAME)
    if (folder / HISTORY_NAME).exists():
        return write_run_page(folder, path, responses=responses)
    if (folder / "results.json").exists():
        results, tasks, problems = read_results(folder)
        shown = problems if responses else ()
        return write_check_page(results, path, responses=responses, problems=shown, tasks=tasks)
    raise ValueError(f"{folder} holds neither {HISTORY_NAME} nor results.json; {advice}")


def write_run_page(
    output_dir: str | os.PathLike, path: str | os.PathLike, title: str = "", responses: bool = True
) -> Path:
    """Write the page of a training run.

    Args:
        output_dir (path):
            With `safety_history.jsonl`.
        path (path):
            File to write.
        title (`str`, *optional*, defaults to `""`):
            What was trained, and how.
        responses (`bool`, *optional*, defaults to `True`):
            Whether the page holds what was asked and answered.

    Returns:
        `Path`: of the page.

    Raises:
        ValueError: for a broken history.
    """
    rows = _read_history(Path(output_dir) / HISTORY_NAME)
    steps = [row["step"] for row in rows if row["type"] == "report"]
    answers, problems = read_run(output_dir, steps) if responses and steps else ([], [])
    summary = summarise(rows)
    header, lines = table_cells(summary)
    return _write(
        path,
        "run.html.jinja",
        title="Safety of a fine-tuning run",
        subtitle=title or Path(output_dir).resolve().name,
        summary=summary,
        headline=headline(summary),
        header=header,
        lines=lines,
        meaning=explain(rows, summary) if summary else [],
        cautions=[*cautions(rows), *problems],
        with_responses=responses,
        **run_parts(rows, summary),
        **_responses(answers, "output_dir/safety/"),
    )


def write_check_page(
    results: Sequence,
    path: str | os.PathLike,
    title: str = "",
    responses: bool = True,
    problems: Sequence[str] = (),
    tasks: Sequence[TaskResult] = (),
) -> Path:
    """Write the page of a check of models as they are.

    Args:
        results (list of [`~hf_safe_ema.set_results.SetResult`]):
            From [`~hf_safe_ema.checking.run_check`].
        path (path):
            File to write.
        title (`str`, *optional*, defaults to `""`):
            Below the headline. Default: the models' names.
        responses (`bool`, *optional*, defaults to `True`):
            Whether the page holds what was asked and answered.
        problems (list of `str`, *optional*):
            What a reader should know besides.
        tasks (list of [`~hf_safe_ema.task_results.TaskResult`], *optional*):
            How useful the models are.

    Returns:
        `Path`: of the page.
    """
    answers = [
        answer_of(row, result.kind, result.prompt_set, {"model": result.model, "judge": result.judge})
        for result in results
        for row in (result.responses if responses else ())
    ]
    parts = check_parts(results)
    return _write(
        path,
        "check.html.jinja",
        title="Safety check",
        subtitle=title or ", ".join(dict.fromkeys(result.model for result in [*results, *tasks])),
        with_responses=responses,
        tasks=task_cells(tasks) if tasks else None,
        **{**parts, "cautions": [*(parts["cautions"] if results or not tasks else ()), *problems]},
        **_responses(answers, "verdicts/ of the output folder"),
    )


def write_run_page_or_warn(output_dir: str | os.PathLike, title: str, responses: bool = True) -> Path | None:
    """Write `report.html` at the end of a run, which must not fail for it.

    Args:
        output_dir (path):
            Of the run.
        title (`str`):
            What was trained, and how.
        responses (`bool`, *optional*, defaults to `True`):
            False for a run that uploads its folder.

    Returns:
        `Path`: of the page; None if it could not be written, which is logged.
    """
    try:
        return write_run_page(output_dir, Path(output_dir) / PAGE_NAME, title, responses)
    except Exception as error:
        logger.warning(f"{PAGE_NAME} was not written: {type(error).__name__}: {error}")
        return None


def _read_history(path: Path) -> list[dict]:
    rates = ("asr", "asr_interval", "over_refusal", "over_refusal_interval")
    wanted = {
        "report": ("weights", "counts", "benign_counts", "distance_to_base", *rates),
        "loss": ("live", "ema", "dataset"),
        "error": ("what", "error"),
    }
    try:
        rows = read_jsonl(path)
        for number, row in enumerate(rows, 1):
            missing = [key for key in ("type", "step", *wanted.get(row.get("type"), ())) if key not in row]
            if missing:
                raise ValueError(f"row {number} has no {missing[0]!r}")
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f"{path} is not the history of a run ({error}); give the folder of another run") from error
    return rows


def _responses(answers: Sequence[Answer], place: str) -> dict:
    chosen, left_out = select(answers)
    facets: dict[str, dict[str, None]] = {}
    for answer in chosen:
        for name, value in {"kind": answer.kind, **_group(answer), **answer.facets, "label": answer.label}.items():
            facets.setdefault(name, {})[value] = None
    return {
        "groups": by_prompt(chosen),
        "shown": len(chosen),
        "left_out": left_out,
        "place": place,
        "facets": {name: list(values) for name, values in facets.items() if len(values) > 1},
    }


def _group(answer: Answer) -> dict[str, str]:
    return {"prompts": answer.group} if answer.group else {}


def _write(path: str | os.PathLike, template: str, **values) -> Path:
    style, script = _part("page.css"), _part("page.js")
    policy = (
        f"default-src 'none'; style-src 'sha256-{_digest(style)}'; script-src 'sha256-{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = _environment().get_template(template).render(
        # They are ours, not data: escaped, they would not be CSS and JavaScript any more.
        style=Markup(style), script=Markup(script), policy=policy, version=__version__, **values,
    )  # fmt: skip
    write_whole(path, page)
    return Path(path)


@functools.cache
def _part(name: str) -> str:
    return (Path(__file__).parent / "pages" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("hf_safe_ema", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Whatever a template prints, a judge's name or an error as much as a response, is made harmless on its way.
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else visible(value),
    )
    environment.globals.update(
        names=REPORT_LABELS, facet_names=_FACETS, facet_values=_WORDS, known_labels=LABELS, longest=LONGEST
    )
    environment.filters.update(boxed=boxed, shorten=shorten, cut=cut)
    return environment


def boxed(text: str) -> Markup:
    """Text for the body of the page, hidden characters as small boxes with their names.

    Args:
        text (`str`):
            Anything.

    Example:

    ```python
    >>> print(boxed("<b>\\u202e"))
    &lt;b&gt;<span class="code">U+202E</span>

    ```
    """
    return Markup("").join(
        Markup('<span class="code">{}</span>').format(piece) if named else escape(piece)
        for piece, named in split_hidden(text)
    )


def shorten(text: str, length: int) -> str:
    """The beginning of a name, with an ellipsis if that is not all.

    Args:
        text (`str`):
            Anything.
        length (`int`):
            In characters.
    """
    return text if len(text) <= length else f"{text[: length - 1]}…"


def cut(text: str) -> str:
    """As much of a prompt or response as a page shows.

    Args:
        text (`str`):
            Anything.
    """
    return text[:LONGEST]
