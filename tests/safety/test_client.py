"""The client of a chat endpoint, against a real one on loopback that does all that endpoints do."""

import asyncio
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest
from chat_server import (
    ChatServer,
    answers,
    breaks_off,
    by_question,
    completion,
    echoes_key,
    hangs,
    hangs_up,
    hesitates,
    says,
    sends,
    status,
    trickles,
    unless_structured,
    unused_url,
)

from hf_safe_ema.safety import client as client_module
from hf_safe_ema.safety.client import GIVE_UP_AFTER, ChatClient, CostEstimate, Reply, ReplyCache

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


def test_replies_come_in_order_with_what_they_took():
    with ChatServer(answers(str.upper)) as server:
        client = client_of(server.url)
        replies = client.ask(chats(20))
    assert replies == [Reply(f"QUESTION {i}", None, 10, 5) for i in range(20)]
    assert (client.requests, client.input_tokens, client.output_tokens) == (20, 200, 100)
    assert set(server.keys) == {KEY}


def test_what_is_sent():
    with ChatServer(says("well")) as server:
        client_of(server.url, parameters={"seed": 7}, response_format=FORMAT, temperature=0.5).ask(chats(1))
        client_of(server.url, temperature=None).ask([[{"role": "system", "content": "Be brief."}, *chat("Hi")]])
    first, second = server.requests
    assert first == {"model": "model-x", "messages": chat("question 0"), "seed": 7, "temperature": 0.5,
                     "response_format": FORMAT}  # fmt: skip
    assert second == {"model": "model-x", "messages": [{"role": "system", "content": "Be brief."}, *chat("Hi")]}


def test_nothing_to_ask():
    assert client_of(unused_url()).ask([]) == []


def test_a_slow_reply_is_a_reply():
    with ChatServer(hesitates) as server:
        assert client_of(server.url).ask(chats(1))[0].text == "slow but well"


@pytest.mark.parametrize("behaviour", [*map(status, (429, 500, 503, 529)), hangs_up, breaks_off])
def test_what_passes_is_tried_again(behaviour):
    with ChatServer(behaviour, says("well")) as server:
        (reply,) = client_of(server.url).ask(chats(1))
    assert (reply.text, reply.failure, server.count) == ("well", None, 2)


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        (status(429), "HTTP 429"),
        (status(500), "HTTP 500"),
        (sends(b""), None),
        (hangs_up, "connection broken"),
        (breaks_off, "connection broken"),
    ],
)
@pytest.mark.parametrize("max_retries", [0, 3])
def test_tries_end(behaviour, failure, max_retries):
    tries = f" after {max_retries + 1} tries" if max_retries else ""
    with ChatServer(behaviour) as server:
        (reply,) = came_back(lambda: client_of(server.url, max_retries=max_retries).ask(chats(1)))
    assert reply.failure == (f"{failure}{tries}" if failure else "broken reply: not JSON")
    assert server.count == (max_retries + 1 if failure else 1)


@pytest.mark.parametrize("behaviour", [hangs, trickles])
def test_the_timeout_is_for_the_whole_request(behaviour):
    with ChatServer(behaviour) as server:
        client = client_of(server.url, timeout=0.5, max_retries=1)
        replies = came_back(lambda: client.ask(chats(2)))
        assert failures(replies) == ["timeout after 2 tries"] * 2
        assert server.count == 4


def test_a_server_that_is_not_there():
    client = client_of(unused_url(), max_retries=1)
    assert failures(came_back(lambda: client.ask(chats(2)))) == ["connection refused after 2 tries"] * 2


