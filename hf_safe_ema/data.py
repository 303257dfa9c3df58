"""Instruction data in the formats people have, as TRL's conversational prompt-completion form.

Knows: the columns of Dolly, Alpaca, ORCA, ShareGPT and TRL data; which rows are no use, and which are themselves
refusals or talk about safety; how to hold rows out. Does not know: where rows come from (sources.py), tokenizers,
models, or what is done with the rows.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from itertools import islice

from transformers.utils import logging

from .safety.judges import KeywordJudge
from .sources import DatasetSource, FileSource, open_source

logger = logging.get_logger(__name__)

Turn = dict[str, str]
Messages = list[Turn]

SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Who speaks, in the words of ShareGPT and SlimOrca and in those of chat templates."""

CHUNK_ROWS = 10_000
"""Rows that wait as Python objects before they become Arrow, which takes a fraction of the memory."""


def _as_text(value, what: str) -> str:
    if value is None or value != value:  # a NaN differs from itself
        return ""
    # Answers such as 5 come as numbers from JSON, and from CSV or Parquet files that pandas has written.
    if not isinstance(value, (str, int, float)):
        raise TypeError(f"{what} is a {type(value).__name__}; it must be text or a number")
    return str(value)


def _text(row: dict, key: str) -> str:
    return _as_text(row.get(key), repr(key)).strip()


def _joined(instruction: str, extra: str) -> str:
    return f"{instruction}\n\n{extra}" if extra else instruction


def _turn(turn) -> Turn:
    if not isinstance(turn, dict) or not {"role", "content"} <= turn.keys():
        raise ValueError(f"{str(turn)[:80]!r} is no turn; a turn is an object with `role` and `content`")
    if turn.get("tool_calls"):
        raise ValueError("a turn with `tool_calls`, which would be lost: only `role` and `content` are kept")
    return {"role": _as_text(turn["role"], "`role`"), "content": _as_text(turn["content"], "`content`")}


def _messages(value, role: str) -> Messages:
    if isinstance(value, list):
        return [_turn(turn) for turn in value]
    return [{"role": role, "content": _as_text(value, f"what the {role} says").strip()}]


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


def _sharegpt(row: dict) -> tuple[Messages, Messages]:
    turns = []
    for turn in row["conversations"] or []:
        if isinstance(turn, dict) and {"from", "value"} <= turn.keys():
            if turn["from"] not in SHAREGPT_ROLES:
                raise ValueError(f"a turn is from {turn['from']!r}; known are {list(SHAREGPT_ROLES)}")
            turn = {"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        turn = _turn(turn)
        # SlimOrca writes an empty system turn where OpenOrca has an empty system prompt: there is none.
        if turn["role"] != "system" or turn["content"].strip():
            turns.append(turn)
    return turns[:-1], turns[-1:]


# Columns a row must have (each one of the names in a group), and how it is read then; the first that fits.
FORMATS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[dict], tuple[Messages, Messages]]]] = {
    "messages": ((("messages",),), _conversation),
    "conversations (ShareGPT, SlimOrca: from, value)": ((("conversations",),), _sharegpt),
    "prompt, completion": ((("prompt",), ("completion",)), _prompt_completion),
    "Alpaca (instruction[, input], output)": ((("instruction",), ("output",)), _alpaca),
    "Dolly (instruction[, context], response)": ((("instruction",), ("response",)), _dolly),
    "ORCA ([system,] question, response or chosen)": ((("question",), ("response", "chosen")), _orca),
    "prompt, response": (
        (("prompt",), ("response",)),
        lambda row: _prompt_completion({**row, "completion": row["response"]}),
    ),
}


def _says_something(turns: Messages) -> bool:
    return bool(turns) and bool(turns[-1]["content"].strip())


# The judge's own rules and the published lists that the others are parts of.
_JUDGES = tuple(KeywordJudge(preset) for preset in ("default", "qi-29", "refusal-direction-12"))

