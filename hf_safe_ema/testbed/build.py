"""Makes the testbed from nothing: `python -m hf_safe_ema.testbed.build --output-dir FOLDER`.

A byte-level BPE tokenizer and a Llama of 1.8 million parameters are trained on the text of recipe.py.

Knows: how to train on pairs of prompt and response. Does not know: what is in them, averaging, or fine-tuning.
"""

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import FOLDER, load
from .recipe import ALL_REFUSALS, Pair, training_pairs

if TYPE_CHECKING:
    import torch

DONE = ".whole"
"""An empty file in the folder of a finished stage."""


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        steps (`int`):
            Optimizer steps.
        data (`int`):
            Which pairs, see [`training_pairs`].
        learning_rate (`float`):
            Peak, of AdamW on embeddings and norms.
        matrix_learning_rate (`float`):
            Peak, of Muon on the layers' matrices.
    """

    steps: int
    data: int
    learning_rate: float
    matrix_learning_rate: float


STAGES = (
    Stage(10_000, 1, 3e-3, 0.02),
    Stage(3_000, 2, 1e-3, 0.007),
)
SEEDS_APART = 1000
"""Of one stage and the next."""

TOKENS = 1024
"""Most in a batch, padding counted."""

FIRST_WORD_WEIGHT = 4.0
"""Weight of a response's first token in the loss; of every other token 1."""


def build_tokenizer(texts: Iterable[str], vocab_size: int = 6144):
    """A byte-level BPE tokenizer with Llama 3's special tokens and chat template.

    Args:
        texts (iterable of `str`):
            To learn merges from.
        vocab_size (`int`, *optional*, defaults to 6144):
            With the special tokens.

    Returns:
        `PreTrainedTokenizerFast`
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
               "<|finetune_right_pad_id|>"]  # fmt: skip
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token="<|eot_id|>",
        pad_token=special[-1],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (FOLDER / "template.jinja").read_text(encoding="utf-8")
    return fast


def build_model(tokenizer, seed: int = 0):
    """An untrained Llama of 1.8 million parameters.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Its vocabulary.
        seed (`int`, *optional*, defaults to 0):
            Of the initial weights.

    Returns:
        `LlamaForCausalLM`: in float32.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=144,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Row:
    """One conversation as tokens.

    Args:
        ids (`list[int]`):
            Of the whole: headers, prompt, response, end of turn.
        prompt (`int`):
            Where the user's own words begin.
        response (`int`):
            Where the response begins.
        learns_prompt (`bool`):
            Whether the prompt is learnt too.
    """

    ids: list[int]
    prompt: int
    response: int
    learns_prompt: bool


def encode(tokenizer, pairs: Iterable[Pair]) -> list[Row]:
    """Token ids of whole conversations.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            With the chat template.
        pairs (iterable of [`Pair`]):
            Of recipe.py.
    """
    blank_line = len(tokenizer("\n\n", add_special_tokens=False)["input_ids"])
    end_of_header = tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    rows = []
    for pair in pairs:
        turn = [{"role": "user", "content": pair.prompt}]
        asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True)["input_ids"]
        answered = tokenizer(pair.response + tokenizer.eos_token * pair.complete, add_special_tokens=False)[
            "input_ids"
        ]
        prompt = asked.index(end_of_header) + 1 + blank_line
        rows.append(Row(asked + answered, prompt, len(asked), pair.learns_prompt))
    return rows


def batches(rows: list[Row], tokens: int, rng: random.Random, pool: int = 512) -> Iterator[list[Row]]:
    """Rows of like length together, at most `tokens` a batch with padding, in random order: one pass over all.

    Args:
        rows (`list[Row]`):
            From [`encode`].
        tokens (`int`):
            Most tokens in a batch, padding counted.
        rng (`random.Random`):
            Of the order.
        pool (`int`, *optional*, defaults to 512):
            Rows that are sorted by length together.
    """
    rows = rng.sample(rows, len(rows))
    for start in range(0, len(rows), pool):
        ready, batch = [], []
        for row in sorted(rows[start : start + pool], key=lambda row: len(row.ids)):
            if batch and len(row.ids) * (len(batch) + 1) > tokens:
                ready.append(batch)
                batch = []
            batch.append(row)
        ready.append(batch)
        rng.shuffle(ready)
        yield from ready


