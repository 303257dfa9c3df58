"""Files: the average's own state in a checkpoint, which checkpoints are whole, and a folder that `from_pretrained` loads.

Knows: how to write so that a file is whole or absent, what the Trainer puts into a checkpoint and in which order, and
where in a checkpoint PEFT does not look for adapters.
Does not know: when to save, or what the numbers mean. Our own files are safetensors and JSON only.
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from .ema import WeightEMA
from .history import read_jsonl, write_jsonl

logger = logging.get_logger(__name__)

# PEFT takes a direct sub-folder of a checkpoint that holds adapter_model.safetensors for one more adapter.
STATE_PATH = Path("safe_ema") / "state" / "ema_state.safetensors"
ROWS_PATH = STATE_PATH.with_name("history.jsonl")

TRAINER_STATE = "trainer_state.json"
_WHOLE_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_WEIGHT_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# transformers 5.23 has this in a preemption checkpoint for as long as it is being written.
_SENTINEL = "checkpoint-is-incomplete.txt"


class DamagedStateError(ValueError):
    """The average's state in a checkpoint is there but cannot be used."""


def save_ema_state(
    ema: WeightEMA, checkpoint: str | os.PathLike, notes: dict | None = None, rows: list[dict] | None = None
) -> None:
    """Write the average's state into a checkpoint folder, whole or not at all.

    Args:
        ema ([`WeightEMA`]):
            Its state in full precision.
        checkpoint (path):
            A `checkpoint-N` folder.
        notes (`dict`, *optional*):
            JSON-ready; what [`read_notes`] gives back.
        rows (list of `dict`, *optional*):
            The run's history so far, JSON-ready, to be had from [`read_rows`].
    """
    state = ema.state_dict()
    tensors = {f"base.{name}": tensor for name, tensor in state["base"].items()}
    for index, displacement in enumerate(state["displacements"]):
        tensors.update({f"displacement.{index}.{name}": tensor for name, tensor in displacement.items()})
    metadata = {"format": "hf_safe_ema", "version": "1", "num_updates": str(state["num_updates"]),
                "decays": json.dumps(state["decays"]), "notes": json.dumps(notes or {})}  # fmt: skip
    path = Path(checkpoint) / STATE_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    if rows is not None:
        write_jsonl(Path(checkpoint) / ROWS_PATH, rows)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    _to_disk(temporary)
    os.replace(temporary, path)


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _state_of(checkpoint: str | os.PathLike):
    """The opened state and its metadata, whatever is wrong with it as one of two errors."""
    path = Path(checkpoint) / STATE_PATH
    if not path.exists():
        raise FileNotFoundError(
            f"{checkpoint} holds no state of the weight average ({STATE_PATH} is missing): it was saved without "
            "SafeEMACallback. Resume without the callback, or start a new run from these weights"
        )
    try:
        with safe_open(path, framework="pt") as file:
            yield file, {**file.metadata(), "decays": json.loads(file.metadata()["decays"])}
    except Exception as error:
        raise DamagedStateError(
            f"{path} is damaged ({error}); resume from an earlier checkpoint, or start a new run from these weights"
        ) from error


def read_notes(checkpoint: str | os.PathLike) -> dict:
    """What was noted with the average's state, read without its tensors.

    Args:
        checkpoint (path):
            A checkpoint folder.

    Returns:
        `dict`: the notes of [`save_ema_state`], with `decays` and `num_updates`.

    Raises:
        FileNotFoundError: if the checkpoint has no state of ours.
        DamagedStateError: if it is cut short or otherwise not what we wrote.
    """
    with _state_of(checkpoint) as (_, metadata):
        notes = json.loads(metadata.get("notes", "{}"))
        return {**notes, "decays": metadata["decays"], "num_updates": int(metadata["num_updates"])}


def read_rows(checkpoint: str | os.PathLike) -> list[dict] | None:
    """The history that a checkpoint holds, or None if it holds none that can be read.

    Args:
        checkpoint (path):
            A checkpoint folder.
    """
    path = Path(checkpoint) / ROWS_PATH
    try:
        return read_jsonl(path) if path.exists() else None
    except (ValueError, OSError):
        return None


