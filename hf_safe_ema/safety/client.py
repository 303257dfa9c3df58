"""Asking many chats of one OpenAI-compatible endpoint: several at a time, within a budget, each only once.

Knows: which failures pass and which do not, how to wait, what a reply costs, and how to remember it.
Does not know: what the chats are about, or what a good reply is; whoever asks says which ones are unusable. Nor does it
keep the key: that is read from the environment for each run, and blacked out of whatever the endpoint says.
"""

import asyncio
import concurrent.futures
import contextlib
import email.utils
import hashlib
import json
import logging as std_logging
import math
import os
import random
import re
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm.auto import tqdm
from transformers.utils import logging

logger = logging.get_logger(__name__)

Chat = Sequence[Mapping[str, str]]

BUDGET_SPENT = "budget spent"
BLOCKED = "blocked by the endpoint (content_filter)"

GIVE_UP_AFTER = 16
"""Chats in a row that an endpoint failed on with all their tries, after which the rest is not sent: with long timeouts a dead
endpoint would hold up a run for hours."""

LOCK_TIMEOUT = 5.0
"""Seconds that a write to the cache waits for another process."""

SHORTEST_KEY = 4
"""Characters. Below, a key is a placeholder for a local endpoint, and blacking it out would spoil texts."""

LONGEST_REASON = 200
"""Characters of what an endpoint says of an error."""

_NO_KEY = "no-key"  # AsyncOpenAI wants one; local endpoints do not read it
_DEFAULT_URL = "https://api.openai.com/v1"
_OURS = ("model", "messages", "temperature", "response_format", "stream", "n")
_BLOCK = re.compile(r"(?i)content.?(filter|polic|management)|moderation|flagged")
# The run's own random state must not move.
_RANDOM = random.Random()


@dataclass(frozen=True)
class Reply:
    """What came of one chat.

    Args:
        text (`str`, *optional*):
            As the endpoint gave it; None if it gave none.
        failure (`str`, *optional*):
            None, or in a few words why there is no usable text.
        input_tokens, output_tokens (`int`, *optional*, defaults to 0):
            Of all tries together: the endpoint's count, or ours (4 characters a token) where it gives none.
        cached (`bool`, *optional*, defaults to `False`):
            Whether it was remembered; the tokens are then those of the time when it was asked.
    """

    text: str | None = None
    failure: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cached: bool = False


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


class ReplyCache:
    """Replies in an SQLite file, by the hash of what was asked: neither requests nor keys are in it.

    Several processes may use one file. If it cannot be used, be it from the start or later, that is logged once and nothing
    more is remembered.

    Args:
        path (path):
            Made if missing, with its folder.

    Raises:
        ValueError: for a file that is something else, or damaged.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.works = True
        if self.path.is_dir():
            raise ValueError(f"cache={str(path)!r} is a folder; give the path of a file, such as 'judge.sqlite'")
        with self._logged_once():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open_first()

    def get(self, key: str) -> Reply | None:
        """The reply under a key, or None.

        Args:
            key (`str`):
                A hash.
        """
        rows = []
        with self._logged_once():
            if self.works:
                rows = self._execute("SELECT text, input_tokens, output_tokens FROM replies WHERE key = ?", (key,))
        return Reply(rows[0][0], None, rows[0][1], rows[0][2], cached=True) if rows else None

    def put(self, key: str, reply: Reply) -> None:
        """Remember a reply.

        Args:
            key (`str`):
                A hash.
            reply ([`Reply`]):
                One without a failure.
        """
        with self._logged_once():
            if self.works:
                row = (key, reply.text, reply.input_tokens, reply.output_tokens)
                self._execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)

    def _open_first(self) -> None:
        try:
            self._execute(
                "CREATE TABLE IF NOT EXISTS replies "
                "(key TEXT PRIMARY KEY, text TEXT, input_tokens INTEGER, output_tokens INTEGER)"
            )
            self._execute("SELECT text, input_tokens, output_tokens FROM replies LIMIT 1")
            damage = self._execute("PRAGMA quick_check(1)")[0][0]
        except sqlite3.DatabaseError as error:
            # Of the operational errors (locked, no access), only this one says what the file is.
            if isinstance(error, sqlite3.OperationalError) and "no such column" not in str(error):
                raise
            damage = str(error)
        if damage != "ok":
            raise ValueError(
                f"cache={str(self.path)!r} is not a cache of replies, or it is damaged ({damage}); delete it, or give another path"
            )

    def _execute(self, statement: str, values: tuple = ()) -> list[tuple]:
        # A connection each: they may not cross threads, and must not cross a fork.
        with contextlib.closing(sqlite3.connect(self.path, timeout=LOCK_TIMEOUT)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _logged_once(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            self.works = False
            logger.warning(f"cache={str(self.path)!r} cannot be used ({error}): going on without it")


class ChatClient:
    """Asks chats of one endpoint that speaks OpenAI's chat completions.

    A try that meets a rate limit (429), a server error (5xx), a broken connection or the timeout is made again, after as
    long as the endpoint asks for, or twice as long each time. Other errors are final. What says that no chat would fare
    better (401, an unknown model, a used-up account, [`GIVE_UP_AFTER`] failures in a row) ends the run: the remaining
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
            SQLite file of replies, see [`ReplyCache`]. None: nothing is remembered.
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
        self.tokens_in_flight = 0
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
            asking = _Asking(self, objection or (lambda text: None), bar)
            return _run_apart(lambda: asking.all(chats))

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
        new = [chat for chat in map(_checked_chat, chats) if self._remembered(self._hash(chat)) is None]
        input_tokens, output_tokens = sum(map(_estimate_tokens, new)), len(new) * max_reply_tokens
        return CostEstimate(len(new), input_tokens, output_tokens, self._cost(input_tokens, output_tokens),
                            len(chats) - len(new))  # fmt: skip

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

    def _hash(self, chat: Chat) -> str:
        asked = [self.base_url, self.model, chat, self.temperature, self.parameters, self.response_format]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _remembered(self, key: str) -> Reply | None:
        return None if self.cache is None else self.cache.get(key)

    def _affords(self, tokens: int) -> bool:
        if self.max_requests is not None and self.requests >= self.max_requests:
            return False
        spent = self.input_tokens + self.output_tokens + self.tokens_in_flight
        return self.max_tokens is None or spent + tokens <= self.max_tokens