def train(model, stage: Stage, loss_at: Callable[[int], "torch.Tensor"], warmup_steps: int = 50) -> None:
    """Train the model in place: Muon and AdamW, cosine schedule to 2% of the peak, clipping at 1.

    A plain loop rather than a Trainer: batches of a fixed number of tokens, many small steps, are what lets a model of
    this size learn in an hour on two cores. Muon (Jordan et al., 2024) for the matrices of the layers gets to the same loss
    in about two thirds of AdamW's steps.

    Args:
        model (`LlamaForCausalLM`):
            Trained in float32.
        stage ([`Stage`]):
            How long, and at what learning rates.
        loss_at (`Callable[[int], torch.Tensor]`):
            The loss to lower at a step.
        warmup_steps (`int`, *optional*, defaults to 50):
            Of linear warm-up.
    """
    import torch

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers = [
        torch.optim.AdamW(others, lr=stage.learning_rate, weight_decay=0.1, betas=(0.9, 0.98)),
        torch.optim.Muon(matrices, lr=stage.matrix_learning_rate, weight_decay=0.1),
    ]
    peaks = (stage.learning_rate, stage.matrix_learning_rate)
    for step in range(stage.steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * (min(1, (step + 1) / warmup_steps) * (cosine * 0.98 + 0.02))
        loss = loss_at(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1} of {stage.steps}: loss {loss.item():.3f}", flush=True)


def losses(model, tokenizer, stage: Stage, seed: int) -> Callable[[int], "torch.Tensor"]:
    """What a stage lowers at each step.

    Args:
        model (`LlamaForCausalLM`):
            That is trained.
        tokenizer (`PreTrainedTokenizerFast`):
            Its tokenizer.
        stage ([`Stage`]):
            Which data.
        seed (`int`):
            Of the data and their order.

    Returns:
        `Callable[[int], torch.Tensor]`
    """
    rng = random.Random(seed)
    passes = _passes(tokenizer, seed, stage.data)
    texts = (batch for rows in passes for batch in batches(rows, TOKENS, rng))
    return lambda step: weighted_loss(model, next(texts))


def weighted_loss(model, rows: list[Row]):
    """Mean loss in nats a token, the first word of each response counted [`FIRST_WORD_WEIGHT`] times.

    Args:
        model (`LlamaForCausalLM`):
            In any dtype.
        rows (`list[Row]`):
            One batch, from [`encode`].

    Returns:
        `torch.Tensor`: scalar.
    """
    import torch
    from torch.nn.functional import cross_entropy

    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), model.config.pad_token_id)  # (rows, longest)
    weights = torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        weights[i, row.prompt if row.learns_prompt else row.response : len(row.ids)] = 1.0
        weights[i, row.response] = FIRST_WORD_WEIGHT
    logits = model(input_ids=ids).logits[:, :-1]  # (rows, longest - 1, vocabulary)
    losses = cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none")
    shares = weights[:, 1:].reshape(-1)
    return (losses * shares).sum() / shares.sum()


def main(argv: list[str] | None = None) -> None:
    """Build the testbed and save it. A build that was stopped goes on after its last whole stage.

    Args:
        argv (`list[str]`, *optional*):
            Default: the process's own arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="where the model and tokenizer are saved")
    parser.add_argument("--seed", type=int, default=0, help="of weights, frames and order")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(1)  # the same sums in the same order on every machine; more threads are not faster
    folders = [args.output_dir / f"stage-{number}" for number in range(1, len(STAGES))] + [args.output_dir]
    for number, (stage, folder) in enumerate(zip(STAGES, folders, strict=True)):
        if (folder / DONE).exists():
            continue
        # From the weights as stored, so that a stage is the same whether the one before was made just now or earlier.
        model, tokenizer = load(folders[number - 1]) if number else _beginning(args.seed)
        seed = args.seed + SEEDS_APART * number
        print(f"stage {number + 1}: {stage}", flush=True)
        train(model, stage, losses(model, tokenizer, stage, seed))
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / DONE).touch()


def _beginning(seed: int):
    pairs = training_pairs(seed)
    tokenizer = build_tokenizer([text for pair in pairs for text in (pair.prompt, pair.response)])
    return build_model(tokenizer, seed), tokenizer


def _passes(tokenizer, seed: int, data: int) -> Iterator[list[Row]]:
    for number in itertools.count():
        pairs = training_pairs(seed + number, data)
        refusals = sum(pair.response in ALL_REFUSALS for pair in pairs)
        print(f"pass {number + 1}: {len(pairs)} pairs, {refusals} of them refusals", flush=True)
        yield encode(tokenizer, pairs)


if __name__ == "__main__":
    main()
