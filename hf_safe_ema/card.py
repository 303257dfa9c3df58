"""The model card of the averaged weights: where they come from, how safe they were found, what each number means.

Knows: the history's rows, the average's settings, Markdown, and the hub's metadata.
Does not know: the responses (a card never shows them), training, the licence or the data of the model.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from . import testbed
from .ema import WeightEMA, select_parameters
from .meaning import explain
from .report import format_table, summarise

CARD_NAME = "README.md"
TAGS = ("ema", "hf_safe_ema", "safety")
# PEFT 0.21 writes what it knows below these headings, at the end of a template that is empty otherwise.
_KEPT_OF_PEFT = ("## Training procedure", "### Framework versions")


def write_card(folder: str | os.PathLike, rows: Iterable[dict], ema: WeightEMA, model, step: int) -> None:
    """Write `README.md` into the folder of an averaged model.

    The card that PEFT's `save_pretrained` has left in an adapter's folder gives its metadata and what it says of the
    training; the rest of it is an empty form and is replaced.

    Args:
        folder (path):
            Where the averaged model was saved.
        rows (iterable of `dict`):
            Of the run's history.
        ema ([`WeightEMA`]):
            The average that was saved.
        model (`PreTrainedModel` or `PeftModel`):
            Whose parameters it averages.
        step (`int`):
            Optimizer step at which the average was what was saved.
    """
    path = Path(folder) / CARD_NAME
    name = base_model_of(model)
    data, kept = ModelCardData(library_name="transformers"), ""
    if path.exists():
        card = ModelCard.load(path)
        data = card.data
        found = re.search("|".join(rf"^{heading}$" for heading in _KEPT_OF_PEFT), card.text, re.MULTILINE)
        kept = card.text[found.start() :].strip() if found else ""
    if data.get("base_model") is None and _is_hub_id(name):  # the hub refuses a card that names a folder
        data.base_model = name
    data.tags = sorted({*(data.get("tags") or ()), *TAGS})
    text = "\n".join([_origin(ema, model, name, step), "## Safety\n", _safety(list(rows), step), kept])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n").save(path)


def base_model_of(model) -> str | None:
    """Hub id or folder of what a model or adapter was loaded from, or None if it was made in the program.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            The model.
    """
    adapters = (getattr(model, "peft_config", None) or {}).values()
    names = [getattr(adapter, "base_model_name_or_path", None) for adapter in adapters]
    return next(filter(None, [*names, getattr(getattr(model, "config", None), "_name_or_path", None)]), None)


def _is_hub_id(name: str | None) -> bool:
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return not Path(name).exists()


def escaped(text: str) -> str:
    """A name from outside as Markdown that shows it as it is, in one line and in a table's cell too.

    Args:
        text (`str`):
            Anything.

    Example:

    ```python
    >>> print(escaped("my_prompts|v2 <b>"))
    my\\_prompts\\|v2 \\<b\\>

    ```
    """
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(str(text).split()))


def _origin(ema: WeightEMA, model, name: str | None, step: int) -> str:
    """What these weights are; of a folder on a disk only its name, the path is nobody's business."""
    if name is not None and Path(name) == testbed.MODEL_FOLDER:
        shown = "the small Llama in hf_safe_ema"
    else:
        shown = "unknown" if name is None else escaped(name if _is_hub_id(name) else Path(name).name)
    half_life = math.log(0.5) / math.log(ema.decay) if ema.decay else 0.0
    lines = [
        f"# Averaged (EMA) weights, fine-tuned from {shown}\n" if name else "# Averaged (EMA) weights\n",
        "These are not the weights of one step of training but an exponential moving average (EMA) of those of all steps,",
        "kept with hf_safe_ema so that fine-tuning wears away less of the base model's refusals.\n",
        f"- Base model: {shown}",
        f"- Decay: {ema.decay:.6g} (half-life {half_life:.1f} optimizer steps)",
        f"- Updates: {ema.num_updates}, the last one at step {step}",
        f"- Share of the starting weights left in the average: {ema.base_share:.1%}",
    ]
    if ema.mode == "lookahead":
        lines.append(f"- Training went on from the average every {ema.sync_steps} steps (lookahead)")
    trained = len(select_parameters(model.named_parameters()))
    if len(ema.names) < trained:
        lines.append(f"- Averaged: {len(ema.names)} of {trained} trained tensors; the others hold the live weights")
    return "\n".join(lines) + "\n"


def _safety(rows: Sequence[dict], step: int) -> str:
    rows = [row for row in rows if row["step"] <= step]
    summary = summarise(rows)
    if not summary:
        failed = any(row["type"] == "error" and row["what"].startswith("the safety check") for row in rows)
        why = (
            "Every safety check of the run failed: nothing"
            if failed
            else "Safety was not checked in this run: nothing"
        )
        return f"{why} is known of what these weights answer to harmful prompts.\n"
    of_these = next((row for row in summary if row["weights"] == "ema"), None)
    if of_these is None:
        which = "**The averaged weights in this folder were not checked**, only those in the table."
    elif of_these["step"] != step:
        which = (
            f"**The weights in this folder are those of step {step}, which were not checked**; see the column step."
        )
    else:
        which = "The row EMA is about the weights in this folder."
    meaning = [
        "What the numbers mean:\n",
        *(f"- {escaped(f'{term}: {text}')}" for term, text in explain(rows, summary)),
    ]
    return "\n\n".join([which, format_table(summary), "\n".join(meaning)]) + "\n"