def test_one_timeout_does_not_hold_up_the_others():
    with ChatServer(by_question(says("well"), slow=hangs)) as server:
        client = client_of(server.url, timeout=2.0, max_retries=0, max_concurrency=2)
        replies = came_back(lambda: client.ask([chat("slow"), *chats(5)]))
    assert failures(replies) == ["timeout", None, None, None, None, None]


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
    pause = client_module._Asking._pause
    monkeypatch.setattr(client_module._Asking, "_pause", lambda *given: pauses.append(pause(*given)) or 0)
    with ChatServer(status(429, headers=headers), says("well")) as server:
        assert ChatClient("model-x", server.url).ask(chats(1))[0].text == "well"
    assert len(pauses) == 1 and least <= pauses[0] <= most


def test_pauses_double(monkeypatch):
    pauses = []
    pause = client_module._Asking._pause
    monkeypatch.setattr(client_module._Asking, "_pause", lambda *given: pauses.append(pause(*given)) or 0)
    with ChatServer(status(500)) as server:
        ChatClient("model-x", server.url, max_retries=7).ask(chats(1))
    assert all(0.5 * 2**i <= pause <= min(2**i, 30) for i, pause in enumerate(pauses[:6]))
    assert pauses[6] == 30


def test_a_huge_retry_after_is_capped_in_truth():
    with ChatServer(status(429, headers={"Retry-After": "86400"})) as server:
        replies = came_back(lambda: client_of(server.url).ask(chats(3)))
    assert failures(replies) == ["HTTP 429 after 4 tries"] * 3


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


def test_half_a_surrogate_pair_in_a_question_is_a_failure_of_one():
    with ChatServer(says("well")) as server:
        bad, good = client_of(server.url, max_concurrency=1).ask([chat("a\ud800b"), chat("c")])
    assert bad.text is None and bad.failure.startswith("could not be asked (")
    assert good.text == "well"


def test_a_reply_that_is_objected_to_is_asked_for_again(tmp_path):
    def objection(text):
        return None if text == "well" else f"not well: {text}"

    with ChatServer(says("bad"), says("worse"), says("well")) as server:
        client = client_of(server.url, cache=tmp_path / "cache")
        assert client.ask(chats(1), objection) == [Reply("well", None, 30, 15)]
        assert server.count == 3
    with ChatServer(says("bad")) as server:
        (reply,) = client_of(server.url, max_retries=2, cache=tmp_path / "cache").ask(chats(1), objection)
        assert (reply.text, reply.failure, server.count) == ("bad", "not well: bad after 3 tries", 3)
        # It was not remembered, and would not be taken from there if it had been.
        assert client_of(server.url, cache=tmp_path / "cache").ask(chats(1)) == [Reply("bad", None, 10, 5)]
        client_of(server.url, max_retries=0, cache=tmp_path / "cache").ask(chats(1), objection)
        assert server.count == 5


@pytest.mark.parametrize(
    ("behaviour", "failure"),
    [
        (status(401), "HTTP 401: check the key in OPENAI_API_KEY"),
        (status(403), "HTTP 403: the key in OPENAI_API_KEY may not use model='model-x'"),
        (status(404), "HTTP 404: check model='model-x' and base_url='{url}'"),
        (status(429, code="insufficient_quota"), "HTTP 429: insufficient_quota"),
    ],
)
@pytest.mark.parametrize("max_concurrency", [1, 4])
def test_where_no_chat_would_fare_better_the_rest_is_not_sent(behaviour, failure, max_concurrency, caplog):
    with ChatServer(behaviour) as server:
        replies = client_of(server.url, max_concurrency=max_concurrency).ask(chats(30))
    assert failures(replies) == [failure.format(url=server.url)] * 30
    assert server.count <= max_concurrency
    assert caplog.text.count("is not sent") == 1


def test_after_a_good_reply_a_403_is_of_one_chat_and_a_401_of_all():
    with ChatServer(by_question(says("well"), bad=status(403))) as server:
        replies = client_of(server.url, max_concurrency=1).ask([chat("a"), chat("bad"), chat("c")])
    assert [reply.text for reply in replies] == ["well", None, "well"]
    with ChatServer(by_question(says("well"), bad=status(401))) as server:
        replies = client_of(server.url, max_concurrency=1).ask([chat("a"), chat("bad"), chat("c")])
    assert [reply.text for reply in replies] == ["well", None, None]
    assert server.count == 2


