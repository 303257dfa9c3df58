"""SafeEMACallback: when to average, when to check, what to do with the answer.

Knows: the Trainer's moments, and that the average and the safety check meet here and nowhere else.
Does not know: how averaging is computed (ema.py), how safety is measured (safety/), where a report goes (findings.py),
what a run finds in its folders and leaves there (run_folder.py, resume.py, history.py, checkpoint.py), or which settings
can be meant (settings.py).

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

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from . import run_folder, settings
from .checkpoint import last_checkpoint_at, read_notes, save_ema_state, unmark_checkpoint
from .decay import check_mode, resolve_decays, stuck_at_base
from .ema import WeightEMA
from .engine import (
    SaveMoment,
    forget_loss,
    full_name,
    is_evaluated,
    refuse_late_early_stopping,
    refuse_sharded,
    refuse_unsynchronized,
    tokenizer_of,
)
from .findings import CHECKABLE, Findings, hold_to_limit, metric_names
from .history import History, check_writable, hide_responses
from .resume import Run, UndoneStep, usable_notes
from .safety.check import SafetyCheck
from .safety.reports import SafetyReport
from .settings import ON_MISSING_STATE, ON_VIOLATION

logger = logging.get_logger(__name__)


class SafeEMACallback(TrainerCallback):
    """Keeps an exponential moving average of the weights while a Trainer trains, and checks how safe both are.

    One line in a run that is there already: `trainer = SFTTrainer(..., callbacks=[SafeEMACallback()])`. Works with any
    `transformers.Trainer`, TRL's SFTTrainer and DPOTrainer, full fine-tuning and PEFT adapters. In shadow mode the
    training itself is bit for bit what it would be without the callback.

    LoRA's factors A and B are averaged apart, which is not the same as averaging their product BA: on the testbed the two
    differ by 7% to 30% in the weights, by at most 0.01 in held-out loss, and not measurably in safety (docs/peft.md).

    A run that was killed and is resumed from its last whole checkpoint ends as it would have without the kill: live
    weights, average and safety history, to the bit, as far as the Trainer's own part of a checkpoint allows. But
    `resume_from_checkpoint=True` takes the newest checkpoint even if the kill left it half-written; give what
    [`~hf_safe_ema.checkpoint.last_complete_checkpoint`] finds instead. And with `save_strategy="steps"` and
    `eval_strategy="epoch"`, where a step is both, the Trainer does not repeat an evaluation that was cut off after the
    checkpoint: our check is made up for then, held-out losses and random state are not. A run resumed with more steps
    keeps the decay that it began with.

    Args:
        half_life (`int`, `float` or a list of them, *optional*, defaults to 0.5):
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
        on_missing_state (`str`, *optional*, defaults to `"raise"`):
            When a run is resumed from a checkpoint that holds no usable state of the average: `"raise"`, or
            `"restart"` it from the checkpoint's weights, which then count as the starting point.

    Attributes:
        resume_from (`str`, *optional*):
            Folder of the checkpoint that the next `train()` resumes from. Found without; set it if an error asks to.

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
        on_missing_state: str = "raise",
    ):
        # A fraction of the run is resolved when the run is known; any length shows what is wrong with it now.
        resolve_decays(half_life, decay, total_steps=sys.maxsize)
        check_mode(mode, sync_steps)
        self.check = settings.resolve_check(check)
        settings.check_interval(check_steps)
        check_weights = settings.resolve_check_weights(check_weights)
        settings.check_limit(max_asr)
        settings.check_choice("on_violation", on_violation, ON_VIOLATION)
        settings.check_choice("final_weights", final_weights, CHECKABLE)
        settings.check_choice("on_missing_state", on_missing_state, ON_MISSING_STATE)
        self.half_life, self.decay = half_life, decay
        self.mode, self.sync_steps = mode, sync_steps
        self.check_steps, self.check_weights, self.check_base = check_steps, check_weights, check_base
        self.max_asr, self.on_violation = max_asr, on_violation
        self.final_weights = final_weights
        self.ema_dtype, self.ema_device = ema_dtype, ema_device
        self.params, self.exclude_params = params, exclude_params
        self.on_missing_state = on_missing_state
        self.resume_from: str | None = None
        self.guarded = final_weights if final_weights in check_weights else check_weights[0]
        self.ema: WeightEMA | None = None
        self.history: History | None = None
        self._findings = Findings()
        self._training = False
        self._run: Run | None = None
        self._save_moment: SaveMoment | None = None

    @property
    def reports(self) -> dict[str, SafetyReport]:
        """The newest report of each weights: `"base"`, `"live"`, `"ema"`."""
        return self._findings.reports

    # The moments of a run, in their order.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        """Make the average from the weights as they are, or as the checkpoint says; check the starting point."""
        tokenizer = tokenizer_of(kwargs)
        refuse_sharded(model)
        refuse_unsynchronized(model)
        refuse_late_early_stopping(self, args, metric_names(self.check_weights))
        check_writable(args.output_dir)
        if self.check is not None:
            self.check.validate(tokenizer)
        first = self.ema if self._training and args.auto_find_batch_size else None
        # The Trainer uploads output_dir, but no name with an underscore: harmful answers must not be published unasked.
        folder = "_safety" if args.push_to_hub else "safety"
        self.history = History(args.output_dir, folder, enabled=state.is_world_process_zero)
        self._findings, self._training = Findings(self.history), True
        keeps_state = not args.save_only_model or args.load_best_model_at_end
        self._run = Run(state.global_step, state.max_steps, args.world_size, args.should_save and keeps_state)
        if state.global_step > 0:
            self._resume(args, state, control, model, tokenizer)
        else:
            self.ema = self._new_average(model, state)
            if first is None:
                self._start(args, state, control, model, tokenizer)
            else:
                run_folder.start_again(self._findings, self.ema, first)
        stuck = stuck_at_base(self.ema.decay, state.max_steps)
        if stuck is not None:
            logger.warning(stuck)
        self._save_moment = SaveMoment.attach(state, self._save_state)
        return control

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        """Where the run is over already, get ready for the step that the Trainer takes all the same."""
        self._run.begun = True
        if self._run.over:
            self._run.undone = UndoneStep(model, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs):
        """Take the step into the average; check if one is due and no evaluation is about to do it."""
        if self._run.undone is not None:
            self._run.undone.undo(state)
            forget_loss()
            control.should_training_stop = True
            control.should_log = control.should_evaluate = control.should_save = False
            return control
        self._take_in(state.global_step)
        if self._is_due(state) and not control.should_evaluate:
            self._check(self.check_weights, args, state, control, model, tokenizer_of(kwargs))
        self._expect_save(args, state, control)
        return control

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Prepare for a checkpoint that comes now."""
        if self._run.over:
            control.should_save = False  # it is the checkpoint that was resumed from
        self._expect_save(args, state, control)
        return control

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, metrics=None, **kwargs
    ):
        """Check, and put the numbers where best-model choice and early stopping look for them."""
        if not self._training or metrics is None:  # before or after training: the weights are not ours to name
            return control
        if self._run.resumed and not self._run.begun:
            return control  # eval_on_start, a second time: a run without a stop has no such rows
        losses = self._ema_losses(args, state, model, metrics, kwargs.get("eval_dataloader"))
        metrics.update(losses)
        self._findings.log_losses(losses, args, state, control)
        if self.check is not None:
            weights = ("base",) if state.global_step == 0 else self.check_weights
            if self.check_base or state.global_step > 0:
                self._check(weights, args, state, control, model, tokenizer_of(kwargs))
            metrics.update(self._findings.metrics("eval_"))
            if full_name(args.metric_for_best_model) in metric_names(self.check_weights):
                # A check that failed must not end the run at the choice of the best model: NaN is never the best.
                metrics.setdefault(full_name(args.metric_for_best_model), math.nan)
        self._expect_save(args, state, control)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Put the average's state into the checkpoint, if that could not be done while it was written."""
        if not self._run.keeps_state or state.global_step in self._run.saved_steps:
            return
        checkpoint = last_checkpoint_at(args.output_dir, state.global_step)
        if checkpoint is None:
            logger.warning(f"no checkpoint-{state.global_step} in {args.output_dir}: the average was not saved")
            return
        self._save_state(checkpoint, state.global_step)

    def on_push_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        """Keep responses out of an upload to the hub, asked for in the arguments or only after training."""
        if state.is_world_process_zero:
            for folder, hidden in hide_responses(args.output_dir).items():
                logger.warning(f"responses are not uploaded: {folder} is now {hidden}")
                if self.history is not None and self.history.responses_folder == folder:
                    self.history.responses_folder = hidden
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ):
        """Save the average as a model, and leave the model with the final weights."""
        tokenizer = tokenizer_of(kwargs)
        self._training, self._findings.ending = False, True
        if self._save_moment is not None:
            self._save_moment.detach()
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        self.ema.rebind(model.named_parameters())  # loading the best model may have replaced them
        is_best = best is None or run_folder.load_average_of_best(self.ema, best)
        if best is None and self.check is not None and self._findings.checked_step != state.global_step > 0:
            # Stopped early, and the loggers are closed: for the history alone.
            self._check(self.check_weights, args, state, None, model, tokenizer)
        folder = Path(args.output_dir) / "ema"
        if args.should_save:
            with self._findings.only_warn(state.global_step, f"saving the averaged model to {folder}"):
                if not self._run.own_folder:  # a resumed run replaces its own
                    run_folder.make_room(folder)
                notes = read_notes(best) if best is not None and is_best else {}
                step = notes.get("step", state.global_step)
                run_folder.save_average(
                    self.ema, model, kwargs.get("processing_class"), folder, self.history.rows, step
                )
        averaged = self.final_weights == "ema" and is_best
        if averaged:
            self.ema.copy_to_parameters()
        held = "averaged (EMA)" if averaged else "live"
        logger.warning(f"the model now holds the {held} weights; the averaged model is in {folder}")

    # What they are made of.

    def write_state(self, folder: str | Path) -> None:
        """Write all that a resumed run needs of this callback into a checkpoint folder.

        The Trainer's own checkpoints get it without asking; this is for those that you write yourself.

        Args:
            folder (path):
                Gets the average's state and the history so far, below `safe_ema/`. Call it on one process.

        Raises:
            RuntimeError: before training has begun.
            OSError: if the disk does not take it; an earlier state in the folder stays whole.
        """
        if self.ema is None:
            raise RuntimeError("write_state() before training has begun: there is no average yet; call train() first")
        rows = [row for row in self.history.rows if not row.get("at_end")]
        save_ema_state(self.ema, folder, self._run.notes(self.half_life, self.decay), rows)

    def _save_state(self, folder: Path, step: int) -> None:
        if not self._training or not self._run.keeps_state:
            return
        self._take_in(step)  # a preemption checkpoint is written at the end of a step, but before our on_step_end
        with self._findings.only_warn(step, "saving the average's state"):
            self.write_state(folder)
            self._run.saved_steps.add(step)

    def _take_in(self, step: int) -> None:
        if step > self._run.step:
            self.ema.update()
            self._run.step = step

    def _expect_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """A checkpoint of this step from an earlier run would be overwritten file by file: it is whole no longer."""
        comes_now = control.should_save and not control.should_evaluate and args.should_save
        if comes_now and state.global_step not in self._run.saved_steps:
            with self._findings.only_warn(state.global_step, "preparing a checkpoint folder of an earlier run"):
                unmark_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _new_average(self, model, state: TrainerState, decays: list[float] | None = None) -> WeightEMA:
        return WeightEMA(
            model.named_parameters(),
            self.half_life if decays is None else None,
            self.decay if decays is None else decays,
            total_steps=state.max_steps,
            mode=self.mode,
            sync_steps=self.sync_steps,
            include=self.params,
            exclude=self.exclude_params,
            dtype=self.ema_dtype,
            device=self.ema_device,
        )

    def _start(self, args, state: TrainerState, control: TrainerControl, model, tokenizer) -> None:
        run_folder.start_history(self.history)
        run_folder.warn_of_later_checkpoints(state.global_step, args.output_dir)
        if self.check is not None and self.check_base:
            self._check(("base",), args, state, control, model, tokenizer)

    def _resume(self, args, state: TrainerState, control: TrainerControl, model, tokenizer) -> None:
        """Take the average and the history from the checkpoint, and make up for a check that a kill cut off."""
        step, self._run.resumed = state.global_step, True
        checkpoint, self._run.own_folder = run_folder.resumed_from(step, self.resume_from, args)
        notes = usable_notes(checkpoint, step, args.output_dir, restart=self.on_missing_state == "restart")
        if notes is None:
            self.ema = self._new_average(model, state)
        else:
            decays = run_folder.first_decays(notes, self.half_life, self.decay, state.max_steps)
            self.ema = self._new_average(model, state, decays)
            run_folder.load_average(self.ema, checkpoint, step)
        report = run_folder.resume_history(self._findings, checkpoint, step, self.guarded)
        if notes is None:
            with self._findings.only_warn(step, "going on with the average of the checkpoint"):
                raise ValueError(f"{checkpoint} holds none that can be used; it starts anew from these weights")
        run_folder.warn_of_later_checkpoints(step, args.output_dir)
        if self._findings.checked_step == step:
            self._guard(step, report, control)
        elif self._is_due(state) or (self.check is not None and is_evaluated(args, state)):
            self._check(self.check_weights, args, state, control, model, tokenizer)
        self._run.over = step >= state.max_steps or control.should_training_stop
        if self._run.over:
            logger.warning(f"the run is over at step {step}; should the Trainer take another step, it is undone")

    def _is_due(self, state: TrainerState) -> bool:
        """Whether to check after this step, evaluated or not."""
        by_steps = self.check_steps is not None and state.global_step % self.check_steps == 0
        return self.check is not None and (by_steps or state.global_step >= state.max_steps)

    def _check(self, weights: Sequence[str], args, state, control, model, tokenizer) -> None:
        """Check once a step; never raises, but on request."""
        done = self._findings.check(self.check, weights, self.ema, args, state, control, model, tokenizer)
        for report in (done or {}).values():
            self._tell(report)
        if done is not None and state.global_step > 0:
            row = done[self.guarded].to_dict() if self.guarded in done else None
            self._guard(state.global_step, row, control)

    def _tell(self, report: SafetyReport) -> None:
        """Called with each report that was written down; for the trainer to pass on."""

    def _guard(self, step: int, row: dict | None, control: TrainerControl | None) -> None:
        hold_to_limit(self.max_asr, self.on_violation, self.guarded, step, row, control)

    def _ema_losses(self, *moment) -> dict[str, float]:
        return self._findings.ema_losses(self.ema, *moment)
