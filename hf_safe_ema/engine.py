"""What a callback has to find out about the run that it is in.

Knows: transformers' Trainer and its engines (mixed precision, processes, sharding), as of transformers 5.23.
Does not know: averaging or safety.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import IntervalStrategy

from .processes import rank_and_size

PREPARED = "_is_accelerate_prepared"
"""What accelerate (1.15) sets on a model that it has prepared, wrapped or not."""


def refuse_sharded(model: nn.Module) -> None:
    """Raise if this process holds only a part of the parameters, which would be averaged and swapped wrongly.

    Args:
        model (`nn.Module`):
            As the Trainer hands it to callbacks.

    Raises:
        ValueError: for FSDP (1 and 2), tensor-parallel and DeepSpeed ZeRO-3 parameters.
    """
    engine = None
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        engine = "FSDP"
    for param in model.parameters():
        if hasattr(param, "ds_id"):
            engine = "DeepSpeed ZeRO-3"
        elif hasattr(param, "placements"):
            engine = "FSDP2 or tensor parallelism"
    if engine is not None:
        raise ValueError(
            f"SafeEMACallback does not average parameters sharded by {engine} yet; train with DDP or in one process"
        )


def refuse_unsynchronized(model: nn.Module) -> None:
    """Raise if several processes train each by itself, as they do when evaluated before they train.

    accelerate (1.15) marks a model that is prepared for evaluation alone as prepared, and then does not wrap it in DDP
    for the training (transformers 5.23): gradients are not shared, and each process trains another model unnoticed.

    Args:
        model (`nn.Module`):
            As the Trainer hands it to callbacks.

    Raises:
        RuntimeError: naming the ways out.
    """
    processes = rank_and_size()[1]
    if processes > 1 and getattr(model, PREPARED, False) and not isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            f"{processes} processes are about to train without sharing their gradients: evaluate() or predict() was "
            "called before train(), after which accelerate does not wrap the model for training any more. Evaluate "
            "with another Trainer, use eval_on_start=True, or use SafeSFTTrainer, which may evaluate first"
        )


def forget_evaluation(model: nn.Module) -> None:
    """Let a model that was only evaluated so far be wrapped for training as if it had not been.

    Args:
        model (`nn.Module`):
            The Trainer's own, not wrapped. See [`refuse_unsynchronized`].
    """
    if rank_and_size()[1] > 1:
        vars(model).pop(PREPARED, None)


def tokenizer_of(moment: dict):
    """The tokenizer among a callback's keyword arguments, or None.

    Args:
        moment (`dict`):
            Keyword arguments of a hook. A multimodal model's processor has the tokenizer inside.
    """
    processing_class = moment.get("processing_class")
    return getattr(processing_class, "tokenizer", processing_class)


def full_name(metric: str | None) -> str | None:
    """The name under which the Trainer looks a metric up.

    Args:
        metric (`str`, *optional*):
            As in `metric_for_best_model`, with or without `eval_`.
    """
    return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"


def precision_of(args: TrainingArguments, model: nn.Module):
    """A context for forward passes in the Trainer's own mixed precision; generate() of a PEFT model goes past it.

    Args:
        args (`TrainingArguments`):
            Of the run.
        model (`nn.Module`):
            For its device.
    """
    if not (args.bf16 or args.fp16):
        return contextlib.nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16 if args.bf16 else torch.float16)


def is_evaluated(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the Trainer evaluates at this step by its own schedule.

    Args:
        args (`TrainingArguments`):
            Of the run.
        state (`TrainerState`):
            Of the step.
    """
    if args.eval_strategy == IntervalStrategy.STEPS:
        return state.global_step % state.eval_steps == 0 and args.eval_delay <= state.global_step
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return float(state.epoch).is_integer() and args.eval_delay <= state.epoch
    return False


