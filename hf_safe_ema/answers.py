"""Answers of any model to prompts, from memory or from an endpoint, kept in files so that a stop costs nothing.

Knows: how a model is named, loaded and asked, and which answers are there already. Does not know: judges or rates.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from . import testbed
from .history import read_jsonl, write_jsonl
from .safety.check import check_can_render, check_count
from .safety.generation import generate_responses
from .safety.loading import explained, fingerprint, load_model, load_tokenizer
from .safety.prompts import PromptSet

logger = logging.get_logger(__name__)

CHUNK = 64
"""Prompts asked, or answers judged, between two writings of their file."""


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

    Raises:
        ValueError, TypeError: for what nothing can be asked with.
    """

    system_prompt: str | None = None
    max_new_tokens: int = 128
    batch_size: int | str = "auto"
    progress: bool = True

    def __post_init__(self):
        check_count("max_new_tokens", self.max_new_tokens)
        if self.batch_size != "auto":
            check_count("batch_size", self.batch_size, "or 'auto'")
        if self.system_prompt is not None and not isinstance(self.system_prompt, str):
            raise TypeError(f"system_prompt={self.system_prompt!r}: must be text or None")
        if is_broken(self.system_prompt or ""):
            raise ValueError(f"system_prompt={self.system_prompt!r} holds half a surrogate pair, which is no text")


class MemoryModel:
    """A model loaded into this process: a folder, a hub name, an adapter, or the testbed.

    Args:
        name (`str`):
            `"testbed"`, a folder with a model or with a PEFT adapter, or a hub name of either.
        dtype (`str`, *optional*, defaults to `"auto"`):
            To load the weights in.
        device (`str`, *optional*):
            Default: an accelerator if there is one, else the CPU.
        system_prompt (`str`, *optional*):
            That it will be asked with.

    Raises:
        ValueError: if it cannot be loaded or asked.
    """

    client = None

    def __init__(self, name: str, dtype: str = "auto", device: str | None = None, system_prompt: str | None = None):
        if is_broken(name):
            raise ValueError(f"model {name!r}: its name is not UTF-8; rename the folder")
        _check_dtype(dtype)
        _check_device(device)
        self.name, self.dtype, self.device = name, dtype, device
        self._source = str(testbed.MODEL_FOLDER) if name == "testbed" else name
        with self._explained():
            self.tokenizer = load_tokenizer(self._source)
            self.fingerprint = fingerprint(self._source)
        try:
            check_can_render(self.tokenizer, system_prompt)
        except ValueError as error:
            raise ValueError(f"model {name!r} cannot be asked: {error}") from error
        self._model = None

    @property
    def identity(self) -> str:
        """What its answers depend on besides the prompts: its name and files, their precision, its chat template."""
        place = Path(self._source)
        name = str(place.resolve()) if place.exists() else self.name
        return "\n".join([name, self.fingerprint, self.dtype, self.template])

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
        self._model = self._model or self._load(asking.progress)
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

    def _load(self, progress: bool):
        with self._explained():
            model = load_model(self._source, self.dtype, self.device, progress)
            if fingerprint(self._source) != self.fingerprint:
                raise ValueError("its files have changed since the check began; call it again once they are complete")
        return model

    def _explained(self):
        return explained(
            f"model {self.name!r}",
            "Give 'testbed', a folder with a saved model or adapter, a hub name, or an endpoint as http://HOST/v1#MODEL",
        )


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
    """What it is, nobody here knows."""

    def __init__(self, name: str, max_new_tokens: int = 128, client: dict | None = None):
        from .safety.client import ChatClient

        url, _, model = name.partition("#")
        if not model:
            raise ValueError(
                f"model {name.rpartition('@')[2]!r}: an endpoint needs the served model's name: http://127.0.0.1:8000/v1#MODEL"
            )
        self.name = name
        self.client = ChatClient(model, base_url=url, parameters={"max_tokens": max_new_tokens}, **(client or {}))

    @property
    def identity(self) -> str:
        """What its answers depend on besides the prompts, as far as we can know: its address and name."""
        return f"{self.client.base_url}#{self.client.model}"

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
        replies = self.client.ask(chats, description=description)
        answers = [self._text(reply) for reply in replies]
        self._say_what_is_missing(
            [r.failure for r, text in zip(replies, answers, strict=True) if text is None], len(chats)
        )
        return answers

    @staticmethod
    def _text(reply) -> str | None:
        if reply.failure is None:
            return reply.text.strip()
        # It has said nothing, which is an answer; one that was cut off while it still thought is not.
        return "" if reply.failure.startswith("empty reply") and "cut off" not in reply.failure else None

    def _say_what_is_missing(self, failures: list[str], asked: int) -> None:
        if failures:
            said = "; ".join(f"{count} x {failure}" for failure, count in Counter(failures).most_common(3))
            logger.warning(f"{self.name}: no answer to {len(failures)} of {asked} prompts ({said})")

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
    return MemoryModel(name, dtype, device, (asking or Asking()).system_prompt)


