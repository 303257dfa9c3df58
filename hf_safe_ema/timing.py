"""How long a safety check will take on this machine: measured where that is quick, estimated where it is not.

Knows: how to time a few answers, and what decides the speed of generation. Does not know: when checks are due.
"""

import time
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .engine import precision_of
from .memory import PROMPT_TOKENS, Memory, available_memory, load_config
from .recipe import Recipe
from .safety.check import SafetyCheck
from .safety.generation import FIRST_BATCH_SIZE

PATIENCE = 60.0
"""Seconds that a dry run may take to measure; what would take longer is estimated."""

_SAMPLE = 8
"""Prompts of each set that are measured where a whole check would take too long."""

_LAYER_SECONDS = 0.001
"""What a decoder layer takes for one token at least, whatever its size: PyTorch has to start its operations."""


@dataclass(frozen=True)
class CheckTime:
    """How long one check of one set of weights takes.

    Args:
        seconds (`float`):
            That long.
        how (`str`):
            Whether that is measured or estimated, and on what.
    """

    seconds: float
    how: str


def time_of_check(recipe: Recipe, memory: Memory, tokenizer: PreTrainedTokenizerBase) -> CheckTime:
    """Time a check of the base weights, or a part of it; estimate it where the weights are not at hand or too slow.

    Args:
        recipe ([`Recipe`]):
            Of the run.
        memory ([`Memory`]):
            Of the run.
        tokenizer (`PreTrainedTokenizerBase`):
            The run's.
    """
    training, check = recipe.training, recipe.training.build_check(progress=False)
    total = _prompts(check)
    estimated = _estimated_seconds(recipe, memory, check)
    sample = min(total, _SAMPLE * (1 + (check.benign is not None)))
    reason = _why_not_measured(recipe, memory, estimated.seconds * sample / total)
    if reason is not None:
        return CheckTime(estimated.seconds, f"{estimated.how}; {reason}")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            recipe.model_path,
            revision=recipe.model.model_revision,
            trust_remote_code=training.trust_remote_code,
            dtype=recipe.model.dtype,
            local_files_only=True,
        ).to(training.device)
    except OSError:
        return CheckTime(estimated.seconds, f"{estimated.how}; the weights are not on this disk")
    with precision_of(training, model):
        part = _sample(recipe, 1)
        part.run(model, tokenizer)  # the first answer takes longer than those after it
        part = _sample(recipe, _SAMPLE)
        seconds = _timed(lambda: part.run(model, tokenizer)) * total / _prompts(part)
        if _prompts(part) < total and seconds > PATIENCE:
            how = f"measured on {_prompts(part)} prompts; more of them together usually go faster"
            return CheckTime(seconds, how)
        seconds = _timed(lambda: check.run(model, tokenizer))
    return CheckTime(seconds, "measured: one whole check of the base weights; weights that refuse less answer longer")


def _why_not_measured(recipe: Recipe, memory: Memory, seconds: float) -> str | None:
    free, weights = available_memory(recipe.training.device), _weight_bytes(memory)
    if recipe.model.load_in_4bit or recipe.model.load_in_8bit:
        return "quantised weights are not loaded to measure"
    if seconds > PATIENCE:
        return f"measuring {_SAMPLE} prompts of each kind would take {seconds:.0f} s"
    if free is not None and 1.2 * weights > free:
        return "the weights do not fit into memory here"
    return None


def _weight_bytes(memory: Memory) -> int:
    return next(item.size for item in memory.items if item.name == "weights")


def _sample(recipe: Recipe, count: int) -> SafetyCheck:
    check = recipe.training.build_check(progress=False)
    check.harmful = check.harmful.sample(min(count, len(check.harmful)))
    check.benign = check.benign and check.benign.sample(min(count, len(check.benign)))
    return check


def _prompts(check: SafetyCheck) -> int:
    return len(check.harmful) + (0 if check.benign is None else len(check.benign))


def _timed(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _estimated_seconds(recipe: Recipe, memory: Memory, check: SafetyCheck) -> CheckTime:
    """From this device's speed: each new token reads all weights once, and multiplies by them once for each prompt."""
    training = recipe.training
    dtype = torch.bfloat16 if training.bf16 or recipe.model.dtype == "bfloat16" else torch.float32
    flops, bandwidth = _speed(training.device, dtype)
    layers = getattr(load_config(recipe).get_text_config(), "num_hidden_layers", 32)
    size = FIRST_BATCH_SIZE if training.safety_batch_size == "auto" else training.safety_batch_size
    weights, seconds = _weight_bytes(memory), 0.0
    for prompts in (check.harmful, check.benign or []):
        for start in range(0, len(prompts), size):
            batch = min(size, len(prompts) - start)
            multiply = 2 * memory.total_params * batch / flops
            a_token = max(weights / bandwidth, multiply, layers * _LAYER_SECONDS)
            seconds += PROMPT_TOKENS * multiply + training.safety_max_new_tokens * a_token
    how = (
        f"estimated from what this device can do ({flops / 1e12:.2g} TFLOP/s, {bandwidth / 1e9:.0f} GB/s), with every "
        "answer as long as it may be"
    )
    return CheckTime(seconds, how)


def _speed(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a matrix product and bytes/s of a copy, each the best of a few."""
    side = 4096 if device.type == "cuda" else 512
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    block = torch.ones(2**28 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)

    def best(call) -> float:
        def waited():
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return min(_timed(waited) for _ in range(5))

    return 2 * side**3 / best(lambda: matrix @ matrix), 2 * block.numel() / best(block.clone)
