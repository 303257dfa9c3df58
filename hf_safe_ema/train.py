"""`hf-safe-ema train`: a recipe made into a run, on one process or several.

Knows: which parts a run is put together from, what must not be overwritten, and what a person wants to see at the end.
Does not know: how settings are typed (recipe.py), what a run will cost (plan.py), or how any part works.
"""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging
from trl import get_peft_config, get_quantization_config

from .data import load_finetuning_data, split_heldout
from .decay import resolve_decays
from .findings import UnsafeModelError
from .history import HISTORY_NAME, check_writable, read_jsonl, write_whole
from .memory import load_config
from .page import write_run_page_or_warn
from .plan import count_steps, describe
from .processes import on_every_rank
from .recipe import Recipe, read_recipe
from .report import format_table, plot_history, summarise
from .trainer import SafeSFTTrainer

logger = logging.get_logger(__name__)

RECIPE_NAME = "recipe.yaml"
"""In the output folder: the settings of the run. By its first line `overwrite` knows a folder that it may delete."""

_FIRST_LINE = "# Made by hf-safe-ema train."


class InputError(ValueError):
    """Something that was given cannot be used; nothing has been trained."""


def one_line(error: BaseException) -> str:
    """An error's text without line breaks.

    Args:
        error (`BaseException`):
            Any.
    """
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _input_errors() -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise InputError(one_line(error)) from error


