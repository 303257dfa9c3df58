"""Files that are whole or absent: JSON lines, folders set aside instead of overwritten, the history of a run.

Knows: how to write so that no crash leaves half a line, and what of a run's history a resumed run keeps.
Does not know: what the numbers in it mean, or when to write them.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

HISTORY_NAME = "safety_history.jsonl"
RESPONSES_FOLDER = "safety"


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
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
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
        return [moved for path in (self.path, self.responses_folder) if (moved := set_aside(path)) is not None]

    def resume(self, step: int) -> None:
        """Go on from `step`: what was written after it is dropped, since it will be done again.

        Args:
            step (`int`):
                Optimizer step of the checkpoint.
        """
        self.rows = [row for row in read_jsonl(self.path) if row["step"] <= step]
        if self.enabled and self.path.exists():
            write_jsonl(self.path, self.rows)
            for file in self.responses_folder.glob("step-*.jsonl"):
                later = re.fullmatch(r"step-(\d+)\.jsonl", file.name)
                if later and int(later.group(1)) > step:
                    file.unlink()

    def add(self, row: dict) -> None:
        """Add a row and write the file.

        Args:
            row (`dict`):
                JSON-ready, with a `step`.

        Raises:
            OSError: if the disk does not take it; the row is kept in memory and written with the next.
        """
        json.dumps(row)  # a row that cannot be written must not stand in the way of later ones
        self.rows.append(row)
        if self.enabled:
            write_jsonl(self.path, self.rows)

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