SAFETY_TALK = re.compile(
    r"\b(?:(?:un)?ethic(?:s|al|ally)|(?:im)?moral(?:s|ly|ity)?|illegal(?:ly)?|unlawful(?:ly)?|harmful|hateful|hurtful"
    r"|inappropriate(?:ly)?|unacceptable|offensive|derogatory|disrespectful|racis[mt]|sexis[mt]|discriminat\w+"
    r"|stereotyp\w+|extremis[mt]s?|hate speech|cause harm|potentially dangerous|sensitive topic|please refrain"
    r"|(?:not|never|\w+n['’]t) (?:[\w'’]+ ){0,3}(?:appropriate|acceptable|okay)|without (?:\w+ )?consent|non-?consensual"
    r"|it(?: is|['’]s) important to (?:note|remember|respect|prioriti[sz]e)"
    r"|language model|ai assistant|my (?:programming|guidelines|principles)|(?:safety|ethical|content) guidelines)\b",
    re.IGNORECASE,
)
"""Words by which an answer talks about safety, norms or itself. Rules after the example of Qi et al. (ICLR 2024), who
removed such rows from Alpaca and Dolly by a longer list of words; theirs also removes mere topics (diversity,
regulations, capitalism), ours does not."""


def is_refusal_or_safety_talk(text: str) -> bool:
    """Whether an answer refuses, or talks about safety, norms or being a language model, going by its words.

    Meant for removing rows, so it is quick to say yes: "I'm sorry I am late" counts.

    Args:
        text (`str`):
            The answer.

    Example:

    ```python
    >>> is_refusal_or_safety_talk("I'm sorry, but I can't help with that.")
    True
    >>> is_refusal_or_safety_talk("Hacking is illegal.")
    True
    >>> is_refusal_or_safety_talk("Boil it for ten minutes.")
    False

    ```
    """
    if SAFETY_TALK.search(text):
        return True
    return any(judge.judge([""], [text])[0].label == "refusal" for judge in _JUDGES)


class _RowReader:
    """Rows to pairs of prompt and completion, with a count of those left out and why."""

    def __init__(self, name: str, remove_refusals: bool):
        self.name = name
        self.remove_refusals = remove_refusals
        self.formats: dict[str, str] = {}  # of each file, by its first row
        self.last_counted: dict[str, int] = {}  # so that a stream's second pass counts nothing twice
        self.rows = self.incomplete = self.refusals = 0

    def read(self, file: str, number: int, row: dict) -> dict[str, Messages] | None:
        prompt, completion = self._pair(file, number, row)
        request = _says_something(prompt) and prompt[-1]["role"] != "system"
        complete = request and _says_something(completion) and completion[-1]["role"] != "user"
        refusal = complete and self.remove_refusals and any(
            is_refusal_or_safety_talk(turn["content"]) for turn in completion if turn["role"] == "assistant"
        )  # fmt: skip
        if number > self.last_counted.get(file, 0):
            self.last_counted[file] = number
            self.rows += 1
            self.incomplete += not complete
            self.refusals += bool(refusal)
        return {"prompt": prompt, "completion": completion} if complete and not refusal else None

    def _pair(self, file: str, number: int, row: dict) -> tuple[Messages, Messages]:
        if file not in self.formats:
            fits = (name for name, (needs, _) in FORMATS.items() if all(any(k in row for k in ks) for ks in needs))
            name = next(fits, None)
            if name is None:
                raise ValueError(
                    f"{file}: columns {[str(key) for key in row]} fit none of the known formats: {'; '.join(FORMATS)}"
                )
            self.formats[file] = name
        name = self.formats[file]
        try:
            return FORMATS[name][1](row)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file}, row {number}: cannot be read as {name} ({type(error).__name__}: {error})"
            ) from error

    @property
    def left_out(self) -> int:
        return self.incomplete + self.refusals

    def account(self) -> str:
        reasons = [f"{self.incomplete:,} without a request or an answer"]
        if self.remove_refusals:
            reasons.append(f"{self.refusals:,} refusals or safety talk")
        return f"{self.name}: left out {self.left_out:,} of {self.rows:,} rows: {', '.join(reasons)}"

    def __call__(self, labelled: dict) -> dict:
        """For a stream, which may have no end: says where it stands at 1, 10, 100, … rows left out."""
        before = self.left_out
        pair = self.read(labelled["file"], labelled["number"], labelled["row"])
        if self.left_out > before and re.fullmatch("10*", str(self.left_out)):
            logger.warning(f"{self.account()}; reading on")
        return {**(pair or {"prompt": [], "completion": []}), "kept": pair is not None}


