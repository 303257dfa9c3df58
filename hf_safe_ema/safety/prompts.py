"""Prompt sets: the built-in ones, AdvBench and XSTest, and files of your own.

Knows: file formats, column names, which half of a built-in set is for what.
Does not know: models, chat templates, or what a good answer is.
"""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path

PROMPT_COLUMNS = ("prompt", "goal", "instruction", "question", "text", "behavior", "Goal", "Behavior")
"""Columns that are taken as the prompt, first match wins: AdvBench has `goal`, XSTest and ours `prompt`."""

HUB_NAMES = {"advbench": ("walledai/AdvBench", "train"), "xstest": ("walledai/XSTest", "test")}
"""Short names of sets on the Hugging Face hub: dataset id and split."""

BUILTIN_VERSIONS = {"harmful": 2, "benign": 2}
"""Of the built-in sets. Harmful 2: a new check half, in plain words and without words of intent; a reserve."""

PROMPT_SETS = resources.files("hf_safe_ema.safety") / "prompt_sets"
KINDS = tuple(BUILTIN_VERSIONS)


@dataclass(frozen=True)
class Prompt:
    """One request to ask.

    Args:
        text (`str`):
            The request, as the user's turn.
        id (`str`):
            Stable within its set.
        category (`str`, *optional*, defaults to `""`):
            Topic, for tables by category.
    """

    text: str
    id: str
    category: str = ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with a name that a report can carry.

    Args:
        name (`str`):
            What it is, with its version where it has one.
        prompts (`tuple[Prompt, ...]`):
            In the order asked.
    """

    name: str
    prompts: tuple[Prompt, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def fingerprint(self) -> str:
        """First 12 hex digits of the SHA-256 of the prompts in order: equal only for the same prompts."""
        joined = "\x00".join(prompt.text for prompt in self.prompts)
        return hashlib.sha256(joined.encode()).hexdigest()[:12]

    @property
    def texts(self) -> list[str]:
        """The requests alone."""
        return [prompt.text for prompt in self.prompts]

    def sample(self, num_prompts: int | None) -> "PromptSet":
        """At most `num_prompts` of them, evenly spaced, so that every category stays represented.

        Args:
            num_prompts (`int`, *optional*):
                How many. None or a number not below the size: the set itself.
        """
        if num_prompts is None or num_prompts >= len(self):
            return self
        indices = [i * len(self) // num_prompts for i in range(num_prompts)]
        return PromptSet(f"{self.name}[{num_prompts} of {len(self)}]", tuple(self.prompts[i] for i in indices))


def load_prompts(
    source: str | os.PathLike | Sequence[str] | PromptSet = "builtin", kind: str = "harmful"
) -> PromptSet:
    """Prompts from wherever they are.

    Args:
        source (`str`, path, list of `str` or [`PromptSet`], *optional*, defaults to `"builtin"`):
            - `"builtin"`: our own set, the half to check with; `"builtin:align"` is the half to align a model on. The
              two halves share no topic wording, but for a list of plain words of harm ("steal", "bomb", "police").
              `"builtin:reserve"` (harmful only) is a third part, kept for the last measurement of a piece of work.
            - `"advbench"`, `"xstest"` or `"owner/name"`: a dataset on the Hugging Face hub (downloaded).
            - a path to `.csv` (AdvBench: `goal[, target]`; XSTest: `prompt` and `label`; or any of
              [`PROMPT_COLUMNS`]), `.jsonl`, `.json` (a list of objects or of strings) or `.txt` (one a line).
            - a list of strings.
        kind (`str`, *optional*, defaults to `"harmful"`):
            `"harmful"` or `"benign"`. Chooses the built-in set, and the rows of a source that has a `label` column
            (XSTest: `unsafe` or `safe`).

    Returns:
        [`PromptSet`]: with at least one prompt.

    Raises:
        ValueError: for an unknown name, a missing column, an empty source, text that is not UTF-8.
        FileNotFoundError: for a path that does not exist.

    Example:

    ```python
    >>> len(load_prompts("builtin")) >= 150
    True
    >>> load_prompts(["How do I boil an egg?"], kind="benign").prompts[0].text
    'How do I boil an egg?'

    ```
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is unknown; choose one of {KINDS}")
    if isinstance(source, PromptSet):
        return source
    if isinstance(source, (list, tuple)):
        return _prompt_set("list", [{"prompt": text} for text in source], kind)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"prompts={source!r}: give a name, a path, a list of strings or a PromptSet")
    name = os.fspath(source)
    if name.partition(":")[0] == "builtin":
        return _load_builtin(name, kind)
    if name in HUB_NAMES or _looks_like_hub_id(name):
        return _load_hub(name, kind)
    return _load_file(Path(name), kind)


