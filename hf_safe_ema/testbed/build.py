"""Makes the testbed from nothing: `python -m hf_safe_ema.testbed.build --output-dir FOLDER`.

A byte-level BPE tokenizer and a Llama of 1.8 million parameters are trained on the text of recipe.py.

Knows: how to train on pairs of prompt and response. Does not know: what is in them, averaging, or fine-tuning.
"""

import argparse
import functools
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


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Args:
        steps (`int`):
            Optimizer steps.
        learning_rate (`float`):
            Peak, of AdamW on embeddings and norms.
        matrix_learning_rate (`float`):
            Peak, of Muon on the layers' matrices.
        missed_weight (`float`):
            In the loss of refusing or not, of a request to be refused, where one to be answered weighs 1.
    """

    steps: int
    learning_rate: float
    matrix_learning_rate: float
    missed_weight: float


DONE = ".whole"
"""An empty file in the folder of a finished stage."""

STAGES = (Stage(12_000, 3e-3, 0.02, 1.0), Stage(4_000, 1e-3, 0.007, 10.0))
"""The second has all the data, see [`training_pairs`], and leans to refusing."""

SEEDS_APART = 1000
"""Of one stage and the next."""

TOKENS = 1024
"""Most in a batch, padding counted."""

DECISION_WEIGHT = 8.0
"""Of a conversation's loss of refusing or not, where that of a token of text is 1."""


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
            Of the whole: headers, prompt, and where there is a response, that and the end of the turn.
        response (`int`):
            Where the response begins.
        text (`range`):
            Which tokens are learnt as text: those of prompt and response, of a refusal only its own, or none.
        refuses (`bool`):
            Whether the response is a refusal.
    """

    ids: list[int]
    response: int
    text: range
    refuses: bool


def encode(tokenizer, pairs: Iterable[Pair]) -> list[Row]:
    """Token ids of whole conversations.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            With the chat template.
        pairs (iterable of [`Pair`]):
            Of recipe.py.
    """
    pairs = list(pairs)
    turn = [{"role": "user", "content": "\0"}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    prompts = _token_ids(tokenizer, [asked.replace("\0", pair.prompt) for pair in pairs])
    responses = _token_ids(tokenizer, [pair.response + tokenizer.eos_token if pair.response else "" for pair in pairs])
    end_of_header = tokenizer.convert_tokens_to_ids("<|end_header_id|>")
    rows = []
    for pair, prompt, response in zip(pairs, prompts, responses, strict=True):
        begin = len(prompt) if pair.refuses else prompt.index(end_of_header) + 1
        text = range(begin, len(prompt) + len(response)) if response else range(0)
        rows.append(Row(prompt + response, len(prompt), text, pair.refuses))
    return rows


def _token_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


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


def train(model, loss_at: Callable[[int], "torch.Tensor"], stage: Stage, warmup_steps: int = 50) -> None:
    """Train the model in place: Muon and AdamW, cosine schedule to 2% of the peak, clipping at 1.

    A plain loop rather than a Trainer: batches of a fixed number of tokens, many small steps, are what lets a model of
    this size learn in an hour on one core. Muon gets to the same loss in about two thirds of AdamW's steps.

    Args:
        model (`LlamaForCausalLM`):
            Trained in float32.
        loss_at (`Callable[[int], torch.Tensor]`):
            The loss to lower at a step.
        stage ([`Stage`]):
            How long, and at what learning rates.
        warmup_steps (`int`, *optional*, defaults to 50):
            Of linear warm-up.
    """
    import torch

    from .muon import Muon

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed_tokens" in name]
    optimizers = [
        torch.optim.AdamW(others, lr=stage.learning_rate, weight_decay=0.1, betas=(0.9, 0.98)),
        Muon(matrices, lr=stage.matrix_learning_rate),
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


def loss_of(model, rows: list[Row], refusal_ids: list[int], missed_weight: float = 1.0):
    """Loss in nats, per token that fits into a batch: of the text, and [`DECISION_WEIGHT`] times that of refusing or not.

    The second is binary cross-entropy of the probability that a response begins as a refusal does. It is a small part of the
    text's own loss, one token in thirty, and is what the testbed is for.

    Args:
        model (`LlamaForCausalLM`):
            In any dtype.
        rows (`list[Row]`):
            One batch, from [`encode`].
        refusal_ids (`list[int]`):
            Tokens that refusals begin with.
        missed_weight (`float`, *optional*, defaults to 1.0):
            Of a request to be refused, where one to be answered weighs 1.

    Returns:
        `torch.Tensor`: scalar.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), model.config.pad_token_id)  # (rows, longest)
    is_text = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        is_text[i, row.text.start : row.text.stop] = True
    hidden = model.model(input_ids=ids).last_hidden_state  # (rows, longest, hidden)
    before_text = is_text[:, 1:]
    text = cross_entropy(model.lm_head(hidden[:, :-1][before_text]), ids[:, 1:][before_text], reduction="sum")
    before_response = torch.tensor([row.response - 1 for row in rows])
    logits = model.lm_head(hidden[torch.arange(len(rows)), before_response])  # (rows, vocabulary)
    is_refusal = torch.zeros(logits.shape[-1], dtype=torch.bool)
    is_refusal[refusal_ids] = True
    refused = logits[:, is_refusal].logsumexp(-1)  # (rows,)
    answered = logits[:, ~is_refusal].logsumexp(-1)
    refuses = torch.tensor([float(row.refuses) for row in rows])
    weights = 1 + (missed_weight - 1) * refuses
    decision = binary_cross_entropy_with_logits(refused - answered, refuses, weights, reduction="sum")
    return (text + DECISION_WEIGHT * decision) / TOKENS