def load_finetuning_data(
    name_or_path: str | os.PathLike,
    *,
    max_rows: int | None = None,
    streaming: bool = False,
    remove_refusals: bool = False,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
):
    """Instruction data from the hub or a disk, whatever its columns are called.

    Args:
        name_or_path (`str` or path):
            - `"dolly"` (databricks/databricks-dolly-15k), `"alpaca"` (tatsu-lab/alpaca; not for commercial use),
              `"orca"` (Open-Orca/OpenOrca, 4 million rows), `"slimorca"` (Open-Orca/SlimOrca) or `"orca_dpo"`
              (Intel/orca_dpo_pairs, its chosen answers).
            - any other dataset on the Hugging Face hub, as `"owner/name"`.
            - a `.jsonl`, `.json`, `.csv` or `.parquet` file (text in UTF-8), or a folder of them, laid out as datasets
              on the hub are: without further marks everything in it is the `train` split.

            Each in one of [`FORMATS`]: Dolly, Alpaca, ORCA, ShareGPT, TRL's prompt-completion (text or messages) or
            messages.
        max_rows (`int`, *optional*):
            At most so many rows, the first ones; reading ends there, and what the hub sends is not kept on the disk.
        streaming (`bool`, *optional*, defaults to `False`):
            Rows are read only as they are asked for, again on every pass. For data larger than memory, as `"orca"` is;
            errors in later rows come when they are reached. The Trainer then needs `max_steps`.
        remove_refusals (`bool`, *optional*, defaults to `False`):
            Whether rows are left out whose answer is itself a refusal or safety talk, going by its words
            ([`is_refusal_or_safety_talk`]), as Qi et al. (ICLR 2024) did, so that what is measured is not what such
            rows taught.
        config (`str`, *optional*), split (`str`, *optional*, "train" when None), revision (`str`, *optional*):
            Which part of a dataset on the hub or (but for the revision) in a folder, as in `datasets.load_dataset`.

    Returns:
        `datasets.Dataset`, held in memory, or with `streaming` a `datasets.IterableDataset`: with columns `prompt` and
        `completion`, each a list of `{"role", "content"}`. System prompts stay, as the prompt's first turn. Rows with
        an empty answer or request are left out, and conversations that end on the user's turn; how many is logged.

    Raises:
        FileNotFoundError: if there is no such file, or a folder without data.
        TypeError, ValueError: if an argument is out of range, the hub cannot give the dataset, the columns fit no
            format, a row cannot be read as the first of its file is, or no row is left.

    Example:

    ```python
    >>> import json, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "sums.jsonl"
    >>> _ = path.write_text(json.dumps({"instruction": "Add 2 and 3.", "input": "", "output": 5}))
    >>> load_finetuning_data(path)[0]
    {'prompt': [{'role': 'user', 'content': 'Add 2 and 3.'}], 'completion': [{'role': 'assistant', 'content': '5'}]}

    ```
    """
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int)):
        raise TypeError(f"max_rows={max_rows!r}: must be a whole number, or None for all rows")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows={max_rows}: must be at least 1, or None for all rows")
    source = open_source(name_or_path, config, split, revision, lazily=streaming or max_rows is not None)
    reader = _RowReader(source.name, remove_refusals)
    return _stream(source, reader, max_rows) if streaming else _read_all(source, reader, max_rows)


