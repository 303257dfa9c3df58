"""Files: the average's own state in a checkpoint, and a folder that `from_pretrained` loads.

Knows: how to write so that a file is whole or absent, and where in a checkpoint PEFT does not look for adapters.
Does not know: when to save, or what the numbers mean. safetensors and JSON only.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .ema import WeightEMA

# PEFT takes a direct sub-folder of a checkpoint that holds adapter_model.safetensors for one more adapter.
STATE_PATH = Path("safe_ema") / "state" / "ema_state.safetensors"


def save_ema_state(ema: WeightEMA, checkpoint: str | os.PathLike) -> None:
    """Write the average's state into a checkpoint folder.

    Args:
        ema ([`WeightEMA`]):
            Its state in full precision.
        checkpoint (path):
            A `checkpoint-N` folder.
    """
    state = ema.state_dict()
    tensors = {f"base.{name}": tensor for name, tensor in state["base"].items()}
    for index, displacement in enumerate(state["displacements"]):
        tensors.update({f"displacement.{index}.{name}": tensor for name, tensor in displacement.items()})
    metadata = {"format": "hf_safe_ema", "version": "1", "num_updates": str(state["num_updates"]),
                "decays": json.dumps(state["decays"])}  # fmt: skip
    path = Path(checkpoint) / STATE_PATH
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_ema_state(ema: WeightEMA, checkpoint: str | os.PathLike) -> None:
    """Read the average's state from a checkpoint folder.

    Args:
        ema ([`WeightEMA`]):
            Of the same parameters and decays.
        checkpoint (path):
            A `checkpoint-N` folder.

    Raises:
        FileNotFoundError: if the checkpoint has no state of ours.
        ValueError: if it is damaged or of another run's parameters or decays.
    """
    path = Path(checkpoint) / STATE_PATH
    if not path.exists():
        raise FileNotFoundError(
            f"{checkpoint} holds no state of the weight average ({STATE_PATH} is missing): it was saved without "
            "SafeEMACallback. Resume without the callback, or start a new run from these weights"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        decays = json.loads(metadata["decays"])
        state = {"num_updates": int(metadata["num_updates"]), "decays": decays, "base": {},
                 "displacements": [{} for _ in decays]}  # fmt: skip
    except Exception as error:
        raise ValueError(
            f"{path} is damaged ({error}); resume from an earlier checkpoint, or start a new run from these weights"
        ) from error
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "base":
            state["base"][rest] = tensor
        else:
            index, _, rest = rest.partition(".")
            state["displacements"][int(index)][rest] = tensor
    ema.load_state_dict(state)


def save_averaged_model(ema: WeightEMA, model, tokenizer, folder: str | os.PathLike) -> None:
    """Write the averaged model (or adapter) and its tokenizer as `from_pretrained` loads them, replacing `folder`.

    The folder is written beside its place and then renamed, so that it is whole or what it was before.

    Args:
        ema ([`WeightEMA`]):
            Swapped into `model` for the time.
        model (`PreTrainedModel` or `PeftModel`):
            Whose parameters it averages; holds the same values afterwards.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Saved beside it.
        folder (path):
            Where to.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        staged = Path(temporary) / folder.name
        with ema.swapped_in():
            model.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        if folder.exists():
            folder.rename(Path(temporary) / "replaced")
        shutil.move(staged, folder)


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