@dataclass(frozen=True)
class _Outcome:
    """Of one request. `passing`: another try may fare better. `final`: no chat would."""

    text: str | None = None
    failure: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    status: int | None = None
    passing: bool = False
    final: bool = False
    wait: float | None = None


class _Asking:
    """One call of [`ChatClient.ask`]: what its requests share while they are under way."""

    def __init__(self, client: ChatClient, objection: Callable[[str], str | None], bar: tqdm):
        self.client = client
        self.objection = objection
        self.bar = bar
        self.stopped: str | None = None
        self.answered = False
        self.failed_in_a_row = 0

    async def all(self, chats: list[Chat]) -> list[Reply]:
        from openai import AsyncOpenAI

        replies: list[Reply | None] = [None] * len(chats)
        queue = enumerate(chats)
        self.key = self.client._key()

        async def work() -> None:
            for i, chat in queue:
                replies[i] = await self.one(chat)
                self.bar.update()

        async with AsyncOpenAI(
            api_key=self.key or _NO_KEY, base_url=self.client.base_url, max_retries=0, timeout=self.client.timeout
        ) as self.endpoint:
            with _wire_log_without(self._redacted):
                await asyncio.gather(*(work() for _ in range(min(len(chats), self.client.max_concurrency))))
        return replies

    async def one(self, chat: Chat) -> Reply:
        key = self.client._hash(chat)
        remembered = self.client._remembered(key)
        if remembered is not None and self.objection(remembered.text) is None:
            return remembered
        reply = await self._with_retries(chat)
        if reply.failure is None and self.client.cache is not None:
            self.client.cache.put(key, reply)
        return reply

    async def _with_retries(self, chat: Chat) -> Reply:
        input_tokens = output_tokens = 0
        failure = None
        for number in range(1, self.client.max_retries + 2):
            if self.stopped is not None:
                return Reply(None, self.stopped, input_tokens, output_tokens)
            outcome = await self._try(chat)
            input_tokens += outcome.input_tokens
            output_tokens += outcome.output_tokens
            if outcome.failure == BUDGET_SPENT and failure is not None:
                failure = f"{BUDGET_SPENT} after {failure}"
                break
            failure = outcome.failure
            if not outcome.passing or number > self.client.max_retries:
                failure = f"{failure} after {number} tries" if failure and number > 1 else failure
                break
            await asyncio.sleep(self._pause(number, outcome))
        self._note(outcome, failure)
        return Reply(outcome.text, failure, input_tokens, output_tokens)

    def _pause(self, number: int, outcome: _Outcome) -> float:
        if outcome.status == 200:  # it answers, only not as it should
            return 0.0
        backoff = 0.5 * 2 ** (number - 1) * (1 + _RANDOM.random())
        return min(self.client.max_wait, backoff if outcome.wait is None else outcome.wait)

    def _note(self, outcome: _Outcome, failure: str | None) -> None:
        """Whether to go on with the other chats."""
        if outcome.status == 200:
            self.answered, self.failed_in_a_row = True, 0
        elif outcome.failure not in (BLOCKED, BUDGET_SPENT):  # these are of the chat, and of us
            self.failed_in_a_row += 1
        given_up = self.failed_in_a_row >= GIVE_UP_AFTER
        if self.stopped is None and (given_up or outcome.final):
            self.stopped = f"{failure}; given up" if given_up else failure
            logger.warning(f"{self.client.base_url}: {self.stopped}; what has not been asked yet is not sent")

    async def _try(self, chat: Chat) -> _Outcome:
        """One request, or two where structured output may be what the endpoint does not take."""
        structured = self.client.response_format is not None and self.client.structured is not False
        outcome = await self._send(chat, structured)
        if structured and outcome.status == 200:
            self.client.structured = True
        if structured and outcome.status in (400, 422) and outcome.failure != BLOCKED and not self.client.structured:
            plain = await self._send(chat, False)
            if plain.status == 200 and self.client.structured is None:
                self.client.structured = False
                logger.warning(
                    f"{self.client.base_url} refuses response_format ({outcome.failure}): asking without it"
                )
            return plain
        return outcome

    async def _send(self, chat: Chat, structured: bool) -> _Outcome:
        client, tokens = self.client, _estimate_tokens(chat)
        if not client._affords(tokens):
            return _Outcome(failure=BUDGET_SPENT)
        client.requests += 1
        client.tokens_in_flight += tokens
        try:
            outcome = await self._request(chat, structured, tokens)
        finally:
            client.tokens_in_flight -= tokens
        client.input_tokens += outcome.input_tokens
        client.output_tokens += outcome.output_tokens
        return outcome

    async def _request(self, chat: Chat, structured: bool, tokens: int) -> _Outcome:
        import openai

        body = dict(self.client.parameters)
        if self.client.temperature is not None:
            body["temperature"] = self.client.temperature
        if structured:
            body["response_format"] = self.client.response_format
        create = self.endpoint.chat.completions.with_raw_response.create
        try:
            # The timeout that openai takes starts anew with each byte that comes.
            response = await asyncio.wait_for(
                create(model=self.client.model, messages=chat, extra_body=body), self.client.timeout
            )
            return self._read(response.content, tokens)
        except (asyncio.TimeoutError, openai.APITimeoutError):
            return _Outcome(failure="timeout", input_tokens=tokens, passing=True)
        except openai.APIStatusError as error:
            return self._refused(error)
        except openai.APIConnectionError as error:
            return _Outcome(failure=_connection_failure(error), passing=True)
        except Exception as error:  # its text may hold the request's headers
            return _Outcome(failure=f"could not be asked ({type(error).__name__})")

    def _read(self, content: bytes, tokens: int) -> _Outcome:
        text, failure, usage = _read_completion(content)
        text, failure = self._redacted(text), self._redacted(failure, LONGEST_REASON)
        input_tokens = _count(usage, "prompt_tokens", tokens)
        output_tokens = _count(usage, "completion_tokens", len(text or "") // 4 + 1)
        if failure is None:
            failure = self.objection(text)
            return _Outcome(text, failure, input_tokens, output_tokens, 200, passing=failure is not None)
        return _Outcome(text, failure, input_tokens, output_tokens, 200)

    def _refused(self, error) -> _Outcome:
        status, client = error.status_code, self.client
        code, said = str(error.code or ""), self._redacted(_said(error.body), LONGEST_REASON)
        if status in (400, 403) and _BLOCK.search(f"{code} {said}"):
            return _Outcome(failure=BLOCKED, status=status)
        if status == 401:  # what they say of it may hold parts of the key
            return _Outcome(failure=f"HTTP 401: check the key in {client.api_key_env}", status=status, final=True)
        if status == 403:
            failure = f"HTTP 403: the key in {client.api_key_env} may not use model={client.model!r}"
            return _Outcome(failure=failure, status=status, final=not self.answered)
        if status == 404:
            failure = f"HTTP 404: check model={client.model!r} and base_url={client.base_url!r}"
            return _Outcome(failure=failure, status=status, final=not self.answered)
        if code == "insufficient_quota":
            return _Outcome(failure=f"HTTP {status}: {code}", status=status, final=True)
        if status == 429 or status >= 500:
            wait = _asked_to_wait(error.response.headers)
            return _Outcome(failure=f"HTTP {status}", status=status, passing=True, wait=wait)
        return _Outcome(failure=f"HTTP {status}: {said}" if said else f"HTTP {status}", status=status)

    def _redacted(self, text: str | None, length: int | None = None) -> str | None:
        if text is None:
            return None
        if len(self.key) >= SHORTEST_KEY:
            for spelling in (self.key, json.dumps(self.key)[1:-1]):
                text = text.replace(spelling, "[key]")
        return text.encode("utf-8", "replace").decode()[:length]  # half a surrogate pair cannot be written anywhere


@contextlib.contextmanager
def _wire_log_without(redacted: Callable[[str], str]) -> Iterator[None]:
    """At level DEBUG, httpcore logs the headers of replies, in which an endpoint may repeat the key."""

    def redact(record) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True

    names = [f"{package}.{part}" for package in ("httpcore", "httpcore2") for part in ("http11", "http2", "proxy")]
    try:
        for name in names:
            std_logging.getLogger(name).addFilter(redact)
        yield
    finally:
        for name in names:
            std_logging.getLogger(name).removeFilter(redact)


def _run_apart(make: Callable[[], Awaitable]):
    """Result of a coroutine, run in an event loop and thread of its own; an exception here (Ctrl-C) cancels it."""
    outcome: concurrent.futures.Future = concurrent.futures.Future()
    running = {}

    async def run():
        running["loop"], running["task"] = asyncio.get_running_loop(), asyncio.current_task()
        return await make()

    def work() -> None:
        try:
            outcome.set_result(asyncio.run(run()))
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="chat-client", daemon=True)
    thread.start()
    try:
        # In pieces: on Windows, a wait without an end cannot be interrupted.
        while not concurrent.futures.wait([outcome], timeout=0.5).done:
            pass
    except BaseException:
        with contextlib.suppress(KeyError, RuntimeError):  # not begun yet, over already
            running["loop"].call_soon_threadsafe(running["task"].cancel)
        thread.join(timeout=5)
        raise
    return outcome.result()


