"""Answers of any model to prompts, from memory or from an endpoint, kept in files so that a stop costs nothing.

Knows: how a model is named, loaded and asked, and which answers are there already. Does not know: judges or rates.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .history import read_jsonl, write_jsonl
from .safety.generation import check_chat_template, generate_responses
from .safety.prompts import PromptSet

CHUNK = 64
"""Prompts asked between two writings of the answers' file."""


@dataclass(frozen=True)
class Asking:
    """How prompts are asked; part of what an answer depends on.

    Args:
        system_prompt (`str`, *optional*):
            Sent before each prompt.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer.
        batch_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Prompts at a time, for models in memory.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show bars.
    """

    system_prompt: str | None = None
    max_new_tokens: int = 128
    batch_size: int | str = "auto"
    progress: bool = True


class MemoryModel:
    """A model loaded into this process: a folder, a hub name, an adapter, or the testbed.

    Args:
        name (`str`):
            `"testbed"`, a folder with a model or with a PEFT adapter, or a hub name of either.
        dtype (`str`, *optional*, defaults to `"auto"`):
            To load the weights in.
        device (`str`, *optional*):
            Default: an accelerator if there is one, else the CPU.

    Raises:
        ValueError: if it cannot be loaded, or its tokenizer has no chat template.
    """

    def __init__(self, name: str, dtype: str = "auto", device: str | None = None):
        self.name, self.dtype, self.device = name, dtype, device
        self.tokenizer = _load(name, self._load_tokenizer)
        check_chat_template(self.tokenizer)
        self._model = None

    @property
    def identity(self) -> str:
        """What its answers depend on besides the prompts: its name and its chat template."""
        name = str(Path(self.name).resolve()) if Path(self.name).exists() else self.name
        return f"{name}\n{self.dtype}\n{self.template}"

    @property
    def template(self) -> str:
        """Fingerprint of the chat template, as reports carry it."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()[:12]

    def answer(
        self, prompts: Sequence[str], asking: Asking, decided: Callable[[str, str], bool] | None, description: str
    ) -> list[str | None]:
        """Greedy answers, in the order of the prompts.

        Args:
            prompts (list of `str`):
                User turns.
            asking ([`Asking`]):
                How.
            decided (`Callable`, *optional*):
                See [`~hf_safe_ema.safety.generation.generate_responses`].
            description (`str`):
                The bar's label.
        """
        self._model = self._model or _load(self.name, self._load_model)
        return generate_responses(
            self._model,
            self.tokenizer,
            prompts,
            system_prompt=asking.system_prompt,
            max_new_tokens=asking.max_new_tokens,
            batch_size=asking.batch_size,
            decided=decided,
            progress=asking.progress,
            description=description,
        )

    def close(self) -> None:
        """Let go of the weights."""
        self._model = None

    def _load_tokenizer(self):
        from transformers import AutoTokenizer

        from . import testbed

        return AutoTokenizer.from_pretrained(testbed.MODEL_FOLDER if self.name == "testbed" else self.name)

    def _load_model(self):
        import torch
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM
        from transformers.utils import find_adapter_config_file

        from . import testbed

        name = testbed.MODEL_FOLDER if self.name == "testbed" else self.name
        kind = AutoModelForCausalLM if find_adapter_config_file(name) is None else AutoPeftModelForCausalLM
        device = self.device or (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        )
        return kind.from_pretrained(name, dtype=self.dtype).to(device).eval()


class EndpointModel:
    """A model served by an OpenAI-compatible endpoint: vLLM, TGI, `transformers serve`, a vendor's.

    Args:
        name (`str`):
            `http(s)://HOST/v1#MODEL`, the model by the name that the endpoint serves it under.
        max_new_tokens (`int`, *optional*, defaults to 128):
            Longest answer.
        client (`dict`, *optional*):
            Further arguments of [`~hf_safe_ema.safety.client.ChatClient`]: `api_key_env`, `timeout`, `max_concurrency`, ...

    Raises:
        ValueError: for an address without a model, or settings that the client does not take.
    """

    template = "of the endpoint"

    def __init__(self, name: str, max_new_tokens: int = 128, client: dict | None = None):
        from .safety.client import ChatClient

        url, _, model = name.partition("#")
        if not model:
            raise ValueError(
                f"model {name!r}: an endpoint needs the served model's name: http://127.0.0.1:8000/v1#MODEL"
            )
        self.name = name
        self.client = ChatClient(model, base_url=url, parameters={"max_tokens": max_new_tokens}, **(client or {}))

    @property
    def identity(self) -> str:
        """What its answers depend on besides the prompts, as far as we can know: its address and name."""
        return self.name

    def answer(
        self, prompts: Sequence[str], asking: Asking, decided: Callable[[str, str], bool] | None, description: str
    ) -> list[str | None]:
        """Answers at temperature 0, in the order of the prompts; None where the endpoint gave none.

        Args:
            prompts (list of `str`):
                User turns.
            asking ([`Asking`]):
                How.
            decided (`Callable`, *optional*):
                Not used: an endpoint is not stopped early.
            description (`str`):
                The bar's label.
        """
        system = [{"role": "system", "content": asking.system_prompt}] if asking.system_prompt is not None else []
        chats = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
        self.client.progress = asking.progress
        return [self._text(reply) for reply in self.client.ask(chats, description=description)]

    @staticmethod
    def _text(reply) -> str | None:
        if reply.failure == "empty reply":
            return ""
        return None if reply.failure else reply.text.strip()

    def close(self) -> None:
        """Nothing to let go of."""


def open_model(
    name: str, asking: Asking | None = None, dtype: str = "auto", device: str | None = None, client: dict | None = None
):
    """A model by its name, ready to be asked; weights are loaded with the first question.

    Args:
        name (`str`):
            `"testbed"`, a folder or hub name of a model or a PEFT adapter, or an endpoint as `http(s)://HOST/v1#MODEL`.
        asking ([`Asking`], *optional*):
            How it will be asked.
        dtype, device:
            As for [`MemoryModel`].
        client (`dict`, *optional*):
            As for [`EndpointModel`].

    Returns:
        [`MemoryModel`] or [`EndpointModel`]

    Raises:
        ValueError: if there is no such model, or it cannot be asked.
    """
    if re.match(r"https?://", name):
        return EndpointModel(name, (asking or Asking()).max_new_tokens, client)
    return MemoryModel(name, dtype, device)


def _load(name: str, load: Callable):
    try:
        return load()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {name!r} could not be loaded: {error}. Give 'testbed', a folder with a saved model or adapter, a hub name, "
            "or an endpoint as http://HOST/v1#MODEL"
        ) from error


def key_of(model, prompts: PromptSet, asking: Asking, ends_early: str) -> str:
    """Name of the file for some answers, different for everything that they depend on.

    Args:
        model ([`MemoryModel`] or [`EndpointModel`]):
            Who is asked.
        prompts ([`PromptSet`]):
            What.
        asking ([`Asking`]):
            How.
        ends_early (`str`):
            Which judge, if any, ends answers early: `""` for none.
    """
    depends_on = [model.identity, prompts.fingerprint, asking.system_prompt, asking.max_new_tokens, ends_early]
    digest = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", f"{Path(model.name).name or model.name}-{prompts.name}")[:80]
    return f"{readable}-{digest}"


def collect_answers(
    model,
    prompts: PromptSet,
    asking: Asking,
    folder: str | os.PathLike,
    decided: Callable[[str, str], bool] | None = None,
    ends_early: str = "",
) -> list[str | None]:
    """Answers to all prompts: those from the folder's file, and the rest asked and added to it, some at a time.

    Args:
        model ([`MemoryModel`] or [`EndpointModel`]):
            Who is asked.
        prompts ([`PromptSet`]):
            What.
        asking ([`Asking`]):
            How.
        folder (path):
            Of the answers' files.
        decided (`Callable`, *optional*):
            Whether an answer's beginning settles its verdict.
        ends_early (`str`, *optional*, defaults to `""`):
            Name of the judge that says so.

    Returns:
        `list[str | None]`: in the order of the prompts; None where an endpoint gave no answer, which is asked again next time.
    """
    path = Path(folder) / f"{key_of(model, prompts, asking, ends_early)}.jsonl"
    rows = read_jsonl(path)
    known = {row["prompt"]: row["response"] for row in rows}
    missing = [prompt for prompt in dict.fromkeys(prompts.texts) if prompt not in known]
    for chunk in _chunks(missing, CHUNK):
        description = f"{model.name}, {prompts.name} ({len(known)} of {len(prompts)} done)"
        found = model.answer(chunk, asking, decided, description)
        known.update({p: text for p, text in zip(chunk, found, strict=True) if text is not None})
        write_jsonl(path, [{"prompt": prompt, "response": text} for prompt, text in known.items()])
    return [known.get(prompt) for prompt in prompts.texts]


def _chunks(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