def _check_dtype(dtype: str) -> None:
    found = getattr(torch, str(dtype), None)
    if dtype != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: give 'auto', 'float32', 'bfloat16' or 'float16'")


def _check_device(device: str | None) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # of a wrong name; of a PyTorch made without it
        raise ValueError(
            f"device={device!r}: {str(error).splitlines()[0]}; give for example 'cpu' or 'cuda:0'"
        ) from error


def key_of(model, prompts: PromptSet, asking: Asking, ends_early: str) -> str:
    """Name of the file for some answers, different for everything that they depend on.

    Batch size and device are not in it: they change answers by rounding at most.

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
    known = _answers_in(path)
    wanted = dict.fromkeys(prompts.texts)
    for piece in pieces([prompt for prompt in wanted if prompt not in known], model.client):
        piece = [prompt for prompt in piece if prompt not in known]  # another process may have asked meanwhile
        if not piece:
            continue
        description = f"{model.name}, {prompts.name} ({len(known)} of {len(wanted)} done)"
        found = model.answer(piece, asking, decided, description)
        known = _answers_in(path)
        for prompt, text in zip(piece, found, strict=True):
            if text is not None:
                known.setdefault(prompt, text)
        write_jsonl(path, [{"prompt": prompt, "response": text} for prompt, text in known.items()])
    return [known.get(prompt) for prompt in prompts.texts]


def pieces(items: list, client=None) -> Iterator[list]:
    """Some at a time, so that a stop loses little; all at once where a client remembers each reply itself.

    Args:
        items (list):
            To be asked or judged.
        client ([`~hf_safe_ema.safety.client.ChatClient`], *optional*):
            That will be asked.
    """
    cache = getattr(client, "cache", None)
    size = len(items) if cache is not None and cache.works else CHUNK
    for start in range(0, len(items), size or 1):
        yield items[start : start + size]


def is_broken(text: str) -> bool:
    """Whether a text holds half a surrogate pair, as broken JSON and file names do: it could be written nowhere.

    Args:
        text (`str`):
            To check.
    """
    return any("\ud800" <= character <= "\udfff" for character in text)


def read_kept(path: Path, keys: Sequence[str]) -> list[dict]:
    """Rows of a file of ours; an empty list where there is none.

    Args:
        path (`Path`):
            JSON lines.
        keys (list of `str`):
            That each row must have.

    Raises:
        ValueError: for a file that was damaged or changed.
    """
    try:
        rows = read_jsonl(path)
        if all(isinstance(row, dict) and set(keys) <= set(row) for row in rows):
            return rows
        said = f"a row lacks one of {list(keys)}"
    except ValueError as error:  # no JSON, no UTF-8
        said = str(error)
    raise ValueError(f"{path} was damaged or changed ({said}); delete it, and what was in it is asked for again")


def _answers_in(path: Path) -> dict[str, str]:
    return {row["prompt"]: row["response"] for row in read_kept(path, ("prompt", "response"))}
