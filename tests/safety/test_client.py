"""The client of a chat endpoint: what it takes, refuses, estimates, and sends."""

import pytest
from chat_server import ChatServer, answers, says, unused_url
from chats import FORMAT, KEY, chat, chats, client_of, environment  # noqa: F401

from hf_safe_ema.safety.client import ChatClient, CostEstimate
from hf_safe_ema.safety.reply_cache import Reply


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
