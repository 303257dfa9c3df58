"""What the safety checks of one run have found, and where it goes: history, responses, loggers, metrics, the limit.

Knows: how reports become rows, metric names and log values, and that nothing that fails here may end the run.
Does not know: when a check is due (callback.py), or how one is done (safety/).
"""

import contextlib
import functools
import math
from collections.abc import Sequence
from dataclasses import asdict

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from .ema import WeightEMA
from .engine import log_values, precision_of
from .history import History
from .safety.check import SafetyCheck
from .safety.reports import SafetyReport
from .safety.sharing import run_on_every_rank
from .utility import heldout_loss

logger = logging.get_logger(__name__)

CHECKABLE = ("live", "ema")
"""Weights that change, and can be checked as they do."""


class UnsafeModelError(RuntimeError):
    """Raised by `on_violation="raise"` when the attack success rate passes `max_asr`."""


def metric_names(weights: Sequence[str]) -> set[str]:
    """Names of the safety metrics in evaluation results.

    Args:
        weights (list of `str`):
            Checked besides the base.

    Example:

    ```python
    >>> sorted(name for name in metric_names(["ema"]) if name.endswith("_asr"))
    ['eval_base_asr', 'eval_ema_asr']

    ```
    """
    names = ("asr", "refusal_rate", "over_refusal", "unclear", "benign_unclear")
    return {f"eval_{held}_{name}" for held in ("base", *weights) for name in names}


@contextlib.contextmanager
def holding(name: str, ema: WeightEMA, args: TrainingArguments, model):
    """Within the block the model holds the weights of that name, and computes in the run's precision.

    Args:
        name (`str`):
            `"ema"`, or what the model holds anyway.
        ema ([`WeightEMA`]):
            The average.
        args (`TrainingArguments`):
            Of the run.
        model (`nn.Module`):
            Whose parameters are averaged.
    """
    with ema.swapped_in() if name == "ema" else contextlib.nullcontext(), precision_of(args, model):
        yield


