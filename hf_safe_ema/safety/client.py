"""The client of one OpenAI-compatible endpoint: what it was told, what it may spend, what it has spent.

Knows: which settings can be used, and what chats will cost. Does not know: how they are asked (asking.py), or what a good
reply is; whoever asks says which ones are unusable. Nor does it keep the key: that is read from the environment for each run.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from tqdm.auto import tqdm

from .asking import Chat, ChatRound, estimate_tokens, request_hash
from .reply_cache import Reply, ReplyCache

_DEFAULT_URL = "https://api.openai.com/v1"
_OURS = ("model", "messages", "temperature", "response_format", "stream", "n")


@dataclass(frozen=True)
class CostEstimate:
    """What asking some chats will take, if no try fails.

    Args:
        requests (`int`):
            Chats that have to be sent.
        input_tokens, output_tokens (`int`):
            Of these, at 4 characters a token and with replies of full length.
        cost (`float`, *optional*):
            In the currency of the price; None without a price.
        cached (`int`):
            Chats that are remembered.
    """

    requests: int
    input_tokens: int
    output_tokens: int
    cost: float | None
    cached: int


class ChatClient:
    """Asks chats of one endpoint that speaks OpenAI's chat completions.

    A try that meets a rate limit (429), a server error (5xx), a broken connection or the timeout is made again, after as
    long as the endpoint asks for, or twice as long each time. Other errors are final. What says that no chat would fare
    better (401, an unknown model, a used-up account, [`~hf_safe_ema.safety.asking.GIVE_UP_AFTER`] failures in a row) ends the run: the remaining
    chats fail with the same reason, unsent.

    One client is for one thread at a time; several processes may share its cache.

    Args:
        model (`str`):
            As the endpoint calls it.
        base_url (`str`, *optional*):
            `"http://localhost:8000/v1"`. None: the environment's `OPENAI_BASE_URL`, or OpenAI. The key goes there.
        api_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            NAME of the environment variable that holds the key. It may be unset where `base_url` is given.
        max_concurrency (`int`, *optional*, defaults to 8):
            Requests at a time.
        timeout (`float`, *optional*, defaults to 60.0):
            Seconds for a whole request, however slowly its reply trickles in.
        max_retries (`int`, *optional*, defaults to 3):
            Further tries for a chat, whatever went wrong with the earlier ones.
        max_wait (`float`, *optional*, defaults to 30.0):
            Longest pause before a further try in seconds, whatever the endpoint asks for.
        max_requests (`int`, *optional*):
            In the client's life, every try counted. What does not fit fails with `"budget spent"`. None: no limit.
        max_tokens (`int`, *optional*):
            Input and output together, in the client's life. Exceeded at most by the replies on their way when it is
            reached. None: no limit.
        price_per_million (`tuple[float, float]`, *optional*):
            Of input and output tokens, for `cost` and `estimate`.
        cache (path, *optional*):
            SQLite file of replies, see [`~hf_safe_ema.safety.reply_cache.ReplyCache`]. None: nothing is remembered.
        temperature (`float`, *optional*, defaults to 0.0):
            None: not sent, for models that refuse it.
        parameters (`dict`, *optional*):
            Further fields of the request, such as `{"seed": 0, "max_completion_tokens": 300}`.
        response_format (`dict`, *optional*):
            Structured output as OpenAI's API describes it. Left out for good, and logged, if the endpoint refuses it
            (400, 422) and answers without it.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a bar.

    Attributes:
        requests, input_tokens, output_tokens (`int`):
            What was spent so far.

    Raises:
        ValueError, TypeError: for arguments that no request could be sent with, a missing key, a damaged cache.

    Example:

    ```python
    >>> client = ChatClient("gpt-4o", base_url="http://localhost:8000/v1", price_per_million=(2.5, 10.0))
    >>> client.estimate([[{"role": "user", "content": "How do I boil an egg?"}]], max_reply_tokens=100).requests
    1

    ```
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 8,
        timeout: float = 60.0,
        max_retries: int = 3,
        max_wait: float = 30.0,
        max_requests: int | None = None,
        max_tokens: int | None = None,
        price_per_million: tuple[float, float] | None = None,
        cache: str | os.PathLike | None = None,
        temperature: float | None = 0.0,
        parameters: Mapping | None = None,
        response_format: Mapping | None = None,
        progress: bool = False,
    ):
        if not isinstance(model, str) or not model.strip():
            raise ValueError(f"model={model!r}: give the model's name as the endpoint knows it, such as 'gpt-4o'")
        for name, value, least in (("max_concurrency", max_concurrency, 1), ("max_retries", max_retries, 0)):
            _check_whole(name, value, least)
        for name, value in (("max_requests", max_requests), ("max_tokens", max_tokens)):
            if value is not None:
                _check_whole(name, value, 0)
        _check_number("timeout", timeout, above_zero=True)
        _check_number("max_wait", max_wait)
        if temperature is not None:
            _check_number("temperature", temperature)
        self.model = model
        self.base_url = _checked_url(base_url or os.environ.get("OPENAI_BASE_URL") or _DEFAULT_URL)
        self.needs_key = base_url is None
        self.api_key_env = _checked_variable(api_key_env)
        self.max_concurrency = max_concurrency
        self.timeout = timeout
        self.max_retries = max_retries
        self.max_wait = max_wait
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.price_per_million = _checked_price(price_per_million)
        self.temperature = temperature
        self.parameters = _checked_parameters(parameters)
        self.response_format = response_format
        self.progress = progress
        self.requests = self.input_tokens = self.output_tokens = 0
        self.structured: bool | None = None  # whether the endpoint takes response_format; None: not known yet
        self._key()
        self.cache = None if cache is None else ReplyCache(cache)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self.model!r}, base_url={self.base_url!r})"

    def ask(
        self,
        chats: Sequence[Chat],
        objection: Callable[[str], str | None] | None = None,
        description: str = "chats",
    ) -> list[Reply]:
        """Replies to chats. Nothing that the endpoint does raises.

        Works where an event loop runs already, as in a notebook. Ctrl-C ends it at once.

        Args:
            chats (list of chats):
                Each a list of `{"role": ..., "content": ...}`.
            objection (`Callable[[str], str | None]`, *optional*):
                Given a reply's text, what makes it unusable, or None. Such a reply is asked for again, is not
                remembered, and fails with the objection if no try is left.
            description (`str`, *optional*, defaults to `"chats"`):
                The bar's label.

        Returns:
            `list[Reply]`: one a chat, in their order.

        Raises:
            TypeError: for a chat that is no list of messages.
            ValueError: if the key has gone from the environment since.
        """
        chats = [_checked_chat(chat) for chat in chats]
        if not chats:
            return []
        with tqdm(total=len(chats), desc=description, unit="chat", leave=False, disable=not self.progress) as bar:
            return ChatRound(self, self._key(), objection or (lambda text: None), bar).ask(chats)

    def estimate(self, chats: Sequence[Chat], max_reply_tokens: int) -> CostEstimate:
        """What asking these chats will take, at about 4 characters a token. Nothing is sent.

        Further tries are not in it, nor is the thinking of models that think before they reply; text that is not English
        takes more tokens.

        Args:
            chats (list of chats):
                As for [`ask`].
            max_reply_tokens (`int`):
                Longest reply.

        Returns:
            [`CostEstimate`]
        """
        new = [chat for chat in map(_checked_chat, chats) if not self._remembers(chat)]
        input_tokens, output_tokens = sum(map(estimate_tokens, new)), len(new) * max_reply_tokens
        cost = self._cost(input_tokens, output_tokens)
        return CostEstimate(len(new), input_tokens, output_tokens, cost, cached=len(chats) - len(new))

    def covers(self, estimate: CostEstimate) -> bool:
        """Whether what is left of the budget is enough for an estimate.

        Args:
            estimate ([`CostEstimate`]):
                Of this client.
        """
        tokens = self.input_tokens + self.output_tokens + estimate.input_tokens + estimate.output_tokens
        return (self.max_requests is None or self.requests + estimate.requests <= self.max_requests) and (
            self.max_tokens is None or tokens <= self.max_tokens
        )

    @property
    def cost(self) -> float | None:
        """Of all that was asked so far; None without a price."""
        return self._cost(self.input_tokens, self.output_tokens)

    def _cost(self, input_tokens: int, output_tokens: int) -> float | None:
        if self.price_per_million is None:
            return None
        return (input_tokens * self.price_per_million[0] + output_tokens * self.price_per_million[1]) / 1e6

    def _key(self) -> str:
        key = os.environ.get(self.api_key_env, "").strip()
        if not key and self.needs_key:
            raise ValueError(
                f"no key: the environment variable {self.api_key_env} is not set; set it, name another with api_key_env, or "
                "give base_url for a local endpoint"
            )
        if not re.fullmatch(r"[!-~]*", key):  # it could not be put in a header, and that error would quote it
            raise ValueError(f"the key in {self.api_key_env} has spaces or characters that are not ASCII; set it anew")
        return key

    def _remembers(self, chat: Chat) -> bool:
        return self.cache is not None and self.cache.get(request_hash(self, chat)) is not None