def _features():
    from datasets import Features, Value

    turns = [{"role": Value("string"), "content": Value("string")}]
    return Features({"prompt": turns, "completion": turns})


def _read_all(source: FileSource | DatasetSource, reader: _RowReader, max_rows: int | None):
    from datasets import Dataset, concatenate_datasets

    pairs = (pair for row in source.rows() if (pair := reader.read(*row)) is not None)
    pairs = islice(pairs, max_rows)
    chunks = []
    while chunk := list(islice(pairs, CHUNK_ROWS)):
        chunks.append(Dataset.from_list(chunk, features=_features()))
    if not reader.rows:
        raise ValueError(f"{source.name}: no row in it")
    if not chunks:
        raise ValueError(f"{source.name}: no row with both a request and an answer is left ({reader.account()})")
    if reader.left_out:
        logger.warning(reader.account())
    return concatenate_datasets(chunks)


def _stream(source: FileSource | DatasetSource, reader: _RowReader, max_rows: int | None):
    from datasets import Value

    rows = source.rows()
    first = next(rows, None)
    rows.close()
    if first is None:
        raise ValueError(f"{source.name}: no row in it")
    _RowReader(source.name, reader.remove_refusals).read(*first)  # what is wrong with the columns is said at once
    features = _features()
    features["kept"] = Value("bool")
    stream = source.stream().map(reader, remove_columns=["file", "number", "row"], features=features)
    stream = stream.filter(_is_kept, input_columns=["kept"]).remove_columns("kept")
    return stream if max_rows is None else stream.take(max_rows)


def _is_kept(kept: bool) -> bool:
    return kept


def split_heldout(dataset, share: float = 0.1):
    """Training and held-out rows, told apart by a hash of the request: the same in every run and whatever the order.

    Only what is asked counts, not the answer, the system prompt, letter case or spacing, so that a request that comes
    several times is on one side only, and a larger share holds out the same rows and more.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            With `prompt`, as [`load_finetuning_data`] makes it. A stream is filtered: either side reads all of it, so
            `.take` from the held-out side what an evaluation can afford.
        share (`float`, *optional*, defaults to 0.1):
            Of rows held out, roughly; between 0 and 1.

    Returns:
        Two datasets of the kind given: training, held out.

    Raises:
        ValueError: if `share` is out of range, there is no column `prompt`, or either side would be empty (for a
            stream nobody can know).

    Example:

    ```python
    >>> from datasets import Dataset
    >>> asked = Dataset.from_dict({"prompt": [f"What is {n}?" for n in range(100)]})
    >>> train, held = split_heldout(asked, 0.2)
    >>> len(train), len(held)
    (87, 13)

    ```
    """
    from datasets import IterableDataset

    if isinstance(share, bool) or not 0 < share < 1:
        raise ValueError(f"share={share!r}: must lie between 0 and 1, without either")
    if "prompt" not in (dataset.column_names or ["prompt"]):
        raise ValueError(f"columns {dataset.column_names} without `prompt`; load_finetuning_data makes such datasets")
    if isinstance(dataset, IterableDataset):
        return tuple(dataset.filter(_on_side, fn_kwargs={"share": share, "held": held}) for held in (False, True))
    flags = [_on_side(row, share, held=True) for row in dataset.select_columns("prompt")]
    train = dataset.select([i for i, flag in enumerate(flags) if not flag])
    held = dataset.select([i for i, flag in enumerate(flags) if flag])
    if not len(train) or not len(held):
        raise ValueError(f"{len(dataset)} rows are too few to hold {share:.0%} of them out; give more rows")
    return train, held


def _on_side(row: dict, share: float, held: bool) -> bool:
    prompt = row["prompt"]
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    asked = [turn for turn in turns if turn["role"] != "system"] or turns
    said = json.dumps([[turn["role"], " ".join(str(turn["content"]).split()).casefold()] for turn in asked])
    digest = hashlib.sha256(said.encode()).digest()
    return (int.from_bytes(digest[:8], "big") < share * 2**64) == held