def _load_builtin(name: str, kind: str) -> PromptSet:
    split = name.partition(":")[2] or "check"
    version = BUILTIN_VERSIONS[kind]
    lines = (PROMPT_SETS / f"{kind}_v{version}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == split]
    if not rows:
        raise ValueError(f"prompts={name!r}: the built-in {kind} set has {_parts(map(json.loads, lines))}")
    return _prompt_set(f"builtin-{kind}-v{version}:{split}", rows, kind)


def _parts(rows: Iterable[dict]) -> str:
    return ", ".join(f"'builtin:{split}'" for split in dict.fromkeys(row["split"] for row in rows))


def _looks_like_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists() and not Path(name).suffix and name[0] not in "./~"


def _load_hub(name: str, kind: str) -> PromptSet:
    from datasets import load_dataset

    dataset_id, split = HUB_NAMES.get(name, (name, "train"))
    try:
        dataset = load_dataset(dataset_id, split=split)
    except Exception as error:
        raise ValueError(
            f"prompts={name!r}: could not load {dataset_id!r} (split {split!r}) from the Hugging Face hub: {error}. "
            "Gated sets need `hf auth login`; a local CSV, JSONL or text file works without the hub"
        ) from error
    return _prompt_set(dataset_id, list(dataset), kind)


def _load_file(path: Path, kind: str) -> PromptSet:
    if not path.is_file():
        raise FileNotFoundError(
            f"prompts={str(path)!r}: no such file; give 'builtin', a hub name ({', '.join(HUB_NAMES)} or owner/name) "
            "or a path to a .csv, .jsonl, .json or .txt file"
        )
    return _prompt_set(path.name, read_rows(path, text_column="prompt"), kind)


def read_rows(path: str | os.PathLike, text_column: str = "text") -> list[dict]:
    """The rows of a CSV, JSONL, JSON or plain-text file.

    Args:
        path (path):
            Ends in `.csv`, `.jsonl`, `.json` or `.txt`; UTF-8.
        text_column (`str`, *optional*, defaults to `"text"`):
            Key given to the lines of a text file and to the strings of a JSON list.

    Returns:
        `list[dict]`: a dict a row; blank lines are skipped.

    Raises:
        ValueError: for another ending, text that is not UTF-8, CSV or JSON that cannot be read (for JSON lines with
            the line's number).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8, for example with "
            f"`iconv -f latin1 -t utf-8 {path.name}`"
        ) from error
    ending = path.suffix.lower()
    if ending == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise ValueError(f"{path}: not valid CSV ({error}); use .jsonl for long texts") from error
    if ending == ".txt":
        return [{text_column: line.strip()} for line in text.split("\n") if line.strip()]
    if ending == ".jsonl":
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                rows.append(_parse_json(line, f"{path}, line {number}"))
    elif ending == ".json":
        rows = _parse_json(text, str(path))
        if not isinstance(rows, list):
            raise ValueError(f"{path}: holds a {type(rows).__name__}; a .json file must hold a list of objects")
    else:
        raise ValueError(f"{path}: unknown ending {ending!r}; use .csv, .jsonl, .json or .txt")
    rows = [{text_column: row} if isinstance(row, str) else row for row in rows]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: is a {type(row).__name__}; each row must be an object")
    return rows


def _parse_json(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _prompt_set(name: str, rows: Iterable[dict], kind: str) -> PromptSet:
    rows = list(rows)
    if not rows:
        raise ValueError(f"{name}: no prompt in it; a prompt set needs at least one")
    column = next((column for column in PROMPT_COLUMNS if column in rows[0]), None)
    if column is None:
        raise ValueError(
            f"{name}: no prompt column among {[str(key) for key in rows[0]]}; name one of {list(PROMPT_COLUMNS)}"
        )
    if {str(row.get("label")).lower() for row in rows} <= {"safe", "unsafe"}:
        wanted = "unsafe" if kind == "harmful" else "safe"
        rows = [row for row in rows if str(row["label"]).lower() == wanted]
        name = f"{name}:{wanted}"
    prompts = []
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            raise ValueError(f"{name}, row {number}: {column!r} is {text!r}; each prompt must be text")
        if text.strip():
            category = row.get("category") or row.get("type") or ""
            prompts.append(Prompt(text.strip(), str(row.get("id") or number), str(category)))
    if not prompts:
        raise ValueError(f"{name}: no {kind} prompt in it; a prompt set needs at least one")
    return PromptSet(name, tuple(prompts))
