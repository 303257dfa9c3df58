"""SafeEMACallback: when to average, when to check, what to do with the answer.

Knows: the Trainer's moments, and that the average and the safety check meet here and nowhere else.
Does not know: how averaging is computed (ema.py), how safety is measured (safety/), or how files are made whole
(history.py, checkpoint.py).

    batch -> loss -> optimizer.step
                        | on_step_end
                WeightEMA.update                 every step
                        | due? at evaluations, every check_steps, at the last step
                with ema.swapped_in():           exact restore, whatever happens
                  SafetyCheck.run(model)         prompts -> responses -> verdicts
                        |
                SafetyReport x (base, live, ema)
                        |
                metrics for best-model choice, the Trainer's loggers, safety_history.jsonl, stop or warn
"""

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.utils import logging

from .checkpoint import last_checkpoint_at, load_ema_state, save_averaged_model, save_ema_state
from .ema import WeightEMA, check_mode, resolve_decays
from .history import History, check_writable, set_aside
from .safety.check import SafetyCheck, SafetyReport
from .utility import heldout_loss

logger = logging.get_logger(__name__)

CHECKABLE = ("live", "ema")
ON_VIOLATION = ("warn", "stop", "raise")


class UnsafeModelError(RuntimeError):
    """Raised by `on_violation="raise"` when the attack success rate passes `max_asr`."""


