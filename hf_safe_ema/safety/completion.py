"""What an OpenAI-compatible endpoint sent back, in our words: a text, or in a few words why there is none.

Knows: the body of a chat completion, and the bodies, headers and exceptions that come in its place. Does not know: what was
asked, or whether to ask again.
"""

import email.utils
import json
import math
import re
import socket
import ssl
import time
from collections.abc import Mapping

BLOCKED = "blocked by the endpoint (content_filter)"

_BLOCK = re.compile(r"(?i)content.?(filter|polic|management)|moderation|flagged")


def read_completion(content: bytes) -> tuple[str | None, str | None, dict]:
    """Text, failure and usage in the body of a reply with status 200; one of the first two is None.

    Args:
        content (`bytes`):
            Anything.

    Returns:
        `tuple[str | None, str | None, dict]`

    Example:

    ```python
    >>> read_completion(b'{"choices": [{"message": {"content": "Boil it."}}], "usage": {"prompt_tokens": 9}}')
    ('Boil it.', None, {'prompt_tokens': 9})
    >>> read_completion(b"<html>busy</html>")
    (None, 'broken reply: not JSON', {})

    ```
    """
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None, "broken reply: not JSON", {}
    if not isinstance(body, dict):
        return None, f"broken reply: a JSON {type(body).__name__}", {}
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    if body.get("error") and not body.get("choices"):
        said = what_is_said(body["error"])
        return None, BLOCKED if is_block(said) else f"the endpoint reports an error: {said}", usage
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


def is_block(said: str) -> bool:
    """Whether an endpoint's words mean that a filter of its own has stopped the chat.

    Args:
        said (`str`):
            Code and message of an error.
    """
    return _BLOCK.search(said) is not None


def what_is_said(error) -> str:
    """What an error's body says, in one line.

    Args:
        error:
            Any JSON value.
    """
    said = (error.get("message") or error.get("detail")) if isinstance(error, dict) else error
    said = said if isinstance(said, str) else json.dumps(said) if said else ""
    return re.sub(r"[\s\x00-\x1f\x7f]+", " ", said).strip()


def token_count(usage: dict, name: str, otherwise: int) -> int:
    """A number of tokens as the endpoint counted them.

    Args:
        usage (`dict`):
            As the endpoint sent it.
        name (`str`):
            Key in it.
        otherwise (`int`):
            Where there is no such number, or none that can be.
    """
    count = usage.get(name)
    return count if type(count) is int and 0 <= count < 2**40 else otherwise


def connection_failure(error: BaseException | None) -> str:
    """Why no connection came about, going by an exception and those behind it.

    Args:
        error (`BaseException`, *optional*):
            As raised.
    """
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return "connection refused"
        if isinstance(error, socket.gaierror):
            return "host not found"
        if isinstance(error, ssl.SSLError):
            return "no secure connection"
        error = error.__cause__ or error.__context__
    return "connection broken"


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds in `retry-after-ms` or `retry-after` (a number or a date); None if there is no sense in them.

    Args:
        headers (`Mapping[str, str]`):
            Of a reply; in lower case, unless the mapping does not mind.

    Example:

    ```python
    >>> asked_to_wait({"retry-after": "7"}), asked_to_wait({"retry-after": "soon"})
    (7.0, None)

    ```
    """
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