def test_a_stop_is_for_one_call():
    with ChatServer(status(401), says("well")) as server:
        client = client_of(server.url, max_concurrency=1)
        assert None not in failures(client.ask(chats(3)))
        assert failures(client.ask(chats(3))) == [None] * 3


@pytest.mark.parametrize("code", [500, 429, 418])
def test_a_dead_endpoint_is_given_up(code):
    with ChatServer(status(code, "")) as server:
        replies = client_of(server.url, max_retries=0, max_concurrency=1).ask(chats(50))
    assert failures(replies) == [f"HTTP {code}"] * GIVE_UP_AFTER + [f"HTTP {code}; given up"] * (50 - GIVE_UP_AFTER)
    assert server.count == GIVE_UP_AFTER


@pytest.mark.parametrize("behaviour", [status(400, code="content_filter"), says(None, refusal="no"), says("")])
def test_an_endpoint_that_will_not_speak_of_it_is_not_given_up(behaviour):
    with ChatServer(behaviour) as server:
        client_of(server.url, max_retries=0, max_concurrency=1).ask(chats(GIVE_UP_AFTER + 5))
    assert server.count == GIVE_UP_AFTER + 5


def test_a_flaky_endpoint_is_not_given_up():
    with ChatServer(by_question(status(500), **{"question 9": says("well"), "19": says("well")})) as server:
        replies = client_of(server.url, max_retries=0, max_concurrency=1).ask(chats(34))
    assert server.count == 34
    assert failures(replies).count(None) == 2


@pytest.mark.parametrize("code", [400, 422])
def test_without_structured_output_it_is_asked_plainly(code, caplog):
    with ChatServer(unless_structured(says("well"), code)) as server:
        client = client_of(server.url, response_format=FORMAT, max_retries=0)
        assert failures(client.ask(chats(10))) == [None] * 10
        assert caplog.text.count("refuses response_format") == 1
        sent = server.count
        assert failures(client.ask(chats(10))) == [None] * 10
    assert server.count == sent + 10
    assert not any("response_format" in asked for asked in server.requests[sent:])


def test_a_bad_request_is_not_blamed_on_structured_output():
    with ChatServer(by_question(says("well"), bad=status(400, "too long"))) as server:
        client = client_of(server.url, response_format=FORMAT, max_concurrency=1)
        bad, good, again = client.ask([chat("bad"), chat("good"), chat("bad too")])
    assert [bad.failure, good.failure, again.failure] == ["HTTP 400: too long", None, "HTTP 400: too long"]
    assert ["response_format" in asked for asked in server.requests] == [True, False, True, True]


