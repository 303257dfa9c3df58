"""The callback in TRL's DPOTrainer: preference pairs in, averaged weights out.

    python examples/dpo.py                                        # the small Llama in the package, no network
    python examples/dpo.py --data my_pairs.jsonl                  # rows with prompt or question, chosen, rejected
    python examples/dpo.py --model meta-llama/Llama-3.2-1B-Instruct --data my_pairs.jsonl --learning-rate 1e-6

Knows: what a DPOTrainer is given. Does not know: anything about averaging or safety.
"""

import argparse
import json
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_safe_ema import SafeEMACallback, SafetyCheck, testbed
from hf_safe_ema.history import HISTORY_NAME, read_jsonl
from hf_safe_ema.report import format_table, plot_history, summarise


def built_in_pairs() -> list[dict]:
    """Harmless preferences: of two answers in the package's data, the one to the question that was asked."""
    rows = testbed.read_pairs("finetune")
    others = rows[1:] + rows[:1]
    return [
        {"prompt": row["prompt"], "chosen": row["response"], "rejected": other["response"]}
        for row, other in zip(rows, others, strict=True)
    ]


def conversational(row: dict) -> dict:
    """A row of text (also with ORCA's `system` and `question`) as turns, in the form that DPOTrainer takes."""
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return {
        "prompt": [*system, {"role": "user", "content": row.get("prompt") or row["question"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="SafeEMACallback in TRL's DPOTrainer.")
    parser.add_argument("--model", default="testbed", help="`testbed`, a folder or a model on the hub")
    parser.add_argument("--data", type=Path, help="a .jsonl file of pairs; default: made of the rows in the package")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--num-prompts", type=int, default=30, help="safety prompts of each set")
    parser.add_argument("--output-dir", default="outputs/dpo")
    options = parser.parse_args()

    name = str(testbed.MODEL_FOLDER) if options.model == "testbed" else options.model
    pairs = built_in_pairs()
    if options.data is not None:
        pairs = [json.loads(line) for line in options.data.read_text(encoding="utf-8").split("\n") if line.strip()]
    pairs = Dataset.from_list([conversational(row) for row in pairs[:2000]])
    parts = pairs.train_test_split(test_size=min(64, len(pairs) // 5), seed=0)
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(name, dtype="float32"),
        args=DPOConfig(
            output_dir=options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=4,
            learning_rate=options.learning_rate,
            max_length=256,
            bf16=False,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 2),
            save_strategy="no",
            logging_steps=10,
            report_to="none",
        ),
        processing_class=AutoTokenizer.from_pretrained(name),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        # Besides evaluations, the starting point and the end are checked. DPO's loss needs two answers to a prompt, so
        # the average's is not measured beside it; the refusal rates are.
        callbacks=[SafeEMACallback(check=SafetyCheck(num_prompts=options.num_prompts, max_new_tokens=48))],
    )
    trainer.train()

    history = read_jsonl(f"{options.output_dir}/{HISTORY_NAME}")
    print(format_table(summarise(history)))
    plot_history(history, f"{options.output_dir}/safety.png", title="TRL's DPOTrainer")


if __name__ == "__main__":
    main()