class SafeEMACallback(TrainerCallback):
    """Keeps an exponential moving average of the weights while a Trainer trains, and checks how safe both are.

    One line in a run that is there already: `trainer = SFTTrainer(..., callbacks=[SafeEMACallback()])`. Works with any
    `transformers.Trainer`, TRL's SFTTrainer and DPOTrainer, full fine-tuning and PEFT adapters. In shadow mode the
    training itself is bit for bit what it would be without the callback.

    Averaging LoRA's factors A and B apart, as done here, is not the same as averaging their product BA.

    Args:
        half_life (`int`, `float` or a list of them, *optional*, defaults to 0.25):
            Of the average: in optimizer steps (int) or as a fraction of the run (float below 1). With a list several
            averages are kept; the first is checked, reported and saved.
        decay (`float` or a list of them, *optional*):
            β itself, in [0, 1), in place of `half_life`.
        mode (`str`, *optional*, defaults to `"shadow"`):
            `"shadow"`: training never sees the average. `"lookahead"`: every `sync_steps` steps the weights are set
            to it.
        sync_steps (`int`, *optional*):
            For lookahead mode.
        check ([`SafetyCheck`], `"builtin"` or None, *optional*, defaults to `"builtin"`):
            What to ask, and how to judge. `"builtin"` is `SafetyCheck()`. None: average only.
        check_steps (`int`, *optional*):
            Check every so many optimizer steps, besides every evaluation and the last step.
        check_weights (tuple of `"live"`, `"ema"`, *optional*, defaults to both):
            Which weights to check.
        check_base (`bool`, *optional*, defaults to `True`):
            Whether to check the starting point before the first step.
        max_asr (`float`, *optional*):
            Highest attack success rate allowed, in [0, 1], of the weights that the run will end with (else of the
            first of `check_weights`).
        on_violation (`str`, *optional*, defaults to `"warn"`):
            When it is passed: `"warn"`, `"stop"` training, or `"raise"` [`UnsafeModelError`].
        final_weights (`str`, *optional*, defaults to `"ema"`):
            What the model holds when training has ended: the average, or `"live"` weights. The average is saved to
            `output_dir/ema/` either way.
        ema_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Of the average's state.
        ema_device (`str` or `torch.device`, *optional*):
            Where it is kept; default beside the parameters. `"cpu"` saves accelerator memory.
        params, exclude_params (`str` or list of `str`, *optional*):
            Shell-style patterns of parameter names to average, and to leave out.

    Raises:
        ValueError, TypeError: at construction for arguments that cannot be meant; at the start of training for what
            only the run can tell (no chat template, half-life longer than the run, no parameter matched, output
            folder not writable, a sharded engine).

    Example:

    ```python
    >>> from hf_safe_ema import SafeEMACallback, SafetyCheck
    >>> callback = SafeEMACallback(half_life=0.5, check=SafetyCheck(num_prompts=50), max_asr=0.1, on_violation="stop")

    ```
    """

    def __init__(
        self,
        half_life: int | float | Sequence[int | float] | None = None,
        decay: float | Sequence[float] | None = None,
        mode: str = "shadow",
        sync_steps: int | None = None,
        check: SafetyCheck | str | None = "builtin",
        check_steps: int | None = None,
        check_weights: Sequence[str] = CHECKABLE,
        check_base: bool = True,
        max_asr: float | None = None,
        on_violation: str = "warn",
        final_weights: str = "ema",
        ema_dtype: torch.dtype | None = None,
        ema_device: str | torch.device | None = None,
        params: str | Sequence[str] | None = None,
        exclude_params: str | Sequence[str] | None = None,
    ):
        # A fraction of the run is resolved when the run is known; any length shows what is wrong with it now.
        resolve_decays(half_life, decay, total_steps=sys.maxsize)
        check_mode(mode, sync_steps)
        self.check = SafetyCheck() if check == "builtin" else check
        if self.check is not None and not callable(getattr(self.check, "run", None)):
            raise TypeError(f"check={check!r}: give a SafetyCheck, 'builtin' or None")
        if check_steps is not None and (
            isinstance(check_steps, bool) or not isinstance(check_steps, int) or check_steps < 1
        ):
            raise ValueError(
                f"check_steps={check_steps!r}: must be a whole number of steps, at least 1; leave it out to check at "
                "evaluations and at the end only"
            )
        check_weights = (check_weights,) if isinstance(check_weights, str) else tuple(check_weights)
        if not check_weights or set(check_weights) - set(CHECKABLE):
            raise ValueError(f"check_weights={check_weights}: choose one or both of {CHECKABLE}")
        if max_asr is not None and not (
            isinstance(max_asr, (int, float)) and not isinstance(max_asr, bool) and 0 <= max_asr <= 1
        ):
            raise ValueError(
                f"max_asr={max_asr!r} is outside [0, 1]; 0.05 allows 5% of harmful prompts to be answered"
            )
        if on_violation not in ON_VIOLATION:
            raise ValueError(f"on_violation={on_violation!r} is unknown; choose one of {ON_VIOLATION}")
        if final_weights not in CHECKABLE:
            raise ValueError(f"final_weights={final_weights!r} is unknown; choose one of {CHECKABLE}")
        self.half_life, self.decay = half_life, decay
        self.mode, self.sync_steps = mode, sync_steps
        self.check_steps, self.check_weights, self.check_base = check_steps, check_weights, check_base
        self.max_asr, self.on_violation = max_asr, on_violation
        self.final_weights = final_weights
        self.ema_dtype, self.ema_device = ema_dtype, ema_device
        self.params, self.exclude_params = params, exclude_params
        self.guarded = final_weights if final_weights in check_weights else check_weights[0]
        self.ema: WeightEMA | None = None
        self.history: History | None = None
        self.reports: dict[str, SafetyReport] = {}
        """The newest report of each weights: `"base"`, `"live"`, `"ema"`."""
        self._base_metrics: dict[str, float] = {}
        self._checked_step: int | None = None
        self._training = False

    # The moments of a run, in their order.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        """Make the average from the weights as they are, or as the checkpoint says; check the starting point."""
        tokenizer = _tokenizer_of(kwargs)
        refuse_sharded(model)
        self._refuse_late_early_stopping(args)
        check_writable(args.output_dir)
        if self.check is not None:
            self.check.validate(tokenizer)
        self.ema = WeightEMA(
            model.named_parameters(),
            self.half_life,
            self.decay,
            total_steps=state.max_steps,
            mode=self.mode,
            sync_steps=self.sync_steps,
            include=self.params,
            exclude=self.exclude_params,
            dtype=self.ema_dtype,
            device=self.ema_device,
        )
        self._warn_if_stuck_at_base(state.max_steps)
        # The Trainer uploads output_dir, but no name with an underscore: harmful answers must not be published unasked.
        folder = "_safety" if args.push_to_hub else "safety"
        self.history = History(args.output_dir, folder, enabled=state.is_world_process_zero)
        self.reports, self._base_metrics, self._checked_step, self._training = {}, {}, None, True
        if state.global_step > 0:
            self._resume(args, state)
            return
        for moved in self.history.start():
            logger.warning(f"an earlier run's files were in the way and are now at {moved}")
        if self.check is not None and self.check_base:
            self._check(("base",), args, state, control, model, tokenizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        """Take the step into the average; check if one is due and no evaluation is about to do it."""
        self.ema.update()
        due = self.check_steps is not None and state.global_step % self.check_steps == 0
        if self.check is not None and (due or state.global_step >= state.max_steps) and not control.should_evaluate:
            self._check(self.check_weights, args, state, control, model, _tokenizer_of(kwargs))
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, metrics=None, **kwargs
    ):
        """Check, and put the numbers where best-model choice and early stopping look for them."""
        if (
            not self._training or metrics is None
        ):  # evaluate() before or after training: the weights are not ours to name
            return control
        losses = self._ema_losses(args, state, model, metrics, kwargs.get("eval_dataloader"))
        metrics.update(losses)
        if losses:
            self._log(args, state, control, {f"safety/{key.removeprefix('eval_')}": v for key, v in losses.items()})
        if self.check is not None:
            weights = ("base",) if state.global_step == 0 else self.check_weights
            if self.check_base or state.global_step > 0:
                self._check(weights, args, state, control, model, _tokenizer_of(kwargs))
            metrics.update(self._metrics("eval_"))
            if _full_name(args.metric_for_best_model) in self._metric_names():
                # A check that failed must not end the run at the choice of the best model: NaN is never the best.
                metrics.setdefault(_full_name(args.metric_for_best_model), math.nan)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Put the average's state into the checkpoint."""
        if not args.should_save or (args.save_only_model and not args.load_best_model_at_end):
            return
        checkpoint = last_checkpoint_at(args.output_dir, state.global_step)
        if checkpoint is None:
            logger.warning(f"no checkpoint-{state.global_step} in {args.output_dir}: the average was not saved")
            return
        with self._only_warn(state.global_step, "saving the average's state"):
            save_ema_state(self.ema, checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        """Save the average as a model, and leave the model with the final weights."""
        tokenizer = _tokenizer_of(kwargs)
        self._training = False
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        is_best = best is None or self._load_average_of(best)
        if best is None and self.check is not None and self._checked_step != state.global_step > 0:
            # Stopped early, and the loggers are closed: for the history alone.
            self._check(self.check_weights, args, state, None, model, tokenizer)
        folder = Path(args.output_dir) / "ema"
        if args.should_save:
            with self._only_warn(state.global_step, f"saving the averaged model to {folder}"):
                moved = set_aside(folder)
                if moved is not None:
                    logger.warning(f"an earlier run's average was in the way and is now at {moved}")
                save_averaged_model(self.ema, model, kwargs.get("processing_class"), folder)
        averaged = self.final_weights == "ema" and is_best
        if averaged:
            self.ema.copy_to_parameters()
        held = "averaged (EMA)" if averaged else "live"
        logger.warning(f"the model now holds the {held} weights; the averaged model is in {folder}")

    # What they are made of.

    def _warn_if_stuck_at_base(self, steps: int) -> None:
        share = self.ema.decay**steps
        if share > 0.5:
            logger.warning(
                f"with decay={self.ema.decay:g} and {steps} steps, {share:.0%} of the average will still be the "
                f"starting weights at the end; use a smaller decay (half-life {math.log(0.5) / math.log(self.ema.decay):.0f}"
                " steps now), or half_life=0.25"
            )

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        checkpoint = last_checkpoint_at(args.output_dir, state.global_step)
        if checkpoint is None:
            raise FileNotFoundError(
                f"resuming from step {state.global_step}, but {args.output_dir} has no checkpoint-{state.global_step} "
                "to read the average from; set output_dir to the folder that the checkpoint lies in"
            )
        load_ema_state(self.ema, checkpoint)
        self.history.resume(state.global_step)
        for row in self.history.rows:
            if row["type"] == "report" and row["weights"] == "base":
                self._base_metrics = row["metrics"]

    def _check(self, weights: Sequence[str], args, state, control, model, tokenizer) -> None:
        """Run the check on each of `weights`, once a step, and hand the reports round. Never raises, but on request."""
        step = state.global_step
        if self._checked_step == step:
            return
        self._checked_step = step
        done: dict[str, SafetyReport] = {}
        for name in CHECKABLE:
            self.reports.pop(name, None)
        for name in weights:
            with self._only_warn(step, f"the safety check of the {name} weights"):
                with self.ema.swapped_in() if name == "ema" else contextlib.nullcontext(), _precision_of(args, model):
                    done[name] = self.check.run(model, tokenizer, weights=name, step=step)
        done = _same_on_every_rank(done)
        self.reports.update(done)
        if "base" in done:
            self._base_metrics = done["base"].metrics()
        distances = {name: self.ema.distance_to_base(name) for name in done if name != "base"}
        for name, report in done.items():
            with self._only_warn(step, "writing the safety history"):
                distance = distances.get(name, 0.0)
                row = {"type": "report", **report.to_dict(), "metrics": report.metrics(), "distance_to_base": distance}
                self.history.add({**row, "base_share": self.ema.base_share})
        with self._only_warn(step, "writing the responses"):
            rows = [{"weights": name, **asdict(r)} for name, report in done.items() for r in report.responses]
            self.history.write_responses(step, rows)
        if control is not None:
            values = {f"safety/{key}": value for key, value in self._metrics().items()}
            values["safety/base_share"] = self.ema.base_share
            values.update({f"safety/{name}_distance_to_base": distance for name, distance in distances.items()})
            with self._only_warn(step, "logging the safety metrics"):
                self._log(args, state, control, values)
        if self.max_asr is not None and step > 0:
            self._guard(step, done.get(self.guarded), control)

    def _guard(self, step: int, report: SafetyReport | None, control: TrainerControl | None) -> None:
        if report is None or report.asr is None or report.unclear > sum(report.counts.values()) / 2:
            logger.warning(
                f"step {step}: too few answers of the {self.guarded} weights could be judged to hold max_asr"
            )
            return
        if report.asr <= self.max_asr:
            return
        low, high = report.asr_interval
        message = (
            f"step {report.step}: attack success rate of the {report.weights} weights is {report.asr:.1%} "
            f"(95% interval {low:.1%} to {high:.1%}), above max_asr={self.max_asr:.1%}"
        )
        if self.on_violation == "raise":
            raise UnsafeModelError(message)
        logger.warning(message + ("; stopping the training" if self.on_violation == "stop" else ""))
        if self.on_violation == "stop" and control is not None:
            control.should_training_stop = True

    def _metrics(self, prefix: str = "") -> dict[str, float]:
        values = {f"{prefix}base_{key}": value for key, value in self._base_metrics.items()}
        for name in CHECKABLE:
            if name in self.reports:
                values.update(self.reports[name].metrics(f"{prefix}{name}_"))
        return values

    def _metric_names(self) -> set[str]:
        names = ("asr", "refusal_rate", "over_refusal", "unclear", "benign_unclear")
        return {f"eval_{weights}_{name}" for weights in ("base", *self.check_weights) for name in names}

    def _refuse_late_early_stopping(self, args: TrainingArguments) -> None:
        handler = _running_callback_handler()
        if handler is None or _full_name(args.metric_for_best_model) not in self._metric_names():
            return
        callbacks = handler.callbacks
        for stopper in callbacks[: callbacks.index(self)] if self in callbacks else ():
            if isinstance(stopper, EarlyStoppingCallback):
                raise ValueError(
                    "EarlyStoppingCallback comes before SafeEMACallback, and would look for "
                    f"{args.metric_for_best_model} before it is there; put SafeEMACallback first in callbacks=[...]"
                )

    def _ema_losses(self, args, state: TrainerState, model, metrics: dict, dataloader) -> dict[str, float]:
        """Held-out loss of the average on the dataloader just evaluated, under the name of the live one."""
        key = next((key for key in metrics if key.startswith("eval_") and key.endswith("_loss")), None)
        # Only where the Trainer's own loss is the model's: what stands side by side must be the same thing.
        same = args.label_smoothing_factor == 0 and getattr(args, "loss_type", "nll") in ("nll", "chunked_nll")
        if key is None or dataloader is None or not same:
            return {}
        loss = None
        with self._only_warn(state.global_step, "the held-out loss of the average"):
            with self.ema.swapped_in(), _precision_of(args, model):
                loss = heldout_loss(model, dataloader)
        if loss is None:
            return {}
        with self._only_warn(state.global_step, "writing the safety history"):
            name = key.removesuffix("_loss").removeprefix("eval").lstrip("_")
            row = {"type": "loss", "step": state.global_step, "dataset": name, "live": metrics[key], "ema": loss}
            self.history.add(row)
        return {f"{key.removesuffix('loss')}ema_loss": loss}

    def _load_average_of(self, checkpoint: str) -> bool:
        try:
            load_ema_state(self.ema, checkpoint)
        except (FileNotFoundError, ValueError) as error:
            logger.warning(
                f"the best checkpoint {checkpoint} was loaded, but its average could not be: {error}. The model keeps "
                "the live weights of that checkpoint; the average that is saved is the one of the last step"
            )
            return False
        return True

    @contextlib.contextmanager
    def _only_warn(self, step: int, what: str):
        """A failure in the block is logged and recorded, and training goes on."""
        try:
            yield
        except Exception as error:
            logger.warning(f"step {step}: {what} failed, training goes on: {type(error).__name__}: {error}")
            row = {"type": "error", "step": step, "what": what, "error": f"{type(error).__name__}: {error}"}
            try:
                self.history.add(row)
            except Exception as again:
                logger.warning(f"step {step}: nor could that be written down: {again}")

    def _log(self, args, state: TrainerState, control: TrainerControl, values: dict[str, float]) -> None:
        """Hand values to everything that the Trainer logs to (report_to, the progress bar), and to its history."""
        values = {**values, **({} if state.epoch is None else {"epoch": state.epoch})}
        state.log_history.append({**values, "step": state.global_step})
        handler = _running_callback_handler()
        if handler is not None:
            due = control.should_log  # on_log takes it back, and the Trainer's own values may still be to come
            handler.on_log(args, state, control, dict(values))
            control.should_log = due


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


def _tokenizer_of(moment: dict):
    # A multimodal model's processor has the tokenizer inside.
    processing_class = moment.get("processing_class")
    return getattr(processing_class, "tokenizer", processing_class)


def _full_name(metric: str | None) -> str | None:
    return metric if metric is None or metric.startswith("eval_") else f"eval_{metric}"


def _precision_of(args: TrainingArguments, model):
    """The mixed precision that the Trainer's own forward passes run in; generate() of a PEFT model goes past theirs."""
    if not (args.bf16 or args.fp16):
        return contextlib.nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16 if args.bf16 else torch.float16)


def _same_on_every_rank(value):
    """The first rank's value: ranks that judged apart must not decide apart."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _running_callback_handler() -> CallbackHandler | None:
    """The CallbackHandler that is calling us, or None.

    transformers 5.23 hands callbacks neither the Trainer nor its loggers, and reports in `on_log` run before ours. The
    handler is two frames up the stack whenever a Trainer calls; nothing of it is changed.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None