def _read_completion(content: bytes) -> tuple[str | None, str | None, dict]:
    """Text, failure and usage in the body of a reply with status 200."""
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None, "broken reply: not JSON", {}
    if not isinstance(body, dict):
        return None, f"broken reply: a JSON {type(body).__name__}", {}
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    if body.get("error") and not body.get("choices"):
        said = _said(body["error"])
        return None, BLOCKED if _BLOCK.search(said) else f"the endpoint reports an error: {said}", usage
    try:
        choice = body["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None, "broken reply: no message in it", usage
    if finish == "content_filter":
        return None, BLOCKED, usage
    if refusal:
        return None, "model refused", usage
    if text is not None and not isinstance(text, str):
        return None, "broken reply: its content is not text", usage
    if not (text or "").strip():
        return None, "empty reply" + (" (cut off: too few tokens allowed)" if finish == "length" else ""), usage
    return text, None, usage


def _said(error) -> str:
    """What an error's body says, in one line."""
    said = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    said = said if isinstance(said, str) else json.dumps(said) if said else ""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", said).strip()


def _count(usage: dict, name: str, otherwise: int) -> int:
    count = usage.get(name)
    return count if type(count) is int and 0 <= count < 2**40 else otherwise


def _estimate_tokens(chat: Chat) -> int:
    return sum(math.ceil(len(message["content"]) / 4) + 4 for message in chat)


def _connection_failure(error: BaseException | None) -> str:
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return "connection refused"
        if isinstance(error, socket.gaierror):
            return "host not found"
        if isinstance(error, ssl.SSLError):
            return "no secure connection"
        error = error.__cause__ or error.__context__
    return "connection broken"


def _asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds in `retry-after-ms` or `retry-after` (a number or a date); None if there is no sense in them."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif re.fullmatch(r"[\d.]+", headers.get("retry-after", "").strip()):
            seconds = float(headers["retry-after"])
        else:
            seconds = email.utils.parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
    except (KeyError, ValueError, TypeError, OverflowError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


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
