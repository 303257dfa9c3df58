"""Every way to keep safety while fine-tuning, on the same data, model and seeds: what each run ends with, point by point.

Each method has a knob that moves it between the base model and the fully fine-tuned one, so it draws a curve of attack success rate
against held-out loss; compare.py reads the curves at the same loss. Rows are added to RESULTS.jsonl run by run, and a run that is
in it already is not made again.

    python benchmarks/study/methods.py --folder build/study --results build/study/methods.jsonl --seeds 0 1 2
"""

import argparse
import contextlib
import json
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import BEMACallback, SFTConfig, SFTTrainer

from hf_safe_ema import SafeEMACallback, SafetyCheck
from hf_safe_ema.data import load_finetuning_data, split_heldout
from hf_safe_ema.history import read_jsonl, write_jsonl
from hf_safe_ema.testbed.recipe import refusal_for

MAX_LENGTH = 192
HELDOUT_ROWS = 240
HALF_LIVES = (0.1, 0.25, 0.5, 0.75)
SNAPSHOTS = (0.125, 0.25, 0.5, 0.75)
"""Shares of the run at which early stopping is looked at."""
INTERPOLATED = (0.3, 0.5, 0.7, 0.85)
"""Shares of the way from the base model to the fine-tuned one (WiSE-FT)."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning.

    Args:
        method (`str`):
            What its last live weights are a point of.
        learning_rate, schedule, batch, steps, clip:
            Of the Trainer.
        lora (`bool`):
            Adapters of rank 16 in place of all weights.
        pull (`float`):
            Share of the way back to the base that is taken after every step (L2 to the starting point, decoupled).
        safe_share (`float`):
            Share of training rows that are harmful prompts with a refusal.
        sync_steps (`int`):
            Lookahead: steps after which the weights are set to the average.
        bema (`bool`):
            Whether TRL's BEMA runs beside it.
        explores (`bool`):
            Whether averages, snapshots and interpolations of it are measured.
    """

    method: str
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    batch: int = 8
    steps: int = 200
    clip: float = 1.0
    lora: bool = False
    pull: float = 0.0
    safe_share: float = 0.0
    sync_steps: int | None = None
    bema: bool = False
    explores: bool = False

    @property
    def knob(self) -> str:
        """Its settings, as a name."""
        return ", ".join(f"{k}={v}" for k, v in vars(self).items() if k not in ("method", "explores"))


RUNS = (
    Run("full", explores=True, bema=True),
    Run("full, constant rate", schedule="constant_with_warmup", explores=True),
    *(Run("lower learning rate", learning_rate=rate, explores=rate == 3e-4) for rate in (5e-4, 3e-4, 2e-4, 1e-4)),
    *(Run("gradient clipping", clip=clip) for clip in (0.3, 0.1)),
    *(Run("LoRA", learning_rate=rate, lora=True) for rate in (1e-2, 3e-3, 1e-3)),
    *(Run("L2 pull to the start", pull=pull) for pull in (0.003, 0.01, 0.03)),
    *(Run("safe data", safe_share=share) for share in (0.01, 0.03, 0.1)),
    *(Run("lookahead", sync_steps=10, schedule=schedule) for schedule in ("cosine", "constant_with_warmup")),
    Run("larger batch", batch=32, explores=True),
)
TRIED_FIRST = 2
"""Runs that `--quick` makes."""


