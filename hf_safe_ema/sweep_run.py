"""One run of a sweep, in a process of its own: fine-tune once, then measure the live weights and every average.

    python -m hf_safe_ema.sweep_run RESULT.json FLAGS OF hf-safe-ema train

Since averages are shadows of the run, they differ in nothing but their half-life.

Knows: how a trained run is measured. Does not know: which runs there are, or what becomes of the numbers.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from trl import SFTTrainer

from .engine import forget_evaluation, precision_of, tokenizer_of
from .history import write_whole
from .recipe import Recipe, read_recipe
from .safety.check import SafetyCheck
from .safety.sharing import run_on_every_rank
from .sweep_config import BASE, ENDS_WITH_SWEEP, LIVE
from .train import build_trainer, load_rows
from .trainer import SafeSFTTrainer

_UNINTERESTING = ("runtime", "samples_per_second", "steps_per_second")


def measure_base(recipe: Recipe) -> dict:
    """Measure the model as it is. Trains nothing.

    Args:
        recipe ([`Recipe`]):
            Of any run of the sweep.

    Returns:
        `dict`: `points`: of the name `"base"`, see [`measure`]; `seconds`.
    """
    started = time.monotonic()
    trainer, check = _prepare(recipe)
    points = {BASE: measure(trainer, check, BASE, contextlib.nullcontext)}
    return {"points": points, "seconds": round(time.monotonic() - started, 1)}


def measure_run(recipe: Recipe) -> dict:
    """Fine-tune as a recipe says, with the safety check only at the end, of the live weights and all averages.

    Args:
        recipe ([`Recipe`]):
            With its list of half-lives.

    Returns:
        `dict`: `points`: by name of the weights, see [`measure`]; `steps`, `train_seconds`, `seconds`.

    Raises:
        ValueError, OSError: if the run cannot be made.
    """
    started = time.monotonic()
    trainer, check = _prepare(recipe)
    begun = time.monotonic()
    trainer.train()
    trained = time.monotonic() - begun
    ema, half_lives = trainer.safe_ema.ema, recipe.training.ema_half_life
    points = {
        LIVE: {**measure(trainer, check, LIVE, contextlib.nullcontext), "distance_to_base": ema.distance_to_base(LIVE)}
    }
    for index, half_life in enumerate(half_lives if isinstance(half_lives, list) else [half_lives]):
        found = measure(trainer, check, str(half_life), functools.partial(ema.swapped_in, index))
        points[str(half_life)] = {**found, "distance_to_base": ema.distance_to_base(index=index)}
    return {
        "points": points,
        "steps": trainer.state.global_step,
        "train_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def _prepare(recipe: Recipe) -> tuple[SafeSFTTrainer, SafetyCheck | None]:
    """The trainer, and the check that it would have run on the way."""
    recipe.training.final_weights = LIVE
    trainer = build_trainer(recipe, *load_rows(recipe))
    check, trainer.safe_ema.check = trainer.safe_ema.check, None
    return trainer, check


def measure(trainer: SafeSFTTrainer, check: SafetyCheck | None, name: str, held: Callable) -> dict:
    """Safety and usefulness of one set of weights.

    Args:
        trainer ([`SafeSFTTrainer`]):
            Whose model and held-out rows.
        check ([`SafetyCheck`] or None):
            What to ask.
        name (`str`):
            Of the weights.
        held (`Callable[[], ContextManager]`):
            Makes a context in which the model holds them.

    Returns:
        `dict`: the report's `asr`, `asr_interval`, `counts`, `over_refusal`, `over_refusal_interval`, `benign_counts` and what
        it says of its making; `metrics` of the Trainer's evaluation without `eval_`.
    """

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        with held(), precision_of(trainer.args, trainer.model):
            yield

    found = {}
    if check is not None:
        tokenizer = tokenizer_of({"processing_class": trainer.processing_class})
        report = run_on_every_rank(check, trainer.model, tokenizer, name, trainer.state.global_step, within)
        found = report.to_dict()
    if trainer.eval_dataset is not None:
        with held():
            metrics = SFTTrainer.evaluate(trainer)
        forget_evaluation(trainer.model)
        metrics = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
        found["metrics"] = {key: value for key, value in metrics.items() if not key.endswith(_UNINTERESTING)}
    return found


def main(argv: Sequence[str]) -> int:
    """Make the run and write what it found, whole or not at all.

    Args:
        argv (list of `str`):
            The result's file; `--base` to train nothing, `--ends_with_sweep` to end when standard input does; and flags.
    """
    path, *flags = argv
    if ENDS_WITH_SWEEP in flags:
        threading.Thread(target=_end_with_sweep, daemon=True).start()
    recipe = read_recipe([flag for flag in flags if flag not in ("--base", ENDS_WITH_SWEEP)])
    result = measure_base(recipe) if "--base" in flags else measure_run(recipe)
    if recipe.training.process_index == 0:
        write_whole(path, json.dumps(result, indent=1) + "\n")
    return 0


def _end_with_sweep() -> None:
    """A killed sweep must not leave a run behind, which would write into the folder that the next sweep makes it in again."""
    os.read(0, 1)  # returns when the sweep, which holds the other end, is gone
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
