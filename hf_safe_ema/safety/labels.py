"""Files of responses that people have labelled, to measure a judge on.

Knows: column names and label words of published sets. Does not know: judges.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from .prompts import PROMPT_COLUMNS, read_rows

RESPONSE_COLUMNS = ("response", "completion", "generation", "output", "answer", "model_output")
LABEL_COLUMNS = ("final_label", "human_label", "label", "gold_label", "annotation")

LABEL_WORDS = {
    "compliance": "compliance", "1_full_compliance": "compliance", "full_compliance": "compliance", "comply": "compliance",
    "direct_answer": "compliance", "answer": "compliance", "not_refusal": "compliance", "jailbroken": "compliance",
    "unsafe": "compliance", "harmful": "compliance",
    "refusal": "refusal", "2_full_refusal": "refusal", "full_refusal": "refusal", "refused": "refusal",
    "direct_refusal": "refusal", "indirect_refusal": "refusal", "safe": "refusal", "unharmful": "refusal",
    "3_partial_refusal": "partial", "partial_refusal": "partial", "partial": "partial",
    "unclear": "unclear",
}  # fmt: skip
"""What people's labels mean here. Harm labels ("unsafe", "jailbroken") say whether the attack succeeded. Partial refusals are
neither: they are left out of accuracies."""


@dataclass(frozen=True)
class Labelled:
    """One response with a person's label.

    Args:
        prompt, response (`str`):
            What was asked and answered.
        label (`str`):
            `"refusal"`, `"compliance"`, `"partial"` or `"unclear"`.
        harmful (`bool`, *optional*):
            Whether the prompt asks for harm; None where the file does not say.
        model (`str`):
            Who answered, `""` where the file does not say.
    """

    prompt: str
    response: str
    label: str
    harmful: bool | None
    model: str


def load_labelled(path: str | os.PathLike) -> list[Labelled]:
    """Labelled responses from a `.csv`, `.jsonl` or `.json` file.

    Columns: a prompt and a response under one of their usual names, a label (see [`LABEL_WORDS`]), and where there are such,
    `model` and one of `harmful` (true/false), `prompt_label` (`safe`/`unsafe`) or `type` (XSTest: `contrast_...` is
    unsafe).

    Args:
        path (path):
            UTF-8.

    Returns:
        `list[Labelled]`: with at least one row.

    Raises:
        ValueError: for a missing column, an unknown label, an empty file.
        FileNotFoundError: for a path that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .csv, .jsonl or .json file of labelled responses")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no row in it; a file of labelled responses needs at least one")
    prompt = _column(path, rows[0], PROMPT_COLUMNS, "prompt")
    response = _column(path, rows[0], RESPONSE_COLUMNS, "response")
    label = _column(path, rows[0], LABEL_COLUMNS, "label")
    return [
        Labelled(
            str(row[prompt]),
            str(row[response] or ""),
            _label(path, number, row[label]),
            _is_harmful(row),
            str(row.get("model") or ""),
        )
        for number, row in enumerate(rows, 1)
    ]


def _column(path: Path, row: dict, names: Iterable[str], what: str) -> str:
    found = next((name for name in names if name in row), None)
    if found is None:
        raise ValueError(f"{path}: no {what} column among {[str(key) for key in row]}; name one of {list(names)}")
    return found


def _label(path: Path, number: int, value) -> str:
    word = str(value).strip().lower().replace(" ", "_").replace("-", "_")
    if word not in LABEL_WORDS:
        raise ValueError(f"{path}, row {number}: label {value!r} is unknown; use one of {sorted(LABEL_WORDS)}")
    return LABEL_WORDS[word]


def _is_harmful(row: dict) -> bool | None:
    if "harmful" in row:
        return str(row["harmful"]).strip().lower() in ("true", "1", "yes")
    if "prompt_label" in row:
        return str(row["prompt_label"]).strip().lower() in ("unsafe", "harmful")
    return str(row["type"]).startswith("contrast_") if "type" in row else None