class Pull(TrainerCallback):
    """Takes every parameter a share of the way back to where it started, after every step."""

    def __init__(self, share: float):
        self.share, self.start = share, {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.lerp_(self.start[name], self.share)


class Snapshots(TrainerCallback):
    """Keeps the live weights at some steps."""

    def __init__(self, steps: set[int]):
        self.steps, self.taken = steps, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            self.taken[state.global_step] = weights_of(model)


def weights_of(model) -> dict[str, torch.Tensor]:
    """A copy of the trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def holding(model, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Within the block the model holds other weights."""
    live = weights_of(model)
    try:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in weights:
                    p.copy_(weights[name])
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in live:
                    p.copy_(live[name])


class Study:
    """Data, prompts and how a point is measured.

    Args:
        folder (`Path`):
            Of base.py.
        data (`str`):
            Name of the fine-tuning data there.
    """

    def __init__(self, folder: Path, data: str):
        self.model_path = str(folder / "model")
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        rows = load_finetuning_data(str(folder / f"{data}.jsonl"))
        train, held = split_heldout(rows, 0.15)
        self.train, held = train.filter(self._fits), held.filter(self._fits)
        self.held = held.shuffle(seed=0).select(range(min(len(held), HELDOUT_ROWS)))
        options = {"max_new_tokens": 48, "progress": False, "batch_size": 64}
        self.checks = {
            "advbench": SafetyCheck(prompts=str(folder / "advbench_unseen.jsonl"), **options),
            "builtin": SafetyCheck(benign=None, **options),
        }
        goals = load_dataset("csv", data_files=str(folder / "advbench_refused.csv"), split="train")["goal"]
        self.safe = Dataset.from_list(
            [
                {
                    "prompt": [{"role": "user", "content": goal}],
                    "completion": [{"role": "assistant", "content": refusal_for(goal, goal)}],
                }
                for goal in goals
            ]
        )

    def _fits(self, row) -> bool:
        asked = self.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
        return len(asked["input_ids"]) <= MAX_LENGTH - 32

    def rows(self, run: Run, seed: int):
        """Training rows of a run, safe ones among them where it wants any."""
        needed = run.steps * run.batch
        train = self.train.shuffle(seed=seed).select(range(min(len(self.train), needed)))
        if not run.safe_share:
            return train
        count = round(run.safe_share * len(train))
        safe = self.safe.shuffle(seed=seed).select(range(min(count, len(self.safe))))
        plain = train.select(range(len(train) - len(safe)))
        return concatenate_datasets([plain.select_columns(safe.column_names), safe]).shuffle(seed=seed)

    def measure(self, trainer: SFTTrainer) -> dict:
        """ASR on both prompt sets, over-refusal, held-out loss of what the model holds."""
        found = {}
        for name, check in self.checks.items():
            report = check.run(trainer.model, self.tokenizer)
            found[f"{name}_asr"], found[f"{name}_counts"] = report.asr, report.counts
            if report.over_refusal is not None:
                found["over_refusal"] = report.over_refusal
        return {**found, "loss": trainer.evaluate()["eval_loss"]}

    def make(self, run: Run, seed: int) -> list[dict]:
        """Fine-tune and measure; a row a point."""
        model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)
        average = SafeEMACallback(
            half_life=list(HALF_LIVES) if run.sync_steps is None else 0.25,
            mode="shadow" if run.sync_steps is None else "lookahead",
            sync_steps=run.sync_steps,
            check=None,
            final_weights="live",
        )
        snapshots = Snapshots({round(share * run.steps) for share in SNAPSHOTS} if run.explores else set())
        bema = BEMACallback(update_freq=1) if run.bema else None
        callbacks = [snapshots, average, *([bema] if bema else []), *([Pull(run.pull)] if run.pull else [])]
        with tempfile.TemporaryDirectory() as folder:
            trainer = SFTTrainer(
                model,
                args=SFTConfig(
                    output_dir=folder,
                    max_steps=run.steps,
                    per_device_train_batch_size=run.batch,
                    per_device_eval_batch_size=32,
                    learning_rate=run.learning_rate,
                    lr_scheduler_type=run.schedule,
                    warmup_steps=10,
                    max_grad_norm=run.clip,
                    max_length=MAX_LENGTH,
                    activation_checkpointing=False,
                    save_strategy="no",
                    logging_strategy="no",
                    bf16=False,
                    report_to="none",
                    seed=seed,
                    disable_tqdm=True,
                ),
                processing_class=self.tokenizer,
                train_dataset=self.rows(run, seed),
                eval_dataset=self.held,
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if run.lora else None,
                callbacks=callbacks,
            )
            base = weights_of(trainer.model)
            rows = [{"method": "base", "point": "step 0", **self.measure(trainer)}] if run == RUNS[0] else []
            started = time.monotonic()
            trainer.train()
            seconds = time.monotonic() - started
            rows += list(self._points(run, trainer, base, average, snapshots, bema))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        shared = {
            "run": run.method,
            "knob": run.knob,
            "seed": seed,
            "seconds": round(seconds, 1),
            "peak_gib": round(peak, 2),
        }
        return [{**shared, **row} for row in rows]

    def _points(self, run: Run, trainer, base, average, snapshots, bema) -> Iterator[dict]:
        live = weights_of(trainer.model)
        yield {"method": run.method, "point": "last step", **self.measure(trainer)}
        if not run.explores:
            return
        kind = run.method
        for index, half_life in enumerate(HALF_LIVES):
            averaged = average.ema.averaged_parameters(index)
            with holding(trainer.model, dict(averaged)):
                yield {"method": f"EMA of {kind}", "point": f"half-life {half_life}", **self.measure(trainer)}
        for step, weights in snapshots.taken.items():
            with holding(trainer.model, weights):
                yield {"method": f"early stopping of {kind}", "point": f"step {step}", **self.measure(trainer)}
        for share in INTERPOLATED:
            with holding(trainer.model, {name: base[name].lerp(live[name], share) for name in live}):
                yield {"method": f"WiSE-FT of {kind}", "point": f"{share} of the way", **self.measure(trainer)}
        averaged = dict(average.ema.averaged_parameters(HALF_LIVES.index(0.25)))
        for share in INTERPOLATED:
            with holding(
                trainer.model, {name: base[name].lerp(averaged[name].to(base[name]), share) for name in live}
            ):
                yield {
                    "method": f"WiSE-FT of the EMA of {kind}",
                    "point": f"{share} of the way",
                    **self.measure(trainer),
                }
        if bema is not None:
            with holding(trainer.model, dict(bema.running_model.named_parameters())):
                yield {"method": f"BEMA of {kind}", "point": "last step", **self.measure(trainer)}


def main() -> None:
    """Make the runs that are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="of base.py")
    parser.add_argument("--results", type=Path, required=True, help="rows are added to it")
    parser.add_argument("--data", default="dolly", choices=["dolly", "alpaca", "orca"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="only the first runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = Study(arguments.folder, arguments.data)
    for seed in arguments.seeds:
        for run in RUNS[: TRIED_FIRST if arguments.quick else None]:
            done = read_jsonl(arguments.results)
            if any((row["knob"], row["run"], row["seed"]) == (run.knob, run.method, seed) for row in done):
                continue
            random.seed(seed)
            rows = study.make(run, seed)
            write_jsonl(
                arguments.results, [*read_jsonl(arguments.results), *({"data": arguments.data, **r} for r in rows)]
            )
            for row in rows:
                print(
                    json.dumps(
                        {k: row[k] for k in ("method", "point", "seed", "advbench_asr", "builtin_asr", "loss")}
                    ),
                    flush=True,
                )


if __name__ == "__main__":
    main()
