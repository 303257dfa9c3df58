"""Where rows of instruction data come from: a file, a folder laid out as on the Hugging Face hub, the hub itself.

Knows: file endings, hub ids, how to read no more than is asked for, and what to say of a file that cannot be read.
Does not know: what the columns mean; that is in data.py.
"""

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from glob import has_magic
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .safety.prompts import read_rows

logger = logging.get_logger(__name__)

HUB_IDS = {
    "dolly": "databricks/databricks-dolly-15k",
    "alpaca": "tatsu-lab/alpaca",
    "orca": "Open-Orca/OpenOrca",
    "slimorca": "Open-Orca/SlimOrca",
    "orca_dpo": "Intel/orca_dpo_pairs",
}
"""Short names of datasets on the Hugging Face hub."""

TEXT_COLUMNS = ("instruction", "input", "output", "context", "response", "system", "system_prompt", "question", "chosen",
                "prompt", "completion")  # fmt: skip
"""Columns whose text must arrive as written: pandas would make numbers of "007" and nothing at all of "None"."""

Row = tuple[str, int, dict]
"""The file (or dataset) that a row comes from, its number there from 1 on, and its columns."""


@dataclass(frozen=True)
class FileSource:
    """Rows of local files, read one after the other.

    Args:
        name (`str`):
            What messages call it.
        paths (`list[str]`):
            Files whose endings are in [`READERS`].
    """

    name: str
    paths: list[str]

    def rows(self) -> Iterator[Row]:
        """Every row from the beginning, read as it is asked for.

        Raises:
            ValueError: at a row that cannot be read.
        """
        for path in self.paths:
            for number, row in enumerate(READERS[Path(path).suffix.lower()](Path(path)), 1):
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, row {number}: is a {type(row).__name__}; each row must be an object")
                yield path, number, row

    def stream(self):
        """The same as an `IterableDataset` with the columns `file`, `number` and `row`; one shard a file."""
        from datasets import IterableDataset

        return IterableDataset.from_generator(_labelled_rows, gen_kwargs={"paths": self.paths})


def _labelled_rows(paths: list[str]) -> Iterator[dict]:
    for file, number, row in FileSource("", paths).rows():
        yield {"file": file, "number": number, "row": row}


@dataclass(frozen=True)
class DatasetSource:
    """Rows that the `datasets` library reads.

    Args:
        name (`str`):
            What messages call it.
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            Its rows.
    """

    name: str
    dataset: Any = field(repr=False)

    def rows(self) -> Iterator[Row]:
        """Every row from the beginning, read as it is asked for."""
        for number, row in enumerate(self.dataset, 1):
            yield self.name, number, row

    def stream(self):
        """The same as an `IterableDataset` with the columns `file`, `number` and `row`, in the dataset's own shards."""
        columns = self.dataset.column_names or list(next(iter(self.dataset), {}))
        return self.dataset.map(_label, with_indices=True, remove_columns=columns, fn_kwargs={"file": self.name})


def _label(row: dict, index: int, file: str) -> dict:
    return {"file": file, "number": index + 1, "row": row}


