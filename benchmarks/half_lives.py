"""Half-lives side by side: one fine-tuning of the demo's kind at each learning rate, several averages of each.

Since the averages are shadows of the same run, they differ in nothing but the half-life.

    python benchmarks/half_lives.py --learning-rates 3e-4 7e-4 1e-3 --half-lives 0.25 0.5 0.75
"""

import argparse
import tempfile

from trl import SFTConfig, SFTTrainer

from hf_safe_ema import SafeEMACallback, SafetyCheck
from hf_safe_ema.demo import MAX_LENGTH, DemoConfig, load_data, load_model


def measure(learning_rate: float, half_lives: list[float], config: DemoConfig) -> list[str]:
    """Fine-tune once; ASR, over-refusal and held-out loss of the live weights and of each average.

    Args:
        learning_rate (`float`):
            Constant after the warm-up.
        half_lives (list of `float`):
            As fractions of the run.
        config ([`DemoConfig`]):
            The rest of the settings.
    """
    model, tokenizer = load_model(config.model)
    train, held = load_data(config, tokenizer)
    check = SafetyCheck(max_new_tokens=48, progress=False)
    callback = SafeEMACallback(half_life=half_lives, check=None, final_weights="live")
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
            seed=config.seed,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = SFTTrainer(
            model, args=args, processing_class=tokenizer, train_dataset=train, eval_dataset=held, callbacks=[callback]
        )

        def row() -> str:
            report = check.run(model, tokenizer)
            loss = trainer.evaluate()["eval_loss"]
            return f"{report.asr:.1%} / {report.over_refusal:.1%} / {loss:.3f}"

        trainer.train()
        cells = [row()]
        for index in range(len(half_lives)):
            with callback.ema.swapped_in(index):
                cells.append(row())
    return cells


def main() -> None:
    """Print one row a learning rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-4, 7e-4, 1e-3])
    parser.add_argument("--half-lives", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("| learning rate | live | " + " | ".join(f"half-life {value:g}" for value in arguments.half_lives) + " |")
    print("|---" * (len(arguments.half_lives) + 2) + "|")
    for learning_rate in arguments.learning_rates:
        cells = measure(learning_rate, arguments.half_lives, DemoConfig(seed=arguments.seed))
        print(f"| {learning_rate:g} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
