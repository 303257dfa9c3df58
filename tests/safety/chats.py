"""Chats and clients for tests of whoever asks an endpoint.

Knows: how a client is made here, with pauses that no test waits for. Does not know: the endpoint (chat_server.py).
"""

import threading

import pytest

from hf_safe_ema.safety.client import ChatClient
from hf_safe_ema.safety.reply_cache import Reply

KEY = 'sk-test-"0123456789abcdef'  # with a sign that JSON writes otherwise
FORMAT = {"type": "json_object"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def chat(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chats(count: int) -> list[list[dict]]:
    return [chat(f"question {i}") for i in range(count)]


def client_of(url: str, **options) -> ChatClient:
    return ChatClient("model-x", url, **{"max_wait": 0.01, "timeout": 30.0, **options})


def came_back(function):
    """Its result; a failure of the test if it does not come."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "still waiting after a minute"
    return results[0]


def failures(replies: list[Reply]) -> list[str | None]:
    return [reply.failure for reply in replies]
