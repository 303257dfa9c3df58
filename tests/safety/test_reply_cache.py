"""Replies that are remembered, and files that cannot."""

import sqlite3
import subprocess
import sys

import pytest
from chat_server import ChatServer, answers, says, sends, status, unless_structured
from chats import FORMAT, chats, client_of, environment, failures  # noqa: F401

from hf_safe_ema.safety import reply_cache
from hf_safe_ema.safety.client import ChatClient
from hf_safe_ema.safety.reply_cache import Reply, ReplyCache


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
from hf_safe_ema.safety.reply_cache import Reply, ReplyCache
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
    monkeypatch.setattr(reply_cache, "LOCK_TIMEOUT", 0.01)
    path = tmp_path / "cache.sqlite"
    with ChatServer(says("well")) as server:
        client = client_of(server.url, cache=path)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN EXCLUSIVE")
        assert failures(client.ask(chats(5))) == [None] * 5
        holder.close()
    assert caplog.text.count("cannot be used (database is locked)") == 1
