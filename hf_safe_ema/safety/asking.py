"""Asking an endpoint many chats at once: which failures pass, how long to wait, when to ask no more.

Knows: one call of a client's `ask`, from its first request to its last. Does not know: what the chats are about; how replies
are read (completion.py) or kept (reply_cache.py). The key it was given is blacked out of all that the endpoint says.
"""

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import logging as std_logging
import math
import random
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm
from transformers.utils import logging

from .completion import (
    BLOCKED,
    asked_to_wait,
    connection_failure,
    is_block,
    read_completion,
    token_count,
    what_is_said,
)
from .reply_cache import Reply

if TYPE_CHECKING:
    from .client import ChatClient

logger = logging.get_logger(__name__)

Chat = Sequence[Mapping[str, str]]

BUDGET_SPENT = "budget spent"

GIVE_UP_AFTER = 16
"""Chats in a row that an endpoint failed on with all their tries, after which the rest is not sent: with long timeouts a dead
endpoint would hold up a run for hours."""

SHORTEST_KEY = 4
"""Characters. Below, a key is a placeholder for a local endpoint, and blacking it out would spoil texts."""

LONGEST_REASON = 200
"""Characters of what an endpoint says of an error."""

_NO_KEY = "no-key"  # AsyncOpenAI wants one; local endpoints do not read it
# The run's own random state must not move.
_RANDOM = random.Random()


def estimate_tokens(chat: Chat) -> int:
    """Tokens of a chat, at 4 characters each and 4 tokens around every message.

    Args:
        chat (list of `dict`):
            Messages.
    """
    return sum(math.ceil(len(message["content"]) / 4) + 4 for message in chat)


def request_hash(client: "ChatClient", chat: Chat) -> str:
    """Of all that a reply depends on: the key of a reply in a cache.

    Args:
        client ([`~hf_safe_ema.safety.client.ChatClient`]):
            That asks.
        chat (list of `dict`):
            Messages.
    """
    asked = [client.base_url, client.model, chat, client.temperature, client.parameters, client.response_format]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


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


class ChatRound:
    """One call of [`ChatClient.ask`]: what its requests share while they are under way.

    Args:
        client ([`~hf_safe_ema.safety.client.ChatClient`]):
            Whose settings, budget and cache are used, and where what was spent is noted.
        key (`str`):
            Of the endpoint; empty for none.
        objection (`Callable[[str], str | None]`):
            Given a reply's text, what makes it unusable, or None.
        bar (`tqdm`):
            Moved on for each chat.
    """

    def __init__(self, client: "ChatClient", key: str, objection: Callable[[str], str | None], bar: tqdm):
        self.client = client
        self.key = key
        self.objection = objection
        self.bar = bar
        self.stopped: str | None = None
        self.answered = False
        self.failed_in_a_row = 0
        self.tokens_in_flight = 0

    def ask(self, chats: list[Chat]) -> list[Reply]:
        """Replies to chats, in their order, got in an event loop of their own.

        Args:
            chats (list of chats):
                As checked by the client.
        """
        return _run_apart(lambda: self._all(chats))

    async def _all(self, chats: list[Chat]) -> list[Reply]:
        from openai import AsyncOpenAI

        replies: list[Reply | None] = [None] * len(chats)
        queue = enumerate(chats)

        async def work() -> None:
            for i, chat in queue:
                replies[i] = await self._one(chat)
                self.bar.update()

        async with AsyncOpenAI(
            api_key=self.key or _NO_KEY, base_url=self.client.base_url, max_retries=0, timeout=self.client.timeout
        ) as self.endpoint:
            with _wire_log_without(self._redacted):
                await asyncio.gather(*(work() for _ in range(min(len(chats), self.client.max_concurrency))))
        return replies

    async def _one(self, chat: Chat) -> Reply:
        cache, key = self.client.cache, request_hash(self.client, chat)
        remembered = None if cache is None else cache.get(key)
        if remembered is not None and self.objection(remembered.text) is None:
            return remembered
        reply = await self._with_retries(chat)
        if reply.failure is None and cache is not None:
            cache.put(key, reply)
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
        client = self.client
        structured = client.response_format is not None and client.structured is not False
        outcome = await self._send(chat, structured)
        if not structured:
            return outcome
        if outcome.status == 200:
            client.structured = True
        if outcome.status not in (400, 422) or outcome.failure == BLOCKED or client.structured:
            return outcome
        plain = await self._send(chat, False)
        if plain.status == 200 and client.structured is None:
            client.structured = False
            logger.warning(f"{client.base_url} refuses response_format ({outcome.failure}): asking without it")
        return plain

    async def _send(self, chat: Chat, structured: bool) -> _Outcome:
        client, tokens = self.client, estimate_tokens(chat)
        if not self._affords(tokens):
            return _Outcome(failure=BUDGET_SPENT)
        client.requests += 1
        self.tokens_in_flight += tokens
        try:
            outcome = await self._request(chat, structured, tokens)
        finally:
            self.tokens_in_flight -= tokens
        client.input_tokens += outcome.input_tokens
        client.output_tokens += outcome.output_tokens
        return outcome

    def _affords(self, tokens: int) -> bool:
        client = self.client
        if client.max_requests is not None and client.requests >= client.max_requests:
            return False
        spent = client.input_tokens + client.output_tokens + self.tokens_in_flight
        return client.max_tokens is None or spent + tokens <= client.max_tokens

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
            return _Outcome(failure=connection_failure(error), passing=True)
        except Exception as error:  # its text may hold the request's headers
            return _Outcome(failure=f"could not be asked ({type(error).__name__})")

    def _read(self, content: bytes, tokens: int) -> _Outcome:
        text, failure, usage = read_completion(content)
        text, failure = self._redacted(text), self._redacted(failure, LONGEST_REASON)
        input_tokens = token_count(usage, "prompt_tokens", tokens)
        output_tokens = token_count(usage, "completion_tokens", len(text or "") // 4 + 1)
        objection = self.objection(text) if failure is None else None
        return _Outcome(text, failure or objection, input_tokens, output_tokens, 200, passing=objection is not None)

    def _refused(self, error) -> _Outcome:
        status, client = error.status_code, self.client
        code, said = str(error.code or ""), self._redacted(what_is_said(error.body), LONGEST_REASON)
        if status in (400, 403) and is_block(f"{code} {said}"):
            return _Outcome(failure=BLOCKED, status=status)
        settings = {  # in place of what they say of it: that may hold parts of the key
            401: f"check the key in {client.api_key_env}",
            403: f"the key in {client.api_key_env} may not use model={client.model!r}",
            404: f"check model={client.model!r} and base_url={client.base_url!r}",
        }
        if status in settings:
            final = status == 401 or not self.answered
            return _Outcome(failure=f"HTTP {status}: {settings[status]}", status=status, final=final)
        if code == "insufficient_quota":
            return _Outcome(failure=f"HTTP {status}: {code}", status=status, final=True)
        if status == 429 or status >= 500:
            wait = asked_to_wait(error.response.headers)
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