@pytest.mark.parametrize("code", [200, 400, 401, 403, 404, 429, 500])
def test_a_key_that_the_endpoint_repeats_is_nowhere(code, tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with ChatServer(echoes_key(code)) as server:
        client = client_of(server.url, cache=tmp_path / "cache.sqlite", max_retries=1)
        replies = client.ask(chats(3))
    assert server.keys[0] == KEY
    shown = [repr(replies), repr(client), str(vars(client)), caplog.text, *capsys.readouterr()]
    shown += [path.read_bytes().decode("latin1") for path in tmp_path.iterdir()]
    assert not [text for text in shown if "0123456789abcdef" in text]
    assert (replies[0].failure is None) == (code == 200)
    assert code != 200 or replies[0].text == "your key is [key]"


def test_a_local_endpoint_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OTHER_KEY", f" {KEY}\n")
    with ChatServer(says("well")) as server:
        assert client_of(server.url).ask(chats(1))[0].text == "well"
        assert client_of(server.url, api_key_env="OTHER_KEY").ask(chats(1))[0].text == "well"
    assert server.keys == ["no-key", KEY]


def test_without_an_address_it_is_the_one_of_the_environment(monkeypatch):
    with ChatServer(says("well")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert ChatClient("model-x").ask(chats(1))[0].text == "well"
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert ChatClient("model-x").base_url == "https://api.openai.com/v1"


def test_a_second_run_over_a_cache_sends_nothing(tmp_path):
    path = tmp_path / "new" / "cache.sqlite"
    with ChatServer(answers(str.upper)) as server:
        first = client_of(server.url, cache=path).ask(chats(10))
        client = client_of(server.url, cache=path)
        second = client.ask(chats(10))
    assert server.count == 10 and client.requests == client.input_tokens == 0
    assert second == [Reply(reply.text, None, 10, 5, cached=True) for reply in first]
    assert b"question" not in path.read_bytes()  # what was asked is there as a hash only


@pytest.mark.parametrize(
    "other",
    [
        {"model": "model-y"},
        {"temperature": 1.0},
        {"parameters": {"seed": 1}},
        {"response_format": FORMAT},
    ],
    ids=str,
)
def test_what_makes_another_reply_is_asked_anew(tmp_path, other):
    with ChatServer(says("well")) as server:
        options = {"model": "model-x", "cache": tmp_path / "cache"}
        ChatClient(base_url=server.url, **options).ask(chats(1))
        ChatClient(base_url=server.url + "/", **{**options, "timeout": 5.0, "max_concurrency": 2}).ask(chats(1))
        assert server.count == 1
        ChatClient(base_url=server.url, **{**options, **other}).ask(chats(1))
        ChatClient(base_url=server.url, **options).ask([[{"role": "system", "content": "question 0"}]])
    assert server.count == 3


def test_an_endpoint_without_structured_output_is_remembered_too(tmp_path):
    with ChatServer(unless_structured(says("well"))) as server:
        for _ in range(2):
            client_of(server.url, cache=tmp_path / "cache", response_format=FORMAT).ask(chats(1))
    assert server.count == 2  # with, and without


@pytest.mark.parametrize("behaviour", [status(500), says(""), says(None, refusal="no"), sends("{}")])
def test_failures_are_not_remembered(tmp_path, behaviour):
    with ChatServer(behaviour, says("well")) as server:
        client_of(server.url, cache=tmp_path / "cache", max_retries=0).ask(chats(1))
        assert client_of(server.url, cache=tmp_path / "cache").ask(chats(1)) == [Reply("well", None, 10, 5)]


WRITE = """
import sys
from hf_safe_ema.safety.client import Reply, ReplyCache
cache = ReplyCache(sys.argv[1])
for i in range(60):
    cache.put(f"{sys.argv[2]}-{i}", Reply("text", None, 1, 1))
    assert cache.get(f"{sys.argv[2]}-{i}").text == "text"
assert cache.works
"""


def test_several_processes_share_a_cache(tmp_path):
    path = tmp_path / "cache.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITE, str(path), str(i)]) for i in range(2)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    cache = ReplyCache(path)
    assert all(cache.get(f"{i}-{j}") for i in range(2) for j in range(60))


def other_database(path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE replies (question TEXT)")


def cut_off(path) -> None:
    cache = ReplyCache(path)
    for i in range(200):
        cache.put(str(i), Reply("text" * 500, None, 1, 1))
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize("damage", [lambda path: path.write_text("no database " * 100), other_database, cut_off])
def test_a_cache_that_is_none_is_said_to_be(tmp_path, damage):
    path = tmp_path / "cache.sqlite"
    damage(path)
    with pytest.raises(ValueError, match=r"cache='.*cache\.sqlite' is not a cache of replies, or it is damaged"):
        client_of("http://localhost/v1", cache=path)


def test_a_folder_is_no_cache(tmp_path):
    with pytest.raises(ValueError, match="is a folder; give the path of a file"):
        client_of("http://localhost/v1", cache=tmp_path)


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with ChatServer(says("well")) as server:
        client = client_of(server.url, cache=tmp_path / "file" / "cache.sqlite")
        assert failures(client.ask(chats(5)) + client.ask(chats(5))) == [None] * 10
    assert server.count == 10
    assert caplog.text.count("cannot be used") == 1


def test_a_cache_that_is_held_by_another_is_done_without(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(client_module, "LOCK_TIMEOUT", 0.01)
    path = tmp_path / "cache.sqlite"
    with ChatServer(says("well")) as server:
        client = client_of(server.url, cache=path)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        assert failures(client.ask(chats(5))) == [None] * 5
        holder.close()
    assert caplog.text.count("cannot be used (database is locked)") == 1


def test_the_budget_of_requests_is_for_life():
    with ChatServer(says("well")) as server:
        client = client_of(server.url, max_requests=5)
        assert failures(client.ask(chats(3))) == [None] * 3
        assert sorted(failures(client.ask(chats(10))), key=str) == [None] * 2 + ["budget spent"] * 8
        assert failures(client.ask(chats(2))) == ["budget spent"] * 2
    assert server.count == client.requests == 5


def test_each_try_is_a_request():
    with ChatServer(status(500)) as server:
        replies = client_of(server.url, max_requests=6, max_concurrency=1).ask(chats(3))
    assert failures(replies) == ["HTTP 500 after 4 tries", "budget spent after HTTP 500", "budget spent"]
    assert server.count == 6


def test_the_budget_of_tokens():
    with ChatServer(says("well")) as server:  # 15 tokens each, of which a question is estimated at 7
        client = client_of(server.url, max_tokens=40, max_concurrency=1)
        assert failures(client.ask(chats(5))) == [None] * 3 + ["budget spent"] * 2
        assert client.input_tokens + client.output_tokens == 45
    with ChatServer(says("well")) as server:
        client_of(server.url, max_tokens=0).ask(chats(5))
    assert server.count == 0


def test_requests_under_way_are_in_the_budget_of_tokens():
    with ChatServer(says("well")) as server:
        client_of(server.url, max_tokens=22, max_concurrency=8).ask(chats(8))
    assert server.count == 3


@pytest.mark.parametrize(
    "usage", [None, "much", {"prompt_tokens": -1}, {"prompt_tokens": True, "completion_tokens": "5"}]
)
def test_tokens_are_estimated_where_they_are_not_told(usage):
    with ChatServer(says("x" * 40, usage=usage)) as server:
        (reply,) = client_of(server.url).ask([chat("y" * 400)])
    assert (reply.input_tokens, reply.output_tokens) == (104, 11)


def test_the_estimate(tmp_path):
    with ChatServer(says("well")) as server:
        client = client_of(server.url, cache=tmp_path / "cache", price_per_million=(2.0, 10.0), max_requests=12,
                           max_tokens=3000)  # fmt: skip
        client.ask(chats(2))
        estimate = client.estimate([*chats(4), chat("x" * 4000)], max_reply_tokens=100)
        assert server.count == 2
    assert estimate == CostEstimate(3, 7 + 7 + 1004, 300, (1018 * 2 + 300 * 10) / 1e6, 2)
    assert client.cost == (20 * 2 + 10 * 10) / 1e6
    assert client.covers(estimate)
    assert not client.covers(CostEstimate(11, 0, 0, None, 0))
    assert not client.covers(CostEstimate(1, 2900, 100, None, 0))
    assert client_of(server.url).estimate(chats(1), 1).cost is client_of(server.url).cost is None


def test_no_more_requests_at_once_than_allowed():
    def crowd(exchange):
        """Held until one too many has come, or none has in all the time there was."""
        server = exchange.state
        server.wait_for(lambda: server.count >= 3)
        if server.count == 3:
            server.wait_for(lambda: server.count > 3, timeout=0.3)
        says("well")(exchange)

    with ChatServer(crowd) as server:
        client_of(server.url, max_concurrency=3).ask(chats(12))
    assert (server.count, server.max_at_once) == (12, 3)


def test_it_works_where_a_loop_is_running():
    async def cell():
        return client_of(server.url).ask(chats(3))

    with ChatServer(says("well")) as server:
        assert failures(asyncio.run(cell())) == [None] * 3


def test_the_random_state_of_the_run_does_not_move():
    before = random.getstate()
    with ChatServer(status(500), says("well")) as server:
        client_of(server.url).ask(chats(1))
    assert random.getstate() == before


ASK = """
import sys
from hf_safe_ema.safety.client import ChatClient
client = ChatClient("model-x", sys.argv[1], timeout=1000, max_concurrency=2)
client.ask([[{"role": "user", "content": "a"}]] * 5)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interrupt_ends_it():
    with ChatServer(hangs) as server:
        asking = subprocess.Popen([sys.executable, "-c", ASK, server.url], stderr=subprocess.PIPE, text=True)
        assert server.wait_for(lambda: server.count == 2)
        asking.send_signal(signal.SIGINT)
        _, error = asking.communicate(timeout=30)
    assert asking.returncode != 0 and error.strip().endswith("KeyboardInterrupt")
    assert "0123456789abcdef" not in error
    assert server.count == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": ""}, r"model='': give the model's name"),
        ({"max_concurrency": 0}, "max_concurrency=0: must be a whole number, at least 1"),
        ({"max_concurrency": True}, "max_concurrency=True"),
        ({"max_retries": -1}, "max_retries=-1: must be a whole number, at least 0"),
        ({"max_requests": 1.5}, "max_requests=1.5"),
        ({"max_tokens": "many"}, "max_tokens='many'"),
        ({"timeout": 0}, "timeout=0: must be a number above 0"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"max_wait": -1}, "max_wait=-1: must be a number not below 0"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"price_per_million": 5}, "price_per_million=5: give two numbers"),
        ({"price_per_million": (1, -1)}, "price_per_million=-1"),
        ({"parameters": {"stream": True}}, r"parameters sets \['stream'\]"),
        ({"parameters": {"bias": {1, 2}}}, "cannot be written as JSON"),
        ({"base_url": "localhost:8000"}, "base_url must be an address such as"),
        ({"base_url": "http://localhost:80000/v1"}, "base_url must be an address such as"),
    ],
)
def test_what_no_request_could_be_sent_with_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ChatClient(**{"model": "model-x", "base_url": "http://localhost/v1", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"api_key_env": KEY}, "NAME of an environment variable"),
        ({"api_key_env": "sk_0123456789abcdef"}, "NAME of an environment variable"),
        ({"base_url": "https://me:0123456789abcdef@example.org/v1"}, "'example.org' holds a user name, a password"),
        ({"base_url": "https://example.org/v1?key=0123456789abcdef"}, "'example.org' holds .* a query"),
        ({"base_url": None, "api_key_env": "UNSET_KEY"}, "UNSET_KEY is not set; set it, name another"),
        ({"api_key_env": "BAD_KEY"}, "the key in BAD_KEY has spaces or characters that are not ASCII"),
    ],
)
def test_what_is_said_of_a_bad_key_does_not_hold_it(options, message, monkeypatch):
    monkeypatch.setenv("BAD_KEY", "0123456789abcdef\nü")
    with pytest.raises(ValueError, match=message) as caught:
        ChatClient(**{"model": "model-x", "base_url": "http://localhost/v1", **options})
    assert "0123456789abcdef" not in str(caught.value)


@pytest.mark.parametrize("bad", ["hello", [{"role": "user"}], [{"role": "user", "content": None}], 5, [5]], ids=str)
def test_what_is_no_chat_is_refused(bad):
    with pytest.raises(TypeError, match="no list of messages"):
        client_of("http://localhost/v1").ask([bad])