def _check_whole(name: str, value, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be a whole number, at least {least}")


def _check_number(name: str, value, above_zero: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not good or (above_zero and value == 0):
        raise ValueError(f"{name}={value!r}: must be a number {'above' if above_zero else 'not below'} 0")


def _checked_url(url: str) -> str:
    # Not quoted: it may hold a password.
    parts, good = None, False
    with contextlib.suppress(ValueError, AttributeError):  # of a broken host or port, of what is no text
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    if not good:
        raise ValueError(
            "base_url must be an address such as 'http://localhost:8000/v1' or 'https://api.openai.com/v1'"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"base_url for {parts.hostname!r} holds a user name, a password or a query; put the key into an environment "
            "variable and name that with api_key_env"
        )
    return url.rstrip("/")


def _checked_variable(name: str) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        raise ValueError(
            "api_key_env must be the NAME of an environment variable in capitals, such as 'OPENAI_API_KEY' (what was "
            "given is not shown: it may be a key)"
        )
    return name


def _checked_price(price) -> tuple[float, float] | None:
    if price is None:
        return None
    if not isinstance(price, (tuple, list)) or len(price) != 2:
        raise ValueError(f"price_per_million={price!r}: give two numbers, for input and for output tokens")
    for value in price:
        _check_number("price_per_million", value)
    return tuple(price)


def _checked_parameters(parameters: Mapping | None) -> dict:
    parameters = dict(parameters or {})
    if taken := sorted(set(parameters) & set(_OURS)):
        raise ValueError(f"parameters sets {taken}: these have arguments of their own, or are fixed; leave them out")
    try:
        json.dumps(parameters, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"parameters cannot be written as JSON ({error}); use text, numbers, lists and dicts"
        ) from None
    return parameters


def _checked_chat(chat: Chat) -> list[dict[str, str]]:
    try:
        return [{"role": str(message["role"]), "content": message["content"] + ""} for message in chat]
    except (KeyError, TypeError):
        raise TypeError(
            f"a chat is a {type(chat).__name__} that is no list of messages; give [{{'role': 'user', 'content': text}}, ...]"
        ) from None
