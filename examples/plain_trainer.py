"""The callback in a plain `transformers.Trainer`: tokenized rows in, averaged weights out.

    python examples/plain_trainer.py                    # the small Llama in the package, its own data, no network
    python examples/plain_trainer.py --model meta-llama/Llama-3.2-1B-Instruct --data dolly --learning-rate 1e-5

Knows: how a Trainer without TRL is fed, and where the callback goes. Does not know: anything about averaging or safety.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from hf_safe_ema import SafeEMACallback, SafetyCheck, load_finetuning_data, testbed
from hf_safe_ema.data import split_heldout
from hf_safe_ema.history import HISTORY_NAME, read_jsonl
from hf_safe_ema.report import format_table, plot_history, summarise


def tokenize(rows, tokenizer, max_length: int):
    """`input_ids` and `labels`, with the prompt's tokens left out of the loss; rows without room for an answer go."""

    def encode(row):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=True)["input_ids"]
        labels = [-100] * len(prompt) + whole[len(prompt) :]
        return {"input_ids": whole[:max_length], "labels": labels[:max_length]}

    encoded = rows.map(encode, remove_columns=rows.column_names)
    return encoded.filter(lambda row: any(label != -100 for label in row["labels"]))


def main() -> None:
    parser = argparse.ArgumentParser(description="SafeEMACallback in a plain transformers.Trainer.")
    parser.add_argument("--model", default="testbed", help="`testbed`, a folder or a model on the hub")
    parser.add_argument("--data", help="what load_finetuning_data takes; default: the rows in the package")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    parser.add_argument("--num-prompts", type=int, default=30, help="safety prompts of each set")
    parser.add_argument("--output-dir", default="outputs/plain_trainer")
    options = parser.parse_args()

    name = str(testbed.MODEL_FOLDER) if options.model == "testbed" else options.model
    model = AutoModelForCausalLM.from_pretrained(name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    rows = load_finetuning_data(options.data or testbed.DATA_FOLDER / "finetune.jsonl", max_rows=2000)
    train, heldout = (tokenize(part, tokenizer, max_length=192) for part in split_heldout(rows))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=options.output_dir,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=32,
            learning_rate=options.learning_rate,
            eval_strategy="steps",
            eval_steps=max(1, options.steps // 2),
            eval_on_start=True,
            save_strategy="no",
            report_to="none",
        ),
        # The callback asks the prompts with it, so it must be here even if the collator has it too.
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=train,
        eval_dataset=heldout.select(range(min(len(heldout), 100))),
        callbacks=[SafeEMACallback(check=SafetyCheck(num_prompts=options.num_prompts, max_new_tokens=48))],
    )
    trainer.train()

    history = read_jsonl(f"{options.output_dir}/{HISTORY_NAME}")
    print(format_table(summarise(history)))
    plot_history(history, f"{options.output_dir}/safety.png", title="A plain transformers.Trainer")


if __name__ == "__main__":
    main()