def open_source(
    name_or_path: str | os.PathLike,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    lazily: bool = False,
) -> FileSource | DatasetSource:
    """The rows that a name or a path stands for.

    Args:
        name_or_path (`str` or path):
            A short name in [`HUB_IDS`], a hub id (`owner/name`), a file or a folder. What is on this disk comes before
            the hub, except for the short names.
        config (`str`, *optional*), split (`str`, *optional*, "train" when None), revision (`str`, *optional*):
            Which part of a dataset on the hub, or (but for the revision) in a folder.
        lazily (`bool`, *optional*, defaults to `False`):
            Whether a dataset on the hub is read over the network as its rows are asked for, instead of being
            downloaded first. Files and folders always are read as asked for.

    Returns:
        [`FileSource`] or [`DatasetSource`].

    Raises:
        FileNotFoundError: if there is no such file and the name cannot be a hub id, or a folder holds no data.
        TypeError: if the name is no text or path, or empty.
        ValueError: if the ending is unknown, there is no such config or split, or the hub does not answer.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or name_or_path == "":
        raise TypeError(f"name_or_path={name_or_path!r}: give one of {list(HUB_IDS)}, a hub id or a path")
    name = os.fspath(name_or_path)
    path = Path(name)
    if isinstance(name_or_path, str) and name in HUB_IDS:
        return _open_hub(name, HUB_IDS[name], config, split or "train", revision, lazily)
    if path.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r}: {path} is a folder on this disk; only the hub has revisions")
        return _open_folder(path, config, split or "train")
    if path.exists():
        if (config, split, revision) != (None, None, None):
            raise ValueError(f"{path} is one file; config, split and revision choose within a folder or a hub dataset")
        if path.suffix.lower() not in READERS:
            raise ValueError(f"{path}: unknown ending {path.suffix!r}; use one of {', '.join(READERS)}")
        return FileSource(name, [name])
    if isinstance(name_or_path, str) and _could_be_hub_id(name):
        return _open_hub(name, name, config, split or "train", revision, lazily)
    raise FileNotFoundError(
        f"{name}: no such file or folder; give a {', '.join(READERS)} file, a folder of them, a hub id (owner/name) or "
        f"one of {list(HUB_IDS)}"
    )


def _could_be_hub_id(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name, re.ASCII)) and Path(name).suffix.lower() not in READERS


def _open_hub(name: str, repo: str, config: str | None, split: str, revision: str | None, lazily: bool):
    called = repr(name) if name == repo else f"{name!r} ({repo})"
    try:
        return DatasetSource(name, _load_dataset(repo, config, split, revision, streaming=lazily))
    except Exception as error:
        nor_here = f", and there is no file or folder {name!r} here" if name == repo else ""
        raise ValueError(
            f"{called}: could not load split {split!r} from the Hugging Face hub{nor_here}: {_in_one_line(error)}. Check the name and "
            "the network (with HF_HUB_OFFLINE set only what was downloaded before is found); gated datasets need `hf "
            f"auth login`; or fetch it elsewhere with `hf download {repo} --repo-type dataset --local-dir FOLDER` and "
            "give FOLDER"
        ) from error


def _open_folder(path: Path, config: str | None, split: str) -> FileSource | DatasetSource:
    from datasets import load_dataset_builder, load_from_disk

    try:
        if (path / "state.json").is_file():
            return DatasetSource(str(path), load_from_disk(str(path)))
        # `datasets` knows the layouts: splits by file name or folder, configurations in the README's header.
        files = load_dataset_builder(str(path), config).config.data_files or {}
        if split not in files:
            raise ValueError(f"there is no split {split!r}; choose one of {[str(name) for name in files]}")
        _warn_of_files_passed_over(path, [file for of_split in files.values() for file in of_split])
        if all(Path(file).suffix.lower() in READERS for file in files[split]):
            return FileSource(str(path), [str(file) for file in files[split]])
        return DatasetSource(str(path), _load_dataset(str(path), config, split, None, streaming=True))
    except FileNotFoundError as error:
        patterns = "; nor can its path hold any of *?[, which `datasets` takes for patterns" * has_magic(str(path))
        raise FileNotFoundError(
            f"{path}: no data found in this folder; put {', '.join(READERS)} files into it{patterns}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path}: cannot be read as a folder of data (config={config!r}, split={split!r}): {_in_one_line(error)}"
        ) from error


def _warn_of_files_passed_over(path: Path, taken: list[str]) -> None:
    # Without a README that says what is data, `datasets` takes the commonest kind of file and drops the others silently.
    if (path / "README.md").is_file():
        return
    known = {Path(file).resolve() for file in taken}
    there = [file for file in sorted(path.rglob("[!.]*")) if file.suffix.lower() in READERS]
    passed_over = [str(file.relative_to(path)) for file in there if file.resolve() not in known]
    if passed_over:
        logger.warning(
            f"{path}: {len(passed_over)} of {len(there)} files are not read ({', '.join(passed_over[:5])}): a folder is "
            "read as files of one kind; put the others into a folder of their own"
        )


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _load_dataset(repo: str, config: str | None, split: str, revision: str | None, streaming: bool):
    from datasets import load_dataset, load_dataset_builder

    builder = load_dataset_builder(repo, config, revision=revision)
    as_written = (
        {"keep_default_na": False, "converters": dict.fromkeys(TEXT_COLUMNS, str)}
        if hasattr(builder.config, "keep_default_na")  # it is a CSV reader
        else {}
    )
    return load_dataset(repo, config, split=split, revision=revision, streaming=streaming, **as_written)


def _text_lines(path: Path) -> Iterator[str]:
    """Lines with their line ends, decoded one by one so that an error can name the line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 (line {number}, byte {error.start}: {error.reason}); save it as UTF-8, for "
                    f"example with `iconv -f latin1 -t utf-8 {path.name}`"
                ) from error


def _jsonl_rows(path: Path) -> Iterator:
    for number, line in enumerate(_text_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
            yield row


def _json_rows(path: Path) -> Iterator:
    # Many a .json file on the hub holds JSON lines: its first line is an object by itself.
    try:
        lines = isinstance(json.loads(next(_text_lines(path), "")), dict)
    except ValueError:
        lines = False
    yield from _jsonl_rows(path) if lines else read_rows(path)


def _csv_rows(path: Path) -> Iterator[dict]:
    # Strict, because otherwise a quote that is never closed swallows the rest of the file without a word.
    reader = csv.DictReader(_text_lines(path), strict=True)
    try:
        for row in reader:
            if None in row:
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row[None])} more values than columns; put texts that hold "
                    "commas in double quotes"
                )
            yield row
    except csv.Error as error:
        raise ValueError(
            f"{path}, after line {reader.line_num}: not valid CSV ({error}); use .jsonl for long texts"
        ) from error


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error})") from error


READERS: dict[str, Callable[[Path], Iterator]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""How files are read, by their ending; each reader reads no further than it is asked."""
