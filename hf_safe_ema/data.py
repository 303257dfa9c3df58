"""Instruction data in the formats people have, as TRL's conversational prompt-completion form.

Knows: the columns of Dolly, Alpaca, ORCA and TRL files. Does not know: tokenizers, models, or what is done with it.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from .safety.prompts import read_rows

Messages = list[dict[str, str]]


def _text(row: dict, key: str) -> str:
    value = row.get(key)
    return value.strip() if isinstance(value, str) else ""


def _joined(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if extra else instruction


def _messages(value, role: str) -> Messages:
    if isinstance(value, list):
        return [dict(turn) for turn in value]
    return [{"role": role, "content": "" if value is None else str(value).strip()}]


def _says_something(turns: Messages) -> bool:
    return bool(turns) and bool((turns[-1]["content"] or "").strip())


def _alpaca(row: dict) -> tuple[Messages, Messages]:
    return _messages(_joined(_text(row, "instruction"), _text(row, "input")), "user"), _messages(_text(row, "output"), "assistant")  # fmt: skip


def _dolly(row: dict) -> tuple[Messages, Messages]:
    return _messages(_joined(_text(row, "instruction"), _text(row, "context")), "user"), _messages(_text(row, "response"), "assistant")  # fmt: skip


def _orca(row: dict) -> tuple[Messages, Messages]:
    system = _text(row, "system_prompt") or _text(row, "system")
    answer = _text(row, "response") or _text(row, "chosen")
    prompt = [{"role": "system", "content": system}] if system else []
    return prompt + _messages(_text(row, "question"), "user"), _messages(answer, "assistant")


def _prompt_completion(row: dict) -> tuple[Messages, Messages]:
    return _messages(row["prompt"], "user"), _messages(row["completion"], "assistant")


def _conversation(row: dict) -> tuple[Messages, Messages]:
    turns = _messages(row["messages"], "user")
    return turns[:-1], turns[-1:]


# Columns a row must have (each one of the names in a group), and how it is read then; the first that fits.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[dict], tuple[Messages, Messages]]]] = {
    "messages": ((("messages",),), _conversation),
    "prompt, completion": ((("prompt",), ("completion",)), _prompt_completion),
    "Alpaca (instruction[, input], output)": ((("instruction",), ("output",)), _alpaca),
    "Dolly (instruction[, context], response)": ((("instruction",), ("response",)), _dolly),
    "ORCA ([system,] question, response or chosen)": ((("question",), ("response", "chosen")), _orca),
    "prompt, response": (
        (("prompt",), ("response",)),
        lambda row: _prompt_completion({**row, "completion": row["response"]}),
    ),
}


def load_finetuning_data(path: str | os.PathLike):
    """A file of instruction data, whatever its columns are called.

    Args:
        path (path):
            `.jsonl`, `.json` or `.csv`, UTF-8, in one of [`FORMATS`]: Alpaca, Dolly, ORCA, TRL's prompt-completion
            (text or messages) or messages.

    Returns:
        `datasets.Dataset`: with columns `prompt` and `completion`, each a list of `{"role", "content"}`. Rows with an
        empty answer or request are left out, and conversations that end on the user's turn.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the columns fit no format, a row cannot be read as the first is, or no row is left.
    """
    from datasets import Dataset

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a .jsonl, .json or .csv file of instruction data")
    rows = read_rows(path)
    if not rows:
        raise ValueError(f"{path}: no row in it")
    fits = (name for name, (needs, _) in FORMATS.items() if all(any(k in rows[0] for k in group) for group in needs))
    name = next(fits, None)
    if name is None:
        raise ValueError(
            f"{path}: columns {[str(key) for key in rows[0]]} fit none of the known formats: {'; '.join(FORMATS)}"
        )
    read = FORMATS[name][1]
    pairs = []
    for number, row in enumerate(rows, 1):
        try:
            prompt, completion = read(row)
            whole = _says_something(prompt) and _says_something(completion) and completion[-1]["role"] != "user"
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, row {number}: cannot be read as {name} ({type(error).__name__}: {error}); a turn is an object "
                "with `role` and `content`"
            ) from error
        if whole:
            pairs.append({"prompt": prompt, "completion": completion})
    if not pairs:
        raise ValueError(f"{path}: no row with both a request and an answer")
    return Dataset.from_list(pairs)


def split_heldout(dataset, share: float = 0.1):
    """Training and held-out rows, told apart by a hash of what they say: the same whatever the order or the run.

    Args:
        dataset (`datasets.Dataset`):
            With `prompt` and `completion`.
        share (`float`, *optional*, defaults to 0.1):
            Of rows held out, roughly.

    Returns:
        `(Dataset, Dataset)`: training, held out.

    Raises:
        ValueError: if either would be empty.
    """

    def held_out(row) -> bool:
        digest = hashlib.sha256(repr((row["prompt"], row["completion"])).encode()).digest()
        return int.from_bytes(digest[:8], "big") < share * 2**64

    flags = [held_out(row) for row in dataset]
    train = dataset.select([i for i, flag in enumerate(flags) if not flag])
    held = dataset.select([i for i, flag in enumerate(flags) if flag])
    if not len(train) or not len(held):
        raise ValueError(f"{len(dataset)} rows are too few to hold {share:.0%} of them out; give more rows")
    return train, held
