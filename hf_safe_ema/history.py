"""Files that are whole or absent: JSON lines, folders set aside instead of overwritten, the history of a run.

Knows: how to write so that no crash leaves half a line, and which part of a history a resumed run goes on from.
Does not know: what the numbers in it mean, or when to write them.
"""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

HISTORY_NAME = "safety_history.jsonl"
RESPONSES_FOLDER = "safety"
PAGE_NAME = "report.html"
RESPONSES_MARK = '<details class="responses">'
"""In a page that holds responses; no response can hold it, they are escaped."""


def write_whole(path: str | os.PathLike, text: str) -> None:
    """Write a text file so that whoever reads it, after whatever crash, finds all of it or what was there before.

    Args:
        path (path):
            Its folder is made if missing.
        text (`str`):
            Written as UTF-8.

    Raises:
        OSError: if the disk does not take it; what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # An upload to the hub by the Trainer may list the folder just now; it leaves out names with an underscore.
    handle, temporary = tempfile.mkstemp(prefix=f"_{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict]) -> None:
    """Write rows as JSON lines, the file whole or not at all.

    Args:
        path (path):
            Replaced.
        rows (iterable of `dict`):
            JSON-ready.
    """
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """Rows of a JSON-lines file; an empty list where there is none.

    Args:
        path (path):
            UTF-8.
    """
    path = Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _same(rows: list[dict], others: list[dict]) -> bool:
    return json.dumps(rows) == json.dumps(others)  # a NaN is unequal to itself, its text is not


def set_aside(path: str | os.PathLike) -> Path | None:
    """Rename what is at `path` to the first free of `path.1`, `path.2`, … so that nothing is overwritten.

    Args:
        path (path):
            File or folder.

    Returns:
        `Path`: where it is now; None if nothing was there.
    """
    path = Path(path)
    if not path.exists():
        return None
    number = 1
    while (moved := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(moved)
    return moved


def hide_responses(output_dir: str | os.PathLike) -> dict[Path, Path]:
    """Give what holds responses in `output_dir`, folders of this run and earlier ones and the page, a name with an underscore.

    The Trainer uploads `output_dir` to the hub, but no name that begins so: harmful answers must not be published
    unasked.

    Args:
        output_dir (path):
            Of the run.

    Returns:
        `dict[Path, Path]`: new places by the old ones.

    Raises:
        OSError: if a folder cannot be renamed: an upload must not go on then.
    """
    moved = {}
    for folder in sorted(Path(output_dir).glob(f"{RESPONSES_FOLDER}*")):
        named = folder.name == RESPONSES_FOLDER or folder.name.startswith(f"{RESPONSES_FOLDER}.")
        if not (named and folder.is_dir() and any(folder.glob("*step-*"))):
            continue
        hidden, number = folder.with_name(f"_{folder.name}"), 1
        while hidden.exists():
            hidden, number = folder.with_name(f"_{folder.name}.{number}"), number + 1
        folder.rename(hidden)
        moved[folder] = hidden
    page = Path(output_dir) / PAGE_NAME
    if page.is_file() and RESPONSES_MARK in page.read_text(encoding="utf-8", errors="replace"):
        moved[page] = page.replace(page.with_name(f"_{page.name}"))  # made from the files that stay
    return moved


def check_writable(folder: str | os.PathLike) -> None:
    """Raise unless files can be made in `folder`, making it if missing.

    Args:
        folder (path):
            Output folder of a run.

    Raises:
        ValueError: saying what stands in the way.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"output_dir={str(folder)!r} cannot be written to ({error.strerror or error}); give a folder that you may "
            "write to"
        ) from error