@contextlib.contextmanager
def _on_every_process() -> Iterator[None]:
    """Input errors within the block, on whichever process, as an input error on all: none is left waiting."""
    mine = None
    try:
        with _input_errors():
            yield
    except InputError as error:
        mine = error
    problems = [None if mine is None else str(mine)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        problems = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(problems, None if mine is None else str(mine))
    if mine is not None:
        raise mine
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise InputError(f"process {rank}: {problem}")


def load_rows(recipe: Recipe):
    """Training rows and held-out rows (None without).

    Args:
        recipe ([`Recipe`]):
            Which data.

    Raises:
        ValueError, TypeError, FileNotFoundError: if they cannot be had, or do not go with the other settings.
    """
    run, training = recipe.run, recipe.training
    if run.streaming:
        count_steps(training, None)
    if training.eval_strategy != IntervalStrategy.NO and not run.heldout_share:
        raise ValueError(
            f"eval_strategy={training.eval_strategy.value!r} with heldout_share=0 leaves nothing to evaluate on; hold a "
            "share out, or set eval_strategy to 'no'"
        )
    rows = load_finetuning_data(
        run.dataset,
        max_rows=run.max_rows,
        streaming=run.streaming,
        remove_refusals=run.remove_refusals,
        config=run.dataset_config,
        split=run.dataset_split,
        revision=run.dataset_revision,
    )
    if not run.heldout_share:
        return rows, None
    train, heldout = split_heldout(rows, run.heldout_share)
    if run.streaming:
        return train, heldout.take(run.heldout_rows)
    return train, heldout.shuffle(seed=0).select(range(min(len(heldout), run.heldout_rows)))


def check_output_dir(recipe: Recipe) -> None:
    """Raise if the run would overwrite something that nobody asked it to. Changes nothing.

    Args:
        recipe ([`Recipe`]):
            Where to, and whether to overwrite or to resume.

    Raises:
        ValueError: saying what to do.
    """
    folder = Path(recipe.training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()) or recipe.resume_from is not None:
        return
    if not recipe.run.overwrite:
        raise ValueError(
            f"output_dir {folder} is not empty; give another --output_dir, --resume_from_checkpoint true to go on with "
            "the run in it, or --overwrite to delete it"
        )
    if not _is_our_own(folder):
        raise ValueError(
            f"output_dir {folder} holds no earlier run of this command ({RECIPE_NAME}); --overwrite will not delete it"
        )


def _is_our_own(folder: Path) -> bool:
    marker = folder / RECIPE_NAME
    return marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(_FIRST_LINE)


def _open_output_dir(recipe: Recipe) -> None:
    folder = Path(recipe.training.output_dir)
    if recipe.run.overwrite and recipe.resume_from is None and folder.is_dir() and _is_our_own(folder):
        shutil.rmtree(folder)
    check_writable(folder)
    write_whole(folder / RECIPE_NAME, f"{_FIRST_LINE} Use it with --config to make the same run.\n{recipe.as_yaml()}")


def build_trainer(recipe: Recipe, train, heldout) -> SafeSFTTrainer:
    """The trainer of a run, its model loaded.

    Args:
        recipe ([`Recipe`]):
            Of the run.
        train (`datasets.Dataset` or `datasets.IterableDataset`), heldout (same or None):
            Its rows.

    Raises:
        ValueError, OSError, ImportError: if the model or what it needs cannot be had.
    """
    model, training = recipe.model, recipe.training
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    return SafeSFTTrainer(
        model=recipe.model_path,
        args=training,
        train_dataset=train,
        eval_dataset=heldout,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


class _Begun(TrainerCallback):
    """Tells an error of the settings from one of the training itself."""

    def __init__(self):
        self.yes = False

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.yes = True


def train(recipe: Recipe) -> dict:
    """Fine-tune as a recipe says; write history, responses, plot and model to its output folder.

    Args:
        recipe ([`Recipe`]):
            From [`read_recipe`].

    Returns:
        `dict`: `table` (a dict for each weights checked), `steps`, `files` (by what they are), `output_dir`,
        `train_rows` (None for a stream), `heldout_rows`, `seconds`.

    Raises:
        InputError: before the first step, if something that was given cannot be used.
        UnsafeModelError: with `on_violation: raise`.

    Example:

    ```python
    >>> from hf_safe_ema.recipe import read_recipe
    >>> recipe = read_recipe(["--config", "examples/recipes/testbed_dolly_lora.yaml"])  # doctest: +SKIP
    >>> result = train(recipe)  # doctest: +SKIP
    >>> [row["weights"] for row in result["table"]]  # doctest: +SKIP
    ['base', 'live', 'ema']

    ```
    """
    started = time.monotonic()
    _quiet_but_first(recipe)
    with _on_every_process():
        check_output_dir(recipe)
        load_config(recipe)
        rows, heldout = load_rows(recipe)
    with _input_errors():
        trainer = build_trainer(recipe, rows, heldout)
        _check_half_life(recipe, trainer)
    begun = _Begun()
    trainer.add_callback(begun)
    with _on_every_process():
        if trainer.is_world_process_zero():
            _open_output_dir(recipe)
    try:
        trainer.train(resume_from_checkpoint=recipe.resume_from)
    except (ValueError, OSError) as error:
        if begun.yes:
            raise
        raise InputError(one_line(error)) from error
    folder = Path(recipe.training.output_dir)
    trainer.save_model(str(folder))
    files, table = {"model": str(folder)}, []
    if trainer.is_world_process_zero():
        table = _write_findings(recipe, folder, files, trainer.state.global_step)
    if recipe.training.push_to_hub:
        trainer.push_to_hub()
    result = {
        "table": table,
        "steps": trainer.state.global_step,
        "files": files,
        "output_dir": str(folder),
        "train_rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "heldout_rows": len(heldout) if hasattr(heldout, "__len__") else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    _leave_together(trainer)
    return result


def _leave_together(trainer: SafeSFTTrainer) -> None:
    """End the work of several processes in order, so that none is ended by a signal for the way it left."""
    on_every_rank(lambda: None)  # the first still had files to write
    # DDP's wrapper of the model would hold on to the process group beyond its end.
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    if hasattr(trainer, "end"):  # since transformers 5.18; without it NCCL complains of processes that just leave
        trainer.end()


def _end_process_group() -> None:
    """Torch (2.13) now and then aborts a process ("terminate called ...") that ends with its group still there."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _check_half_life(recipe: Recipe, trainer: SafeSFTTrainer) -> None:
    """Raise for one that is longer than the run, which the callback would only find with the output folder opened."""
    training = recipe.training
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None
    steps, _ = count_steps(training, rows)
    if training.ema and recipe.resume_from is None:  # a resumed run keeps the decay that it began with
        resolve_decays(training.ema_half_life, training.ema_decay, steps)


def _quiet_but_first(recipe: Recipe) -> None:
    if recipe.training.process_index == 0:
        return
    from datasets import disable_progress_bars

    logging.set_verbosity_error()
    logging.get_logger(__package__).setLevel("ERROR")  # not a child of transformers' logger
    logging.disable_progress_bar()
    disable_progress_bars()
    recipe.training.log_level_replica = "error"
    recipe.training.disable_tqdm = True


def _write_findings(recipe: Recipe, folder: Path, files: dict[str, str], steps: int) -> list[dict]:
    if recipe.training.ema:
        files["averaged model"] = str(folder / "ema")
    history = read_jsonl(folder / HISTORY_NAME)
    table = summarise(history)
    if table:
        files["history"] = str(folder / HISTORY_NAME)
        files["responses"] = str(folder / ("_safety" if recipe.training.push_to_hub else "safety"))
        files["plot"] = str(folder / "safety.png")
        title = _title(recipe, steps, table)
        plot_history(history, files["plot"], title=title)
        page = write_run_page_or_warn(folder, title, responses=not recipe.training.push_to_hub)
        if page is not None:
            files["report"] = str(page)
    return table


def _title(recipe: Recipe, steps: int, table: Sequence[dict]) -> str:
    training, how = recipe.training, "LoRA" if recipe.model.use_peft else "full"
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return (
        f"{Path(recipe.model.model_name_or_path).name} fine-tuned on {Path(recipe.run.dataset).name} ({how}): "
        f"lr {training.learning_rate:g}, batch {batch}, {steps} steps, seed {training.seed}; "
        f"{table[0]['num_prompts']} prompts of {Path(training.safety_prompts).name}, judge {training.safety_judge}"
    )


def main(argv: Sequence[str]) -> int:
    """Run `hf-safe-ema train`.

    Args:
        argv (list of `str`):
            What comes after `train`.

    Returns:
        `int`: 0; 2 for input that cannot be used; 1 where `on_violation: raise` ended the run.
    """
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        with _input_errors():
            recipe = read_recipe(argv)
        if recipe.run.dry_run:
            with _on_every_process():
                text = _describe(recipe) if speaks else ""
            print(text, end="\n" if speaks else "", flush=True)
            on_every_rank(lambda: None)
            return 0
        result = train(recipe)
    except (InputError, UnsafeModelError) as error:
        if speaks:
            print(f"hf-safe-ema: error: {one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    finally:
        _end_process_group()
    if speaks:
        print("\n" + (format_table(result["table"]) if result["table"] else "no weights were checked") + "\n")
        for what, where in result["files"].items():
            print(f"{what}: {where}")
        print(f"{result['steps']} steps, {result['seconds']:.0f} s")
    return 0


def _describe(recipe: Recipe) -> str:
    try:
        check_output_dir(recipe)
        note = ""
    except ValueError as error:
        note = f"\n# BUT THE RUN WOULD NOT START: {error}"
    load_config(recipe)
    return describe(recipe, *load_rows(recipe)) + note
