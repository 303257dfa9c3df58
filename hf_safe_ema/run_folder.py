"""What a run finds in its folders when it begins, and what it leaves there when it ends.

Knows: the checkpoint that is resumed from, the files of earlier runs, and how to say what became of them.
Does not know: how files are made whole (checkpoint.py, history.py), what a checkpoint and a run must have in common
(resume.py), or when the Trainer does what (callback.py).
"""

import functools
from collections.abc import Iterable
from pathlib import Path

from transformers import TrainingArguments
from transformers.utils import logging

from .card import write_card
from .checkpoint import load_ema_state, read_rows, save_averaged_model
from .ema import WeightEMA
from .engine import resumed_checkpoint, same_on_every_rank
from .findings import Findings
from .history import History, set_aside
from .resume import checkpoints_after, decays_to_go_on_with, find_checkpoint, from_the_same_base

logger = logging.get_logger(__name__)


def start_history(history: History) -> None:
    """Begin a history anew, and say where an earlier run's is now.

    Args:
        history ([`History`]):
            Of the run.
    """
    for moved in history.start():
        logger.warning(f"an earlier run's files were in the way and are now at {moved}")


def start_again(findings: Findings, ema: WeightEMA, first: WeightEMA) -> None:
    """Begin anew with another batch size, from the base and the history of the first start.

    Args:
        findings ([`Findings`]):
            Of the run.
        ema ([`WeightEMA`]):
            Changed.
        first ([`WeightEMA`]):
            The average of the first start.
    """
    logger.warning("training starts again with another batch size; the base stays what it was at the first start")
    from_the_same_base(ema, first)
    findings.history.resume(0)
    findings.base_metrics = findings.history.base_metrics()
    findings.checked_step = 0  # these weights are not the base any more


def resume_history(findings: Findings, checkpoint: Path, step: int, guarded: str) -> dict | None:
    """Go on with the history of a checkpoint, on all processes alike.

    Args:
        findings ([`Findings`]):
            Of the run; gets the metrics of the base, and whether the step has been checked.
        checkpoint (`Path`):
            The one resumed from.
        step (`int`):
            Its optimizer step.
        guarded (`str`):
            Weights that the limit is for.

    Returns:
        `dict`: the report on those weights at that step; None if there is none.
    """
    history = findings.history
    for moved in history.resume(step, read_rows(checkpoint)):
        logger.warning(f"what had been found after step {step} is now at {moved}")
    known = (history.base_metrics(), history.is_checked(step), history.report(step, guarded))
    # What follows from it, all processes must do together.
    findings.base_metrics, checked, report = same_on_every_rank(known)
    findings.checked_step = step if checked else None
    return report


def resumed_from(step: int, named: str | None, args: TrainingArguments) -> tuple[Path, bool]:
    """The checkpoint that the Trainer calling us resumes from.

    Args:
        step (`int`):
            Optimizer step that it goes on from.
        named (path, *optional*):
            Where the user says that it is.
        args (`TrainingArguments`):
            Of the run.

    Returns:
        `(Path, bool)`: its folder, and whether that lies in the run's own output folder.

    Raises:
        FileNotFoundError: if it cannot be told.
    """
    beside = Path(args.output_dir) / f"checkpoint-{step}"
    checkpoint = find_checkpoint(step, (named, resumed_checkpoint(), args.resume_from_checkpoint, beside))
    return checkpoint, checkpoint.resolve().parent == beside.resolve().parent


def first_decays(notes: dict, half_life, decay, total_steps: int) -> list[float]:
    """The decays that a resumed run began with; says so where they are not what the arguments mean by now.

    Args:
        notes, half_life, decay, total_steps:
            As for [`decays_to_go_on_with`].

    Raises:
        ValueError: if something else is asked for than when the run began.
    """
    decays, warning = decays_to_go_on_with(notes, half_life, decay, total_steps)
    if warning is not None:
        logger.warning(warning)
    return decays


def load_average(ema: WeightEMA, checkpoint: Path, step: int) -> None:
    """Take the average's state from the checkpoint that is resumed from.

    Args:
        ema ([`WeightEMA`]):
            Of the model as resumed.
        checkpoint (`Path`):
            With usable state.
        step (`int`):
            Its optimizer step.
    """
    load_ema_state(ema, checkpoint)
    if ema.mode == "lookahead" and step % ema.sync_steps == 0:
        ema.copy_to_parameters()  # a preemption checkpoint holds the weights from before it


def load_average_of_best(ema: WeightEMA, checkpoint: str) -> bool:
    """Take the average's state from the best checkpoint, whose weights the Trainer has loaded; warn if it cannot be.

    Args:
        ema ([`WeightEMA`]):
            Of the run.
        checkpoint (`str`):
            The best one.

    Returns:
        `bool`: whether it could.
    """
    try:
        load_ema_state(ema, checkpoint)
    except (FileNotFoundError, ValueError) as error:
        logger.warning(
            f"the best checkpoint {checkpoint} was loaded, but its average could not be: {error}. The model keeps "
            "the live weights of that checkpoint; the average that is saved is the one of the last step"
        )
        return False
    return True


def warn_of_later_checkpoints(step: int, output_dir: str) -> None:
    """Say so if there are checkpoints of steps that the run has not come to yet.

    Args:
        step (`int`):
            Optimizer step that the run starts from.
        output_dir (`str`):
            Of the run.
    """
    later = checkpoints_after(step, output_dir)
    if later:
        logger.warning(
            f"{output_dir} holds {', '.join(later)} from before, while this run starts at step {step}: they are "
            "overwritten when it gets there, and until then resume_from_checkpoint=True would take them"
        )


def make_room(folder: Path) -> None:
    """Set aside the averaged model of an earlier run, and say where it is now.

    Args:
        folder (`Path`):
            Where this run's is to be.
    """
    moved = set_aside(folder)
    if moved is not None:
        logger.warning(f"an earlier run's average was in the way and is now at {moved}")


def save_average(ema: WeightEMA, model, tokenizer, folder: Path, rows: Iterable[dict], step: int) -> None:
    """Write the averaged model with its tokenizer and a card that says what was found.

    Args:
        ema, model, tokenizer, folder:
            As for [`save_averaged_model`].
        rows (iterable of `dict`):
            Of the history.
        step (`int`):
            Optimizer step of the average.
    """
    card = functools.partial(write_card, rows=rows, ema=ema, model=model, step=step)
    save_averaged_model(ema, model, tokenizer, folder, card)