class History:
    """What a run has found so far: `safety_history.jsonl`, and the responses under `safety/`.

    Every write replaces the file as a whole, so that each line is there or not, never half; a run has few reports, and
    their responses go to a file a step.

    Args:
        output_dir (path):
            Of the run.
        responses_folder (`str`, *optional*, defaults to `"safety"`):
            Name of the folder for responses.
        enabled (`bool`, *optional*, defaults to `True`):
            Whether to touch the disk: false on all ranks but one. The rows are kept in memory either way.
    """

    def __init__(self, output_dir: str | os.PathLike, responses_folder: str = RESPONSES_FOLDER, enabled: bool = True):
        self.path = Path(output_dir) / HISTORY_NAME
        self.responses_folder = Path(output_dir) / responses_folder
        self.enabled = enabled
        self.rows: list[dict] = []

    def start(self) -> list[Path]:
        """Begin anew, setting aside what an earlier run has left.

        Returns:
            `list[Path]`: where earlier files are now.
        """
        self.rows = []
        if not self.enabled:
            return []
        self._sweep()
        return [moved for path in (self.path, self.responses_folder) if (moved := set_aside(path)) is not None]

    def resume(self, step: int, saved: list[dict] | None = None) -> list[Path]:
        """Go on from `step`. What was written after it will be done again and is set aside, never deleted.

        Rows go to `safety_history.interrupted-{step}.jsonl`, responses to `safety.interrupted-{step}/`. Killed in the
        middle of this, no row is lost: they are written there before they leave here.

        Args:
            step (`int`):
                Optimizer step of the checkpoint.
            saved (list of `dict`, *optional*):
                The rows that the checkpoint itself holds. They are the history, and what the folder has beyond them
                is kept only if it goes on from them. None: the folder's rows are all there is.

        Returns:
            `list[Path]`: where what was set aside is now.
        """
        try:
            found = read_jsonl(self.path)
        except (ValueError, OSError):  # not ours, or edited by hand: kept as it is, but not gone on with
            found = None
        before, after = [], []
        for row in found or []:
            (after if row["step"] > step or row.get("at_end") else before).append(row)
        goes_on = found is not None and (saved is None or _same(before[: len(saved)], saved))
        self.rows = before if goes_on else list(saved or [])
        if not self.enabled:
            return []
        self._sweep()
        if goes_on or found == []:
            moved = self._set_aside(step, after)
        else:
            moved = [path for path in (self.path, self.responses_folder) if path.exists()]
            moved = [set_aside(path) for path in moved]
        if after or not goes_on:
            write_jsonl(self.path, self.rows)
        return moved

    def _sweep(self) -> None:
        """Remove what a killed run was writing: files that never got their name, of which no one has read."""
        folders = [self.path.parent.glob(f"[._]{self.path.name}.*.tmp"), self.responses_folder.glob("[._]step-*.tmp")]
        for file in itertools.chain(*folders):
            file.unlink(missing_ok=True)

    def _set_aside(self, step: int, rows: list[dict]) -> list[Path]:
        """Copy `rows` to a file for rows that a resumed run will write again, and move their responses."""
        moved = []
        if rows:
            path = self.path.with_name(f"{self.path.stem}.interrupted-{step}{self.path.suffix}")
            number = 1
            while path.exists() and not _same(
                read_jsonl(path), rows
            ):  # the same rows: an earlier attempt got as far as this
                path = self.path.with_name(f"{self.path.stem}.interrupted-{step}.{number}{self.path.suffix}")
                number += 1
            write_jsonl(path, rows)
            moved.append(path)
        steps = {row["step"] for row in rows if row["type"] == "report"}
        later = []
        for file in sorted(self.responses_folder.glob("step-*.jsonl")):
            numbered = re.fullmatch(r"step-(\d+)\.jsonl", file.name)
            if numbered and (int(numbered.group(1)) > step or int(numbered.group(1)) in steps):
                later.append(file)
        if later:
            name = f"{self.responses_folder.name}.interrupted-{step}"
            folder, number = self.responses_folder.with_name(name), 1
            while folder.exists():
                folder, number = self.responses_folder.with_name(f"{name}.{number}"), number + 1
            folder.mkdir()
            for file in later:
                file.rename(folder / file.name)
            moved.append(folder)
        return moved

    def add(self, *rows: dict) -> None:
        """Add rows and write the file: all of them or, after a crash, none.

        Args:
            *rows (`dict`):
                JSON-ready, each with a `step`.

        Raises:
            OSError: if the disk does not take them; they are kept in memory and written with the next.
        """
        json.dumps(rows)  # a row that cannot be written must not stand in the way of later ones
        self.rows.extend(rows)
        if self.enabled:
            write_jsonl(self.path, self.rows)

    def report(self, step: int, weights: str) -> dict | None:
        """The report of a step on some weights, or None.

        Args:
            step (`int`):
                Optimizer step.
            weights (`str`):
                As in the row.
        """
        reports = (row for row in self.rows if row["type"] == "report")
        return next((row for row in reports if (row["step"], row["weights"]) == (step, weights)), None)

    def base_metrics(self) -> dict[str, float]:
        """The metrics of the newest report on the base; empty if there is none."""
        reports = [row for row in self.rows if row["type"] == "report" and row["weights"] == "base"]
        return reports[-1]["metrics"] if reports else {}

    def is_checked(self, step: int) -> bool:
        """Whether a check of that step left rows, be it that it failed.

        Args:
            step (`int`):
                Optimizer step.
        """
        rows = [row for row in self.rows if row["step"] == step]
        return any(row["type"] == "report" or row.get("what", "").startswith("the safety check") for row in rows)

    def has_loss(self, step: int, dataset: str) -> bool:
        """Whether the held-out loss of a dataset at a step is there.

        Args:
            step (`int`):
                Optimizer step.
            dataset (`str`):
                As in the row.
        """
        losses = (row for row in self.rows if row["type"] == "loss")
        return any((row["step"], row["dataset"]) == (step, dataset) for row in losses)

    def write_responses(self, step: int, responses: Iterable[dict]) -> None:
        """Write the responses of a step to `safety/step-000200.jsonl`.

        Args:
            step (`int`):
                Optimizer step.
            responses (iterable of `dict`):
                JSON-ready.

        Raises:
            OSError: if the disk does not take it.
        """
        if self.enabled:
            write_jsonl(self.responses_folder / f"step-{step:06d}.jsonl", responses)