def load_ema_state(ema: WeightEMA, checkpoint: str | os.PathLike) -> None:
    """Read the average's state from a checkpoint folder.

    Args:
        ema ([`WeightEMA`]):
            Of the same parameters and decays.
        checkpoint (path):
            A `checkpoint-N` folder.

    Raises:
        FileNotFoundError: if the checkpoint has no state of ours.
        ValueError: if it is damaged ([`DamagedStateError`]) or of another run's parameters or decays.
    """
    with _state_of(checkpoint) as (file, metadata):
        state = {"num_updates": int(metadata["num_updates"]), "decays": metadata["decays"], "base": {},
                 "displacements": [{} for _ in metadata["decays"]]}  # fmt: skip
        for name in file.keys():  # noqa: SIM118 (no mapping)
            kind, _, rest = name.partition(".")
            if kind == "base":
                state["base"][rest] = file.get_tensor(name)
            else:
                index, _, rest = rest.partition(".")
                state["displacements"][int(index)][rest] = file.get_tensor(name)
    ema.load_state_dict(state)


def why_incomplete(
    checkpoint: str | os.PathLike, save_only_model: bool = False, with_average: bool = True
) -> str | None:
    """What keeps a run from resuming exactly from this checkpoint, or None if nothing does.

    A kill while the Trainer saves leaves a folder that looks like a checkpoint. Whole means: `trainer_state.json` can
    be read (the Trainer writes it last); weights or adapters, all shards, are as long as their headers say; optimizer,
    scheduler and the random state of every process are there and not cut short; and so is the average's state, taken
    at the same step. Only headers are read. Of one process and DDP; sharded engines write other files.

    Args:
        checkpoint (path):
            A checkpoint folder.
        save_only_model (`bool`, *optional*, defaults to `False`):
            As in the run's arguments: without optimizer, scheduler and random state the checkpoint is as it should be.
        with_average (`bool`, *optional*, defaults to `True`):
            Whether the state of the weight average must be there.

    Returns:
        `str`: the first thing that is wrong, or None.
    """
    folder = Path(checkpoint)
    if (folder / _SENTINEL).exists():
        return f"{_SENTINEL} is there: a preemption save was cut off"
    try:
        step = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{TRAINER_STATE} is missing: the save was cut off"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{TRAINER_STATE} cannot be read ({error})"
    notes = {}
    if with_average:
        try:
            notes = read_notes(folder)
        except FileNotFoundError:
            return f"{STATE_PATH} (the state of the weight average) is missing"
        except DamagedStateError as error:
            return f"{STATE_PATH} is damaged ({error.__cause__})"
        if notes.get("step", step) != step:
            return f"{STATE_PATH} is of step {notes['step']}, {TRAINER_STATE} of step {step}"
    try:
        _check_weights(folder)
        if not save_only_model:
            _check_optimizer(folder, notes.get("world_size"))
    except ValueError as error:
        return str(error)
    return None


def _check_weights(folder: Path) -> None:
    files = [folder / name for name in _WHOLE_WEIGHTS] + [
        path for name in _WHOLE_WEIGHTS if name.startswith("adapter") for path in folder.glob(f"*/{name}")
    ]
    files = [path for path in files if path.exists()]
    for index in (folder / name for name in _WEIGHT_INDICES if (folder / name).exists()):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index.name} cannot be read ({error})") from error
        files += [folder / shard for shard in shards]
    if not files:
        raise ValueError(f"no weights are there (none of {', '.join(_WHOLE_WEIGHTS + _WEIGHT_INDICES)})")
    for path in files:
        _check_whole(path)
        if path.name.startswith("adapter_model"):
            _check_json(path.with_name("adapter_config.json"))


def _check_optimizer(folder: Path, processes: int | None) -> None:
    randoms = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes or 0)]
    if not randoms:  # of how many processes is not known: those that are there must be without a gap
        found = sorted(path.name for path in folder.glob("rng_state*.pth"))
        alone = not found or "rng_state.pth" in found
        randoms = ["rng_state.pth"] if alone else [f"rng_state_{rank}.pth" for rank in range(len(found))]
    for name in ("optimizer.pt", "scheduler.pt", *randoms):
        _check_whole(folder / name)
    if (folder / "scaler.pt").exists():
        _check_whole(folder / "scaler.pt")


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read ({error})") from error


