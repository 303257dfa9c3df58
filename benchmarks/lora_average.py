"""What averaging LoRA's factors A and B apart costs against averaging the weights that they make, scaling * B @ A.

Both averages are shadows of the same run, so they differ in nothing but what is averaged. The average of the weights has
more than rank r: it is measured merged into the model, and once more cut to rank r, since an adapter holds no more.

    python benchmarks/lora_average.py --learning-rates 1e-3 2e-3 5e-3 --half-lives 0.25 0.5 --seeds 0 1 2
"""

import argparse
import contextlib
import json
import math
import statistics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from hf_safe_ema import SafeEMACallback, SafetyCheck
from hf_safe_ema.demo import MAX_LENGTH, DemoConfig, load_data, load_model

Deltas = dict[str, torch.Tensor]
PRODUCT = "average of BA"
COLUMNS = {"gap": "{:.1%}", "asr": "{:.1%}", "asr_less": "{:+.1%}", "over_refusal": "{:.1%}", "loss": "{:.3f}",
           "loss_less": "{:+.3f}"}  # fmt: skip


def lora_layers(model) -> dict[str, LoraLayer]:
    """The modules that have an adapter, by name.

    Args:
        model (`PeftModel`):
            With one LoRA adapter.
    """
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@torch.no_grad()
def deltas_of(model) -> Deltas:
    """What the adapter adds to each weight: scaling * B @ A, in float32 and the weight's shape.

    Args:
        model (`PeftModel`):
            With one LoRA adapter.
    """
    return {name: layer.get_delta_weight("default").float() for name, layer in lora_layers(model).items()}


class ProductEMA(TrainerCallback):
    """Exponential moving averages of scaling * B @ A itself, dense. They start at 0, since B does.

    Args:
        callback ([`SafeEMACallback`]):
            Whose decays to use.
    """

    def __init__(self, callback: SafeEMACallback):
        self.callback = callback
        self.averages: list[Deltas] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        start = deltas_of(model)
        if any(delta.any() for delta in start.values()):
            raise ValueError("the adapter does not start at B = 0: scaling * B @ A must be 0 before the first step")
        self.averages = [{name: delta.clone() for name, delta in start.items()} for _ in self.callback.ema.decays]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        live = deltas_of(model)
        for average, decay in zip(self.averages, self.callback.ema.decays, strict=True):
            for name, delta in live.items():
                average[name].lerp_(delta, 1.0 - decay)


