"""How a run goes on from a checkpoint: which folder it is, with which decay, and what if nothing is left to do.

Knows: what was asked for now, what the checkpoint says of then, and how to say that the two do not fit.
Does not know: how files are made whole (checkpoint.py, history.py), or when the Trainer does what (callback.py).
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerState

from .checkpoint import TRAINER_STATE, DamagedStateError, checkpoints_in, last_complete_checkpoint, read_notes
from .decay import DEFAULT_HALF_LIFE, resolve_decays
from .ema import WeightEMA


def find_checkpoint(step: int, candidates: Iterable[str | os.PathLike | None]) -> Path:
    """The folder that a run resumed from: the first candidate that is a checkpoint of that step.

    Args:
        step (`int`):
            Optimizer step that the Trainer goes on from.
        candidates (iterable of paths or None):
            The surest first.

    Returns:
        `Path`

    Raises:
        FileNotFoundError: if none is.
    """
    seen = []
    for candidate in candidates:
        if candidate is None:
            continue
        seen.append(str(candidate))
        try:
            state = json.loads((Path(candidate) / TRAINER_STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if state.get("global_step") == step:
            return Path(candidate)
    raise FileNotFoundError(
        f"resuming from step {step}, but no checkpoint of that step to read the average from was found (looked at "
        f"{', '.join(seen)}); set callback.resume_from to the folder given to train(resume_from_checkpoint=...)"
    )


def usable_notes(checkpoint: Path, step: int, output_dir: str | os.PathLike, restart: bool) -> dict | None:
    """What a checkpoint says of its average, if that can be gone on with.

    Args:
        checkpoint (`Path`):
            The one resumed from.
        step (`int`):
            Optimizer step of its weights.
        output_dir (path):
            Of the run, where other checkpoints may lie.
        restart (`bool`):
            Whether to return None instead of raising.

    Raises:
        FileNotFoundError, DamagedStateError: naming the ways out.
    """
    try:
        notes = read_notes(checkpoint)
        if notes.get("step", step) != step:
            raise DamagedStateError(f"it is of step {notes['step']}, the weights are of step {step}")
        return notes
    except (FileNotFoundError, DamagedStateError) as error:
        if restart:
            return None
        if isinstance(error, FileNotFoundError):
            problem = (
                "holds no state of the weight average: it was saved without SafeEMACallback or with save_only_model"
            )
        else:
            problem = f"holds a weight average that cannot be used ({error.__cause__ or error})"
        raise type(error)(f"{checkpoint} {problem}. {_way_out(checkpoint, output_dir)}") from error


def _way_out(checkpoint: Path, output_dir: str | os.PathLike) -> str:
    others = [last_complete_checkpoint(folder) for folder in dict.fromkeys((checkpoint.parent, Path(output_dir)))]
    others = [other for other in others if other is not None and not os.path.samefile(other, checkpoint)]
    best = (
        f"train(resume_from_checkpoint={others[0]!r}), which is whole" if others else "an earlier checkpoint, if any"
    )
    return (
        f"Resume from {best}; or give SafeEMACallback(on_missing_state='restart') to start the average anew from this "
        "checkpoint's weights, which then count as the starting point instead of the aligned model; or resume without "
        "the callback"
    )


def checkpoints_after(step: int, output_dir: str | os.PathLike) -> list[str]:
    """Names of the checkpoints of later steps, left by an earlier run or a part of this one that will be done again.

    Args:
        step (`int`):
            Optimizer step that the run starts from.
        output_dir (path):
            Of the run.
    """
    return [path.name for path in checkpoints_in(output_dir) if int(path.name.split("-")[1]) > step]


def decay_request(half_life, decay) -> dict:
    """What a user asked for, as it is noted in checkpoints.

    Args:
        half_life, decay:
            As given to the callback.
    """
    if decay is None and half_life is None:
        half_life = DEFAULT_HALF_LIFE
    return {"half_life": _plain(half_life), "decay": _plain(decay)}


def _plain(value):
    return list(value) if isinstance(value, Sequence) else value


def decays_to_go_on_with(notes: dict, half_life, decay, total_steps: int) -> tuple[list[float], str | None]:
    """The decays of a resumed run: those it began with.

    A half-life that is a fraction of the run means another decay once the run has another length. An average whose
    decay changes on the way is neither the short run's nor the long one's, so the first decay stays.

    Args:
        notes (`dict`):
            Of the checkpoint, see [`read_notes`].
        half_life, decay:
            As given to the callback now.
        total_steps (`int`):
            Optimizer steps of the run now.

    Returns:
        `(list[float], str | None)`: the decays, and what to warn about.

    Raises:
        ValueError: if something else is asked for than when the run began.

    Example:

    ```python
    >>> notes = {"decays": [0.5], "request": {"half_life": 0.25, "decay": None}, "total_steps": 4}
    >>> decays_to_go_on_with(notes, 0.25, None, total_steps=4)
    ([0.5], None)
    >>> decays_to_go_on_with(notes, 0.25, None, total_steps=8)[1]
    'the run was of 4 steps when half_life=0.25 was made a decay of 0.5, and is of 8 now; the average goes on with 0.5'

    ```
    """
    saved, request, steps = notes["decays"], decay_request(half_life, decay), notes.get("total_steps")
    same_request = request == notes.get("request", request)
    try:
        asked = resolve_decays(half_life, decay, total_steps)
    except ValueError:  # a half-life in steps that is longer than what is now the run: it was not when the run began
        asked = saved if same_request else None
    if asked == saved:
        return saved, None
    shown = ", ".join(f"{value:g}" for value in saved)
    given = f"decay={decay}" if decay is not None else f"half_life={request['half_life']}"
    if same_request and decay is None:
        return saved, (
            f"the run was of {'another number of' if steps is None else steps} steps when {given} was made a decay of "
            f"{shown}, and is of {total_steps} now; the average goes on with {shown}"
        )
    raise ValueError(
        f"the checkpoint's average has decay {shown} and goes on with it, but this run asks for {given}, another one; "
        f"give what the run began with, or decay={saved if len(saved) > 1 else saved[0]}, which is the same"
    )


def from_the_same_base(new: WeightEMA, first: WeightEMA) -> None:
    """Give a fresh average the starting point of an earlier one, of the same parameters.

    The Trainer's search for a batch size (`auto_find_batch_size`) begins anew after running out of memory, with weights
    that have been trained: they are not the model that the average is anchored to.

    Args:
        new ([`WeightEMA`]):
            Changed.
        first ([`WeightEMA`]):
            Whose θ₀ it gets.
    """
    new.load_state_dict({**new.state_dict(), "base": first.state_dict()["base"]})


@dataclass
class Run:
    """What holds for one call of `train()`.

    Args:
        step (`int`):
            Optimizer step that the average has taken in.
        max_steps (`int`):
            Optimizer steps of the run.
        world_size (`int`):
            Processes.
        keeps_state (`bool`):
            Whether this process puts the average's state into checkpoints.
    """

    step: int
    max_steps: int
    world_size: int
    keeps_state: bool
    resumed: bool = False
    """From a checkpoint."""
    own_folder: bool = False
    """That lies in the run's own output folder."""
    over: bool = False
    """At the step that was resumed from."""
    begun: bool = False
    """The first epoch has."""
    saved_steps: set[int] = field(default_factory=set)
    """Whose checkpoints have got the state."""
    undone: "UndoneStep | None" = None

    def notes(self, half_life, decay) -> dict:
        """What a checkpoint says of its average, for [`decays_to_go_on_with`] and [`usable_notes`] to read.

        Args:
            half_life, decay:
                As given to the callback.
        """
        request = decay_request(half_life, decay)
        return {"step": self.step, "request": request, "total_steps": self.max_steps, "world_size": self.world_size}


class UndoneStep:
    """Undoes the step that the Trainer takes too much when it resumes a run that is over.

    transformers 5.23 looks whether a run is over after a step, not before. Resumed from its last checkpoint, a run
    whose end is not the end of an epoch takes one step more, and would end with other weights.

    Args:
        model (`nn.Module`):
            Its trainable parameters are copied to memory beside the accelerator's.
        state (`TrainerState`):
            As resumed.
    """

    def __init__(self, model: nn.Module, state: TrainerState):
        self.step, self.epoch = state.global_step, state.epoch
        params = [param for param in model.parameters() if param.requires_grad]
        self.kept = [(param, param.detach().to("cpu", copy=True)) for param in params]

    @torch.no_grad()
    def undo(self, state: TrainerState) -> None:
        """Put weights and step count back.

        Args:
            state (`TrainerState`):
                After the step.
        """
        for param, value in self.kept:
            param.copy_(value)
        state.global_step, state.epoch = self.step, self.epoch