def _check_whole(path: Path) -> None:
    """Raise unless the file is as long as it says itself: safetensors at its start, torch's zip format at its end."""
    if not path.exists():
        raise ValueError(f"{path.name} is missing")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        else:
            with zipfile.ZipFile(path):
                pass
    except Exception as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def last_complete_checkpoint(
    output_dir: str | os.PathLike, save_only_model: bool = False, with_average: bool = True
) -> str | None:
    """The newest checkpoint of a run that can be resumed from exactly, passing over those that a kill left half-written.

    `trainer.train(resume_from_checkpoint=True)` takes the one with the highest number, whole or not. With the bare
    callback, say instead

    ```python
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(trainer.args.output_dir))
    ```

    which starts anew where there is none yet.

    Args:
        output_dir (path):
            Of the run.
        save_only_model, with_average (`bool`, *optional*):
            What a checkpoint must hold, see [`why_incomplete`].

    Returns:
        `str`: its path, or None if no checkpoint is whole.

    Example:

    ```python
    >>> import tempfile
    >>> last_complete_checkpoint(tempfile.mkdtemp()) is None
    True

    ```
    """
    for path in reversed(checkpoints_in(output_dir)):
        reason = why_incomplete(path, save_only_model, with_average)
        if reason is None:
            return str(path)
        logger.warning(f"{path} is passed over: {reason}")
    return None


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-N` of a run, whole or not, from the earliest step to the latest.

    Args:
        output_dir (path):
            Of the run.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    folders = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.split("-")[1]))


def unmark_checkpoint(checkpoint: str | os.PathLike) -> None:
    """Let a checkpoint that is about to be overwritten no longer pass for whole.

    The Trainer writes into the folder of an earlier run file by file: killed on the way, it would leave a mixture of
    both that nothing is missing from.

    Args:
        checkpoint (path):
            Its `trainer_state.json` is renamed and the average's state removed, as far as they are there.
    """
    (Path(checkpoint) / STATE_PATH).unlink(missing_ok=True)
    marker = Path(checkpoint) / TRAINER_STATE
    if marker.exists():
        os.replace(marker, marker.with_name("trainer_state.replaced.json"))


def save_averaged_model(
    ema: WeightEMA,
    model,
    tokenizer,
    folder: str | os.PathLike,
    write_card: Callable[[Path], None] | None = None,
) -> None:
    """Write the averaged model (or adapter) and its tokenizer as `from_pretrained` loads them, replacing `folder`.

    The folder is written beside its place and then renamed: whatever stands in `folder` is whole. Killed between two
    renames, what was there before comes back with the next save.

    Args:
        ema ([`WeightEMA`]):
            Swapped into `model` for the time.
        model (`PreTrainedModel` or `PeftModel`):
            Whose parameters it averages; holds the same values afterwards.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Saved beside it.
        folder (path):
            Where to.
        write_card (`Callable[[Path], None]`, *optional*):
            Called with the written folder before it gets its name, to put a model card into it. What it raises is only
            warned about: the weights matter more.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A Trainer that pushes to the hub may be looking through the folder just now; it leaves out names with an underscore.
    prefix = f"_{folder.name}.unfinished-"
    for left_over in folder.parent.glob(f"[._]{prefix[1:]}*"):
        if (left_over / "replaced").exists() and not folder.exists():
            (left_over / "replaced").rename(folder)
        shutil.rmtree(left_over, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as temporary:
        staged = Path(temporary) / folder.name
        with ema.swapped_in():
            model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if write_card is not None:
            try:
                write_card(staged)
            except Exception as error:
                logger.warning(f"{folder} is saved without a model card: {type(error).__name__}: {error}")
        for path in staged.rglob("*"):
            if path.is_file():
                _to_disk(path)
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        staged.rename(folder)


def last_checkpoint_at(output_dir: str | os.PathLike, step: int) -> Path | None:
    """The folder `checkpoint-{step}` of a run, if it is there.

    Args:
        output_dir (path):
            Of the run.
        step (`int`):
            Optimizer step.
    """
    folder = Path(output_dir) / f"checkpoint-{step}"
    return folder if folder.is_dir() else None