def cut_to_rank(deltas: Deltas, rank: int) -> Deltas:
    """The nearest weights of that rank.

    Args:
        deltas (`dict`):
            Matrices by name.
        rank (`int`):
            How many singular values to keep.
    """
    cut = {}
    for name, delta in deltas.items():
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        cut[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
    return cut


def gap(deltas: Deltas, to: Deltas) -> float:
    """Frobenius norm of the difference over all modules together, as a share of that of `to`.

    Args:
        deltas, to (`dict`):
            Matrices by name.
    """

    def norm(tensors) -> float:
        return math.sqrt(sum(torch.linalg.vector_norm(t, dtype=torch.float64).item() ** 2 for t in tensors))

    return norm(deltas[name] - to[name] for name in to) / norm(to.values())


@contextlib.contextmanager
def merged(model, deltas: Deltas):
    """Within the block the model is the plain one plus `deltas`, without its adapter; after it, what it was before.

    Args:
        model (`PeftModel`):
            With one LoRA adapter.
        deltas (`dict`):
            What to add, by name of the module.
    """
    weights = {name: layer.get_base_layer().weight for name, layer in lora_layers(model).items()}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with model.disable_adapter(), torch.no_grad():
            for name, weight in weights.items():
                weight.add_(deltas[name])
            yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def measure(learning_rate: float, seed: int, half_lives: list[float], rank: int, steps: int) -> list[dict]:
    """Fine-tune once; the gap to the average of the product, ASR, over-refusal and held-out loss of each kind of weights.

    Args:
        learning_rate (`float`):
            Constant after the warm-up.
        seed (`int`):
            Of the adapter's start and of the data order.
        half_lives (list of `float`):
            As fractions of the run.
        rank (`int`):
            Of the adapters; lora_alpha is twice that.
        steps (`int`):
            Optimizer steps.

    Returns:
        list of `dict`: a row for each half-life and kind of weights.
    """
    config = DemoConfig(seed=seed, steps=steps)
    model, tokenizer = load_model(config.model)
    train, held = load_data(config, tokenizer)
    check = SafetyCheck(max_new_tokens=48, progress=False)
    callback = SafeEMACallback(half_life=half_lives, check=None, final_weights="live")
    product = ProductEMA(callback)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=config.steps,
            per_device_train_batch_size=config.batch_size,
            per_device_eval_batch_size=32,
            learning_rate=learning_rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=max(1, config.steps // 20),
            max_length=MAX_LENGTH,
            activation_checkpointing=False,
            save_strategy="no",
            bf16=False,
            report_to="none",
            seed=seed,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = SFTTrainer(
            model,
            args=args,
            processing_class=tokenizer,
            train_dataset=train,
            eval_dataset=held,
            peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
            callbacks=[callback, product],
        )
        trainer.remove_callback(PrinterCallback)  # standard output is for the table
        trainer.train()

        def row(half_life: float | None, weights: str, deltas: Deltas, to: Deltas) -> dict:
            with merged(trainer.model, deltas):
                report = check.run(trainer.model, tokenizer)
                loss = trainer.evaluate()["eval_loss"]
            return {"learning_rate": learning_rate, "seed": seed, "half_life": half_life, "weights": weights,
                    "gap": gap(deltas, to), "asr": report.asr, "over_refusal": report.over_refusal,
                    "loss": loss}  # fmt: skip

        live = deltas_of(trainer.model)
        measured = row(None, "live", live, live)
        rows = []
        for index, half_life in enumerate(half_lives):
            average = product.averages[index]
            rows.append({**measured, "half_life": half_life, "gap": gap(live, average)})
            with callback.ema.swapped_in(index):
                factors = deltas_of(trainer.model)
            rows.append(row(half_life, "average of A and of B", factors, average))
            rows.append(row(half_life, PRODUCT, average, average))
            rows.append(row(half_life, f"the same, cut to rank {rank}", cut_to_rank(average, rank), average))
    return rows


def less_the_product(rows: list[dict]) -> list[dict]:
    """The rows with what their ASR and loss are above those of the average of the product in the same run.

    Args:
        rows (list of `dict`):
            As [`measure`] returns them.
    """

    def run_of(row: dict) -> tuple:
        return row["learning_rate"], row["seed"], row["half_life"]

    product = {run_of(row): row for row in rows if row["weights"] == PRODUCT}
    compared = []
    for row in rows:
        to = product[run_of(row)]
        known = row["asr"] is not None and to["asr"] is not None
        asr_less = row["asr"] - to["asr"] if known else None
        compared.append({**row, "asr_less": asr_less, "loss_less": row["loss"] - to["loss"]})
    return compared


def cell(values: list[float | None], show: str) -> str:
    """Median and range, as the table has them.

    Args:
        values (list of `float`):
            One a seed; None where no answer could be judged.
        show (`str`):
            Format of a number.
    """
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    low, middle, high = (show.format(value) for value in (min(known), statistics.median(known), max(known)))
    return f"{middle} ({low} to {high})"


def print_table(rows: list[dict]) -> None:
    """Medians over the seeds, and from lowest to highest.

    Args:
        rows (list of `dict`):
            As [`measure`] returns them.
    """
    print("| learning rate | half-life | weights | gap to average of BA | ASR | ASR above average of BA | over-refusal "
          "| held-out loss | loss above average of BA |")  # fmt: skip
    print("|---" * (3 + len(COLUMNS)) + "|")
    groups: dict[tuple, list[dict]] = {}
    for row in less_the_product(rows):
        groups.setdefault((row["learning_rate"], row["half_life"], row["weights"]), []).append(row)
    for (learning_rate, half_life, weights), group in sorted(groups.items(), key=lambda item: item[0][:2]):
        cells = [cell([row[key] for row in group], show) for key, show in COLUMNS.items()]
        print(f"| {learning_rate:g} | {half_life:g} | {weights} | " + " | ".join(cells) + " |")


def main() -> None:
    """Run the grid and print one row for each learning rate, half-life and kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 5e-3])
    parser.add_argument("--half-lives", type=float, nargs="+", default=[0.25, 0.5], help="as fractions of the run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the adapter and the data order")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters; lora_alpha is twice that")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    arguments = parser.parse_args()
    rows = []
    for learning_rate in arguments.learning_rates:
        for seed in arguments.seeds:
            rows += measure(learning_rate, seed, arguments.half_lives, arguments.rank, arguments.steps)
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_table(rows)


if __name__ == "__main__":
    main()
