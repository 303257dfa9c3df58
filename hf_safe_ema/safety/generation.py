"""From prompts to responses, by greedy generation from a model in memory.

Knows: chat templates, batching, ending a sequence early, leaving model, tokenizer and random state as they were.
Does not know: what a response means; it asks a function whether a beginning is already decided.
"""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging

logger = logging.get_logger(__name__)

FIRST_BATCH_SIZE = 64
"""Where `batch_size="auto"` starts; halved whenever memory runs out."""

# Decoding the beginnings costs time too, so whether they are decided is asked once in so many tokens.
_TOKENS_BETWEEN_QUESTIONS = 4


@contextlib.contextmanager
def preserved_state(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> Iterator[None]:
    """Within the block the model is in eval mode; after it everything that generation touches is as it was.

    That is: train or eval mode of every submodule, `use_cache`, gradient checkpointing, the tokenizer's padding, and
    the random state of Python, NumPy and PyTorch (all devices), so that training goes on as if nothing had happened.

    Args:
        model (`torch.nn.Module`):
            Put into eval mode for the time.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Whose padding side, truncation side and pad token are put back.
    """
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    settings = ("padding_side", "truncation_side", "pad_token")
    kept = {} if tokenizer is None else {name: getattr(tokenizer, name) for name in settings}
    # Calling a fast tokenizer with padding leaves that padding in it, and save_pretrained would write it down.
    backend = getattr(tokenizer, "backend_tokenizer", None)
    padding, truncation = (backend.padding, backend.truncation) if backend is not None else (None, None)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = {parameter.device for parameter in model.parameters()}
    cuda_devices = [device.index for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda_devices):
        try:
            model.eval()
            if config is not None and use_cache is not None:
                config.use_cache = True
            yield
        finally:
            for module, training in modes:
                module.training = training
            if config is not None and use_cache is not None:
                config.use_cache = use_cache
            for name, value in kept.items():
                if getattr(tokenizer, name) != value:
                    setattr(tokenizer, name, value)
            if backend is not None:
                backend.no_padding() if padding is None else backend.enable_padding(**padding)
                backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class _EndDecided(StoppingCriteria):
    """Ends each sequence whose verdict can no longer change."""

    def __init__(self, tokenizer, indices: Sequence[int], prompt_length: int, decided: Callable[[int, str], bool]):
        self.tokenizer, self.indices, self.prompt_length, self.decided = tokenizer, indices, prompt_length, decided
        self.done = [False] * len(indices)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        generated = input_ids[:, self.prompt_length :]  # (batch, tokens so far)
        if generated.shape[1] % _TOKENS_BETWEEN_QUESTIONS == 0:
            waiting = [i for i, done in enumerate(self.done) if not done]
            texts = self.tokenizer.batch_decode(generated[waiting], skip_special_tokens=True)
            for i, text in zip(waiting, texts, strict=True):
                self.done[i] = self.decided(self.indices[i], text)
        return torch.tensor(self.done, device=input_ids.device)


def render_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str | None = None) -> str:
    """The text that the model is given: the chat template around one user turn, ready for the assistant's.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            With a chat template.
        prompt (`str`):
            The user's turn.
        system_prompt (`str`, *optional*):
            The system turn before it. None: none is sent (the template may put its own).

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    check_chat_template(tokenizer)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt is not None else []
    messages.append({"role": "user", "content": prompt})
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise unless the tokenizer can render a chat.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            To check.

    Raises:
        ValueError: if there is none, or it has no chat template.
    """
    if tokenizer is None:
        raise ValueError(
            "no tokenizer: the safety check has to build prompts; pass processing_class=tokenizer to the Trainer"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            f"the tokenizer {getattr(tokenizer, 'name_or_path', '')!r} has no chat template, so a chat model's "
            "refusals cannot be asked for; set tokenizer.chat_template, or use the -Instruct/-chat version of the "
            "model, or pass check=None to average without checking"
        )


def _generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int):
    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) | {tokenizer.eos_token_id}
    ends = sorted(end for end in ends if end is not None)
    # Every sampling field is spelled out: generate() fills what is unset from the model's own generation config.
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=getattr(own, "bos_token_id", None),
        use_cache=True,
    )


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    system_prompt: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int | str = "auto",
    decided: Callable[[str, str], bool] | None = None,
    progress: bool = True,
    description: str = "safety check",
) -> list[str]:
    """Greedy responses to prompts, through the tokenizer's chat template.

    Args:
        model (`PreTrainedModel`):
            A causal LM (or a PEFT model of one), in memory.
        tokenizer (`PreTrainedTokenizerBase`):
            Its tokenizer, with a chat template.
        prompts (list of `str`):
            User turns.
        system_prompt (`str`, *optional*):
            System turn put before each.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Longest response, in tokens.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Prompts at a time. `"auto"` starts at 64 and halves when memory runs out.
        decided (`Callable[[str, str], bool]`, *optional*):
            Given a prompt and the beginning of its response, whether the rest cannot matter any more: that response
            then ends there.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a bar.
        description (`str`, *optional*, defaults to `"safety check"`):
            The bar's label.

    Returns:
        `list[str]`: in the order of the prompts, without special tokens, stripped.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    rendered = [render_prompt(tokenizer, prompt, system_prompt) for prompt in prompts]
    return complete(
        model,
        tokenizer,
        rendered,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        decided=None if decided is None else lambda i, beginning: decided(prompts[i], beginning),
        progress=progress,
        description=description,
    )


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int | str = "auto",
    decided: Callable[[int, str], bool] | None = None,
    progress: bool = True,
    description: str = "generation",
) -> list[str]:
    """Greedy continuations of texts, as they are: no template is put around them and no special token before.

    Args:
        model, tokenizer, max_new_tokens, batch_size, progress, description:
            As for [`generate_responses`].
        texts (list of `str`):
            What the model is given.
        decided (`Callable[[int, str], bool]`, *optional*):
            Given the index of a text and the beginning of its continuation, whether the rest cannot matter any more.

    Returns:
        `list[str]`: in the order of the texts, without special tokens, stripped.
    """
    continuations: list[str | None] = [None] * len(texts)
    size = FIRST_BATCH_SIZE if batch_size == "auto" else batch_size
    with (
        preserved_state(model, tokenizer),
        tqdm(total=len(texts), desc=description, unit="prompt", leave=False, disable=not progress) as bar,
    ):
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Like lengths together: less padding.
        order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), i))
        start = 0
        while start < len(order):
            chosen = order[start : start + size]
            try:
                found = _complete_batch(model, tokenizer, {i: texts[i] for i in chosen}, max_new_tokens, decided)
            except torch.OutOfMemoryError:
                if batch_size != "auto" or size == 1:
                    raise
                size //= 2
                logger.warning(f"out of memory in the safety check: going on with {size} prompts at a time")
                torch.cuda.empty_cache()
                continue
            for i, text in zip(chosen, found, strict=True):
                continuations[i] = text
            start += len(chosen)
            bar.update(len(chosen))
    return continuations


def _complete_batch(model, tokenizer, texts: dict[int, str], max_new_tokens: int, decided) -> list[str]:
    inputs = tokenizer(list(texts.values()), return_tensors="pt", padding=True, add_special_tokens=False).to(
        model.device
    )
    length = inputs["input_ids"].shape[1]
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        generation_config=_generation_config(model, tokenizer, max_new_tokens),
        stopping_criteria=[_EndDecided(tokenizer, list(texts), length, decided)] if decided else None,
    )
    return [text.strip() for text in tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)]
