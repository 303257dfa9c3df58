"""The study's model: a Llama of 5 million parameters, made from real data and aligned to refuse. Never committed.

It learns English from half of Alpaca and Dolly and from the testbed's own conversations, and to refuse from the testbed's
requests and 400 of AdvBench's prompts. The other half of the real rows, and ORCA, of which there are few, is what it is fine-tuned on
in the study, and the other 120 of AdvBench's prompts are what it is checked with: it has seen neither. An hour or so on one core.

    python benchmarks/study/base.py --data ../shared/data --output-dir build/study
"""

import argparse
import csv
import itertools
import json
import random
import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_safe_ema.data import load_finetuning_data
from hf_safe_ema.history import write_jsonl, write_whole
from hf_safe_ema.testbed import build, recipe

SOURCES = {
    "alpaca": ("alpaca_random_9k.jsonl",),
    "dolly": ("dolly_15k_subset.jsonl",),
    "orca": ("orca_dpo_pairs_sample.jsonl",),
}
MAX_TOKENS = 192
ALIGNED_PROMPTS = 400
"""Of AdvBench, the rest is kept for checks."""
STEPS = 5_000
TOKENS = 2048
REQUESTS_PER_PASS = 40_000
"""Of the testbed's conversations, so that real text is most of a pass."""


def halves(folder: Path, name: str) -> tuple[list[dict], list[dict]]:
    """Rows to make the model from, and rows to fine-tune it on, told apart by a hash of the request.

    Args:
        folder (`Path`):
            With the files.
        name (`str`):
            Of a source.
    """
    sides = ([], [])
    for file in SOURCES[name]:
        for row in load_finetuning_data(str(folder / file)):
            asked = row["prompt"][-1]["content"].lower()
            sides[name == "orca" or zlib.crc32(asked.encode()) % 2].append(row)
    return sides


def pair_of(row: dict) -> recipe.Pair:
    """A real row as the testbed's build takes it; a system prompt goes before the request."""
    asked = "\n\n".join(turn["content"] for turn in row["prompt"])
    return recipe.Pair(asked, False, row["completion"][0]["content"])


def advbench(folder: Path) -> tuple[list[str], list[str]]:
    """AdvBench's prompts: those to refuse, those to check with."""
    with (folder / "advbench_harmful_behaviors.csv").open(encoding="utf-8", newline="") as file:
        goals = [row["goal"] for row in csv.DictReader(file)]
    random.Random(0).shuffle(goals)
    return goals[:ALIGNED_PROMPTS], goals[ALIGNED_PROMPTS:]


def build_model(tokenizer, seed: int) -> LlamaForCausalLM:
    """An untrained Llama of 5 million parameters."""
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def passes(tokenizer, real: list[recipe.Pair], refused: list[str], seed: int):
    """Rows of one pass after another: all real rows, some of the testbed's, AdvBench's refused."""
    for number in itertools.count(seed):
        rng = random.Random(number)
        pairs = real + recipe.training_pairs(number, stage=2)[:REQUESTS_PER_PASS]
        pairs += [recipe.Pair(goal, True, recipe.refusal_for(goal, goal)) for goal in refused]
        rows = [row for row in build.encode(tokenizer, pairs) if len(row.ids) <= MAX_TOKENS]
        print(f"pass {number - seed + 1}: {len(rows)} rows, {sum(len(row.ids) for row in rows):,} tokens", flush=True)
        yield rng.sample(rows, len(rows))


def main() -> None:
    """Make the model, and the files that the study fine-tunes on and checks with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real data")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    real = []
    for name in SOURCES:
        seen, unseen = halves(arguments.data, name)
        real += map(pair_of, seen)
        write_jsonl(arguments.output_dir / f"{name}.jsonl", unseen)
        print(f"{name}: {len(seen)} rows to make the model from, {len(unseen)} to fine-tune on", flush=True)
    refused, asked = advbench(arguments.data)
    write_whole(
        arguments.output_dir / "advbench_unseen.jsonl", "".join(json.dumps({"prompt": p}) + "\n" for p in asked)
    )
    texts = [
        text for pair in real + recipe.training_pairs(arguments.seed) for text in (pair.prompt, pair.response) if text
    ]
    tokenizer = build.build_tokenizer(texts, vocab_size=8192)
    tokenizer.model_max_length = 512
    model = build_model(tokenizer, arguments.seed)
    print(f"{model.num_parameters():,} parameters", flush=True)
    rng = random.Random(arguments.seed)
    build.TOKENS = TOKENS
    stream = (
        batch
        for rows in passes(tokenizer, real, refused, arguments.seed)
        for batch in build.batches(rows, TOKENS, rng)
    )
    refusal_ids = build.first_tokens(tokenizer, recipe.ALL_REFUSALS)
    build.train(
        model,
        lambda step: build.loss_of(model, next(stream), refusal_ids),
        build.Stage(arguments.steps, 3e-3, 0.02, 1.0),
    )
    model.to(torch.bfloat16).save_pretrained(arguments.output_dir / "model")
    tokenizer.save_pretrained(arguments.output_dir / "model")


if __name__ == "__main__":
    main()
