"""Asking a real endpoint on loopback that does all that endpoints do."""

import asyncio
import logging
import os
import random
import signal
import subprocess
import sys

import pytest
from chat_server import (
    ChatServer,
    breaks_off,
    by_question,
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
from chats import FORMAT, KEY, came_back, chat, chats, client_of, environment, failures  # noqa: F401

from hf_safe_ema.safety.asking import GIVE_UP_AFTER, ChatRound
from hf_safe_ema.safety.client import ChatClient
from hf_safe_ema.safety.reply_cache import Reply


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


def test_pauses_double(monkeypatch):
    pauses = []
    pause = ChatRound._pause
    monkeypatch.setattr(ChatRound, "_pause", lambda *given: pauses.append(pause(*given)) or 0)
    with ChatServer(status(500)) as server:
        ChatClient("model-x", server.url, max_retries=7).ask(chats(1))
    assert all(0.5 * 2**i <= pause <= min(2**i, 30) for i, pause in enumerate(pauses[:6]))
    assert pauses[6] == 30


def test_a_huge_retry_after_is_capped_in_truth():
    with ChatServer(status(429, headers={"Retry-After": "86400"})) as server:
        replies = came_back(lambda: client_of(server.url).ask(chats(3)))
    assert failures(replies) == ["HTTP 429 after 4 tries"] * 3


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