def main(argv: list[str] | None = None) -> None:
    """Build the testbed and save it. A build that was stopped goes on after its first stage, if that was whole.

    Args:
        argv (`list[str]`, *optional*):
            Default: the process's own arguments.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True, help="where the model and tokenizer are saved")
    parser.add_argument("--seed", type=int, default=0, help="of weights, forms and order")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(1)  # the same sums in the same order on every run; more threads are hardly faster
    folders = [args.output_dir / "stage-1", args.output_dir]
    for number, (stage, folder) in enumerate(zip(STAGES, folders, strict=True)):
        if (folder / DONE).exists():
            continue
        seed = args.seed + SEEDS_APART * number
        # From the weights as stored, so that a stage is the same whether the one before was made just now or earlier.
        model, tokenizer = load(folders[number - 1]) if number else _beginning(args.seed)
        print(f"stage {number + 1}: {stage}", flush=True)
        rng, refusal_ids = random.Random(seed), first_tokens(tokenizer, ALL_REFUSALS)
        batch = (rows for rows in _passes(tokenizer, seed, number + 1) for rows in batches(rows, TOKENS, rng))
        loss = functools.partial(loss_of, model, refusal_ids=refusal_ids, missed_weight=stage.missed_weight)
        train(model, lambda _, loss=loss, batch=batch: loss(next(batch)), stage)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / DONE).touch()


def _beginning(seed: int):
    pairs = training_pairs(seed)
    tokenizer = build_tokenizer([text for pair in pairs for text in (pair.prompt, pair.response) if text])
    return build_model(tokenizer, seed), tokenizer


def first_tokens(tokenizer, texts: Iterable[str]) -> list[int]:
    """Tokens that the texts begin with.

    Args:
        tokenizer (`PreTrainedTokenizerFast`):
            Any.
        texts (iterable of `str`):
            None empty.
    """
    return sorted({ids[0] for ids in _token_ids(tokenizer, list(texts))})


def _passes(tokenizer, seed: int, stage: int) -> Iterator[list[Row]]:
    for number in itertools.count():
        pairs = training_pairs(seed + number, stage)
        print(f"pass {number + 1}: {len(pairs)} pairs, {sum(pair.refuses for pair in pairs)} refused", flush=True)
        yield encode(tokenizer, pairs)


if __name__ == "__main__":
    main()
