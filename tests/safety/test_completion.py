"""What endpoints send back, in good and in bad days."""

import json
import socket
import ssl

import pytest
from chat_server import ChatServer, by_question, completion, says, sends, status
from chats import chat, chats, client_of, environment  # noqa: F401

from hf_safe_ema.safety.asking import ChatRound
from hf_safe_ema.safety.client import ChatClient
from hf_safe_ema.safety.completion import connection_failure


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        (sends("<html>busy</html>"), "broken reply: not JSON"),
        (sends(json.dumps(completion("well"))[:-5]), "broken reply: not JSON"),
        (sends("[" * 100_000), "broken reply: not JSON"),
        (sends(b"\xff\xfe\xff"), "broken reply: not JSON"),
        (sends("[]"), "broken reply: a JSON list"),
        (sends("{}"), "broken reply: no message in it"),
        (sends('{"choices": []}'), "broken reply: no message in it"),
        (sends('{"choices": [null]}'), "broken reply: no message in it"),
        (sends('{"choices": [{"message": "well"}]}'), "broken reply: no message in it"),
        (sends('{"error": {"message": "out of\\nmemory"}}'), "the endpoint reports an error: out of memory"),
        (sends('{"error": "out of memory"}'), "the endpoint reports an error: out of memory"),
        (says([{"type": "text", "text": "well"}]), "broken reply: its content is not text"),
        (says(None), "empty reply"),
        (says(" \n"), "empty reply"),
        (says("", finish_reason="length"), "empty reply (cut off: too few tokens allowed)"),
        (says(None, refusal="I will not judge that."), "model refused"),
        (says("half a", finish_reason="content_filter"), "blocked by the endpoint (content_filter)"),
        (status(400, "filtered", code="content_filter"), "blocked by the endpoint (content_filter)"),
        (status(403, "your input was flagged by moderation"), "blocked by the endpoint (content_filter)"),
        (status(400, "context too\nlong"), "HTTP 400: context too long"),
        (status(400, "long " * 1000), "HTTP 400: " + "long " * 40),
        (status(413), "HTTP 413: no"),
        (lambda exchange: exchange.send("", 422), "HTTP 422"),
        (lambda exchange: exchange.send("a\ud800".encode("utf-8", "surrogatepass"), 409), "HTTP 409: a\ufffd\ufffd\ufffd"),
    ],
)  # fmt: skip
def test_what_does_not_pass_is_not_tried_again_and_harms_no_other(behaviour, failure):
    with ChatServer(by_question(says("well"), bad=behaviour)) as server:
        first, bad, last = client_of(server.url, max_concurrency=1).ask([chat("a"), chat("bad"), chat("c")])
    assert (first.text, first.failure, last.text, last.failure) == ("well", None, "well", None)
    assert (bad.text, bad.failure) == (bad.text if "{" in str(bad.text) else None, failure)
    assert server.count == 3


def test_half_a_surrogate_pair_in_a_reply_becomes_text(tmp_path):
    body = json.dumps(completion("a\ud800b"))
    with ChatServer(sends(body)) as server:
        (reply,) = client_of(server.url, cache=tmp_path / "cache").ask(chats(1))
        assert (reply.text, reply.failure) == ("a?b", None)
        assert client_of(server.url, cache=tmp_path / "cache").ask(chats(1))[0].cached


@pytest.mark.parametrize(
    "usage", [None, "much", {"prompt_tokens": -1}, {"prompt_tokens": True, "completion_tokens": "5"}]
)
def test_tokens_are_estimated_where_they_are_not_told(usage):
    with ChatServer(says("x" * 40, usage=usage)) as server:
        (reply,) = client_of(server.url).ask([chat("y" * 400)])
    assert (reply.input_tokens, reply.output_tokens) == (104, 11)


@pytest.mark.parametrize(
    ("headers", "least", "most"),
    [
        ({"Retry-After": "7"}, 7, 7),
        ({"Retry-After": "0"}, 0, 0),
        ({"Retry-After": "86400"}, 30, 30),
        ({"Retry-After": "9" * 400}, 0.5, 1),
        ({"Retry-After-Ms": "1500", "Retry-After": "7"}, 1.5, 1.5),
        ({"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, 30, 30),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0, 0),
        ({"Retry-After": "soon"}, 0.5, 1),
        ({"Retry-After": "nan"}, 0.5, 1),
        ({"Retry-After": "-5"}, 0.5, 1),
        ({}, 0.5, 1),
    ],
)
def test_it_waits_as_long_as_it_is_asked_to_but_not_for_ever(monkeypatch, headers, least, most):
    pauses = []
    pause = ChatRound._pause
    monkeypatch.setattr(ChatRound, "_pause", lambda *given: pauses.append(pause(*given)) or 0)
    with ChatServer(status(429, headers=headers), says("well")) as server:
        assert ChatClient("model-x", server.url).ask(chats(1))[0].text == "well"
    assert len(pauses) == 1 and least <= pauses[0] <= most


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (ConnectionRefusedError(), "connection refused"),
        (socket.gaierror(), "host not found"),
        (ssl.SSLCertVerificationError(), "no secure connection"),
        (EOFError(), "connection broken"),
    ],
)
def test_why_there_is_no_connection_is_found_behind_the_error(cause, said):
    error = RuntimeError("Connection error.")
    error.__context__ = OSError()
    error.__context__.__cause__ = cause
    assert connection_failure(error) == said