def same_on_every_rank(value):
    """The first rank's value, on every rank: ranks that judged apart must not decide apart.

    Args:
        value:
            Anything that can be pickled between the run's own processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _trainer_class() -> type:
    """Imported only once a Trainer is calling us: it brings datasets along, which the callback alone does not need."""
    from transformers import Trainer

    return Trainer


def _frames_of(kind: type) -> Iterator[FrameType]:
    """The methods of an object of that kind that are calling us, the innermost first. Nothing of them is changed."""
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), kind):
            yield frame
        frame = frame.f_back


def running_callback_handler() -> CallbackHandler | None:
    """The CallbackHandler that is calling us, or None.

    transformers 5.23 hands callbacks neither the Trainer nor its loggers, and reports in `on_log` run before ours. The
    handler is two frames up the stack whenever a Trainer calls; nothing of it is changed.
    """
    return next((frame.f_locals["self"] for frame in _frames_of(CallbackHandler)), None)


def log_values(
    args: TrainingArguments, state: TrainerState, control: TrainerControl, values: dict[str, float]
) -> None:
    """Hand values to everything that the Trainer calling us logs to (report_to, the progress bar), and to its history.

    Args:
        args, state, control:
            As a callback gets them.
        values (`dict[str, float]`):
            By full name.
    """
    values = {**values, **({} if state.epoch is None else {"epoch": state.epoch})}
    state.log_history.append({**values, "step": state.global_step})
    handler = running_callback_handler()
    if handler is not None:
        due = control.should_log  # on_log takes it back, and the Trainer's own values may still be to come
        handler.on_log(args, state, control, dict(values))
        control.should_log = due


def refuse_late_early_stopping(callback: TrainerCallback, args: TrainingArguments, names: set[str]) -> None:
    """Raise if early stopping would look for a metric of ours before it is there.

    Args:
        callback (`TrainerCallback`):
            Ours.
        args (`TrainingArguments`):
            Of the run.
        names (set of `str`):
            Metrics that come from it.

    Raises:
        ValueError: saying in which order to put the callbacks.
    """
    handler = running_callback_handler()
    if handler is None or full_name(args.metric_for_best_model) not in names or callback not in handler.callbacks:
        return
    for earlier in handler.callbacks[: handler.callbacks.index(callback)]:
        if isinstance(earlier, EarlyStoppingCallback):
            raise ValueError(
                f"EarlyStoppingCallback comes before SafeEMACallback, and would look for {args.metric_for_best_model} "
                "before it is there; put SafeEMACallback first in callbacks=[...]"
            )


def resumed_checkpoint() -> str | None:
    """The checkpoint that the Trainer calling us resumes from, or None if that cannot be seen.

    transformers 5.23 tells callbacks the step (`state.global_step`) but not the folder, which may have been moved or
    renamed; it is an argument of the training loop that calls them.
    """
    for frame in _frames_of(_trainer_class()):
        path = frame.f_locals.get("resume_from_checkpoint")
        if isinstance(path, (str, os.PathLike)):
            return str(path)
    return None


def forget_loss() -> None:
    """Set what the Trainer calling us has summed up as its training loss to zero, if it has it where 5.23 does."""
    for frame in _frames_of(_trainer_class()):
        loss = getattr(frame.f_locals["self"], "_tr_loss", None)
        if torch.is_tensor(loss):
            loss.zero_()
        return


class SaveMoment(TrainerCallback, ExportableState):
    """Calls a function within the Trainer's saving of a checkpoint, just before `trainer_state.json` makes it whole.

    `on_save` comes after the checkpoint is whole, older ones are deleted and the upload has begun, and not at all for
    preemption checkpoints: a kill before it would leave only checkpoints without the average. The one thing that
    transformers (5.23) asks of callbacks in time is the state of those that are an `ExportableState`, so this small
    one is put beside ours and has nothing to state. Ours cannot be one itself: restoring would build it anew.

    A run that resumes with `restore_callback_states_from_checkpoint=True` says that it ignores this one; rightly.
    """

    def __init__(self):
        self.call: Callable[[Path, int], None] | None = None

    @classmethod
    def attach(cls, state: TrainerState, call: Callable[[Path, int], None]) -> "SaveMoment | None":
        """Have the Trainer calling us call back when it saves.

        Args:
            state (`TrainerState`):
                The run's.
            call (callable):
                Given the folder being written and its step, on the processes that write checkpoints.

        Returns:
            `SaveMoment`: None if no handler is calling us: then only `on_save` is left.
        """
        handler = running_callback_handler()
        if handler is None:
            return None
        moment = next((callback for callback in handler.callbacks if isinstance(callback, cls)), None)
        if moment is None:
            moment = cls()
            handler.add_callback(moment)
        moment.call = call
        state.stateful_callbacks.setdefault(cls.__name__, {})  # absent from checkpoints made without us: a KeyError
        return moment

    def detach(self) -> None:
        """Call back no more, and leave the handler as it was found."""
        self.call = None
        handler = running_callback_handler()
        if handler is not None and self in handler.callbacks:
            handler.remove_callback(self)

    def state(self) -> dict:
        """Nothing to save; that we are asked is all."""
        for frame in _frames_of(_trainer_class()):
            if self.call is not None and frame.f_code.co_name == "_save_checkpoint" and "output_dir" in frame.f_locals:
                self.call(Path(frame.f_locals["output_dir"]), frame.f_locals["self"].state.global_step)
                break
        return {"args": {}, "attributes": {}}