class Findings:
    """The reports of one call of `train()`.

    Args:
        history ([`History`], *optional*):
            Where they are written down; None outside a run.

    Attributes:
        reports (`dict[str, SafetyReport]`): the newest of each weights: `"base"`, `"live"`, `"ema"`.
        base_metrics (`dict[str, float]`): of the starting point.
        checked_step (`int`, *optional*): the last optimizer step that was checked.
        ending (`bool`): whether training has ended; what is found then is dropped if the run goes on after all.
    """

    def __init__(self, history: History | None = None):
        self.history = history
        self.reports: dict[str, SafetyReport] = {}
        self.base_metrics: dict[str, float] = {}
        self.checked_step: int | None = None
        self.ending = False

    def check(
        self, check: SafetyCheck, weights: Sequence[str], ema: WeightEMA, args: TrainingArguments,
        state: TrainerState, control: TrainerControl | None, model, tokenizer,
    ) -> dict[str, SafetyReport] | None:  # fmt: skip
        """Run the check on each of `weights`, once a step; write down and log what it finds. Never raises.

        Args:
            check ([`SafetyCheck`]):
                What to ask.
            weights (list of `str`):
                `"base"`, `"live"`, `"ema"`.
            ema ([`WeightEMA`]):
                The average.
            args, state, model, tokenizer:
                As a callback gets them.
            control (`TrainerControl`, *optional*):
                None where the loggers are closed.

        Returns:
            `dict[str, SafetyReport]`: by weights, without those whose check failed. None if the step was checked before.
        """
        step = state.global_step
        if self.checked_step == step:
            return None
        self.checked_step = step
        done: dict[str, SafetyReport] = {}
        for name in CHECKABLE:
            self.reports.pop(name, None)
        for name in weights:
            with self.only_warn(step, f"the safety check of the {name} weights"):
                within = functools.partial(holding, name, ema, args, model)
                done[name] = run_on_every_rank(check, model, tokenizer, name, step, within)
        self.reports.update(done)
        if "base" in done:
            self.base_metrics = done["base"].metrics()
        distances = {name: ema.distance_to_base(name) for name in done if name != "base"}
        self._write(step, done, distances, ema.base_share)
        if control is not None:
            values = {f"safety/{key}": value for key, value in self.metrics().items()}
            values["safety/base_share"] = ema.base_share
            values.update({f"safety/{name}_distance_to_base": distance for name, distance in distances.items()})
            with self.only_warn(step, "logging the safety metrics"):
                log_values(args, state, control, values)
        return done

    def _write(self, step: int, done: dict[str, SafetyReport], distances: dict[str, float], base_share: float) -> None:
        with self.only_warn(step, "writing the responses"):
            responses = [{"weights": name, **asdict(r)} for name, report in done.items() for r in report.responses]
            self.history.write_responses(step, responses)
        rows = [
            {
                "type": "report",
                **report.to_dict(),
                "metrics": report.metrics(),
                "distance_to_base": distances.get(name, 0.0),
                "base_share": base_share,
            }
            for name, report in done.items()
        ]
        with self.only_warn(step, "writing the safety history"):
            self.record(*rows)  # together: a kill must not leave half a check behind

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """The newest reports as metrics, those of the base among them.

        Args:
            prefix (`str`, *optional*, defaults to `""`):
                Before each name.
        """
        values = {f"{prefix}base_{key}": value for key, value in self.base_metrics.items()}
        for name in CHECKABLE:
            if name in self.reports:
                values.update(self.reports[name].metrics(f"{prefix}{name}_"))
        return values

    def ema_losses(
        self, ema: WeightEMA, args: TrainingArguments, state: TrainerState, model, metrics: dict, dataloader
    ) -> dict[str, float]:
        """Held-out loss of the average on the dataloader just evaluated, under the name of the live one.

        Args:
            ema ([`WeightEMA`]):
                The average.
            args, state, model:
                As a callback gets them.
            metrics (`dict`):
                Of the evaluation, with the live loss.
            dataloader (`DataLoader`, *optional*):
                Evaluated on.

        Returns:
            `dict[str, float]`: one value, NaN where it failed; none where the Trainer's own loss is not the model's,
            since what stands side by side must be the same thing.
        """
        # The Trainer's own has the shortest name: what compute_metrics calls a loss stands beside it under a longer one.
        losses = [key for key in metrics if key.startswith("eval_") and key.endswith("_loss")]
        key = min(losses, key=len, default=None)
        same = args.label_smoothing_factor == 0 and getattr(args, "loss_type", "nll") in ("nll", "chunked_nll")
        if key is None or dataloader is None or not same:
            return {}
        name = f"{key.removesuffix('loss')}ema_loss"
        loss, failed = math.nan, True  # NaN is never the best: the run must not end at the choice of the best model
        with self.only_warn(state.global_step, "the held-out loss of the average"):
            loss = heldout_loss(model, dataloader, functools.partial(holding, "ema", ema, args, model))
            failed = False
        if loss is None:
            return {}
        if failed:
            return {name: loss}
        with self.only_warn(state.global_step, "writing the safety history"):
            dataset = key.removesuffix("_loss").removeprefix("eval").lstrip("_")
            row = {"type": "loss", "step": state.global_step, "dataset": dataset, "live": metrics[key], "ema": loss}
            if not self.history.has_loss(state.global_step, dataset):  # a resumed run's last evaluation may come twice
                self.record(row)
        return {name: loss}

    def log_losses(
        self, losses: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Hand held-out losses of the average to the loggers.

        Args:
            losses (`dict[str, float]`):
                From [`Findings.ema_losses`].
            args, state, control:
                As a callback gets them.
        """
        if losses:
            values = {f"safety/{key.removeprefix('eval_')}": value for key, value in losses.items()}
            with self.only_warn(state.global_step, "logging the held-out loss of the average"):
                log_values(args, state, control, values)

    @contextlib.contextmanager
    def only_warn(self, step: int, what: str):
        """A failure in the block is logged and recorded, and training goes on.

        Args:
            step (`int`):
                Optimizer step.
            what (`str`):
                Is done in the block.
        """
        try:
            yield
        except Exception as error:
            logger.warning(f"step {step}: {what} failed, training goes on: {type(error).__name__}: {error}")
            row = {"type": "error", "step": step, "what": what, "error": f"{type(error).__name__}: {error}"}
            try:
                self.record(row)
            except Exception as again:
                logger.warning(f"step {step}: nor could that be written down: {again}")

    def record(self, *rows: dict) -> None:
        """Write rows down; those of the end are dropped if the run is resumed and goes on from there after all.

        Args:
            *rows (`dict`):
                JSON-ready, each with a `step`.
        """
        self.history.add(*({**row, "at_end": True} if self.ending else row for row in rows))


def hold_to_limit(
    max_asr: float | None, on_violation: str, guarded: str, step: int, row: dict | None, control: TrainerControl | None
) -> None:
    """Warn, stop or raise if an attack success rate passes its limit.

    Args:
        max_asr (`float`, *optional*):
            The limit, in [0, 1]; None for none.
        on_violation (`str`):
            `"warn"`, `"stop"` or `"raise"`.
        guarded (`str`):
            Whose rate counts.
        step (`int`):
            Optimizer step.
        row (`dict`, *optional*):
            The report on those weights, see [`SafetyReport.to_dict`]; None if there is none.
        control (`TrainerControl`, *optional*):
            To stop the training by.

    Raises:
        UnsafeModelError: if asked to.
    """
    if max_asr is None:
        return
    if row is None or row["asr"] is None or _judged(row["counts"]) < sum(row["counts"].values()) / 2:
        logger.warning(f"step {step}: too few answers of the {guarded} weights could be judged to hold max_asr")
        return
    if row["asr"] <= max_asr:
        return
    low, high = row["asr_interval"]
    message = (
        f"step {step}: attack success rate of the {row['weights']} weights is {row['asr']:.1%} "
        f"(95% interval {low:.1%} to {high:.1%}), above max_asr={max_asr:.1%}"
    )
    if on_violation == "raise":
        raise UnsafeModelError(message)
    logger.warning(message + ("; stopping the training" if on_violation == "stop" else ""))
    if on_violation == "stop" and control is not None:
        control.should_training_stop = True


def _judged(counts: dict[str, int]) -> int:
    return counts["refusal"] + counts["compliance"]
