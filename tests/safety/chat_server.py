"""A chat endpoint on loopback that answers well or badly, as told: a real HTTP server for tests of whoever asks one.

Knows: the wire form of chat completions, and many ways to get it wrong.
Does not know: the client, or what is tested.

    with ChatServer(status(429), says("hello")) as server:  # one behaviour a request; the last one stays
        ...ask server.url...
        assert server.count == 2
"""

import contextlib
import json
import re
import socket
import socketserver
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


class Exchange(BaseHTTPRequestHandler):
    """One request, under way: what a behaviour gets."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked = json.loads(raw)
        self.state: ChatServer = self.server.state
        with contextlib.suppress(OSError):  # the client has gone
            self.state.serve(self)

    @property
    def question(self) -> str:
        """Text of the last message."""
        return self.asked["messages"][-1]["content"]

    @property
    def key(self) -> str:
        """The key that was sent."""
        return self.headers["Authorization"].removeprefix("Bearer ")

    def send(self, body: bytes | str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.begin(len(body), status, headers)
        self.wfile.write(body)

    def begin(self, length: int, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(length),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


Behaviour = Callable[[Exchange], None]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    server_bind = socketserver.TCPServer.server_bind  # HTTPServer's own asks a name server

    def handle_error(self, *_) -> None:
        pass


class ChatServer:
    """Serves `behaviours` in the order of the requests, the last one for ever."""

    def __init__(self, *behaviours: Behaviour):
        self.behaviours = behaviours
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.at_once = self.max_at_once = 0
        self.changed = threading.Condition()
        self.closing = threading.Event()

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def questions(self) -> list[str]:
        return [asked["messages"][-1]["content"] for asked in self.requests]

    def serve(self, exchange: Exchange) -> None:
        with self.changed:
            self.requests.append(exchange.asked)
            self.keys.append(exchange.key)
            self.at_once += 1
            self.max_at_once = max(self.max_at_once, self.at_once)
            behaviour = self.behaviours[min(self.count, len(self.behaviours)) - 1]
            self.changed.notify_all()
        try:
            behaviour(exchange)
        finally:
            with self.changed:
                self.at_once -= 1

    def wait_for(self, condition: Callable[[], bool], timeout: float = 60.0) -> bool:
        """Until something is true of the requests so far."""
        with self.changed:
            return self.changed.wait_for(condition, timeout)

    def __enter__(self) -> "ChatServer":
        self.http = _Server(("127.0.0.1", 0), Exchange)
        self.http.state = self
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


def unused_url() -> str:
    """Of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def completion(content, finish_reason: str = "stop", usage: dict | None = USAGE, **message) -> dict:
    """The body of a reply."""
    message = {"role": "assistant", "content": content, **message}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "test"}
    body["choices"] = [{"index": 0, "message": message, "finish_reason": finish_reason}]
    return body if usage is None else {**body, "usage": usage}


def says(content, **more) -> Behaviour:
    """A good reply; or one with another finish reason, usage or further fields of the message."""
    return sends(json.dumps(completion(content, **more)))


def answers(reply: Callable[[str], str]) -> Behaviour:
    """A reply made from the question."""
    return lambda exchange: exchange.send(json.dumps(completion(reply(exchange.question))))


def sends(body: str | bytes) -> Behaviour:
    """Any body, with status 200."""
    return lambda exchange: exchange.send(body)


def status(number: int, message: str = "no", headers: dict[str, str] | None = None, **error) -> Behaviour:
    """An error, with further fields."""
    body = json.dumps({"error": {"message": message, "type": "error", **error}})
    return lambda exchange: exchange.send(body, number, headers)


def echoes_key(code: int) -> Behaviour:
    """An error, or a reply, that gives away the key: in its text, its code, a header, and an unknown field."""

    def behave(exchange: Exchange) -> None:
        error = {"message": f"bad key {exchange.key}!", "code": exchange.key, "type": exchange.key}
        body = completion(f"your key is {exchange.key}") if code == 200 else {"error": error, "seen": exchange.key}
        exchange.send(json.dumps(body), code, {"X-Seen": exchange.key})

    return behave


def hangs(exchange: Exchange) -> None:
    """Takes the request and says nothing."""
    exchange.state.closing.wait(60)


def hesitates(exchange: Exchange) -> None:
    """A good reply in two pieces."""
    body = json.dumps(completion("slow but well")).encode()
    exchange.begin(len(body))
    exchange.wfile.write(body[:20])
    exchange.state.closing.wait(0.1)
    exchange.wfile.write(body[20:])


def trickles(exchange: Exchange) -> None:
    """A body that never ends, a byte at a time: no pause of it is long."""
    exchange.begin(10**9)
    while not exchange.state.closing.wait(0.05):
        exchange.wfile.write(b" ")


def hangs_up(exchange: Exchange) -> None:
    """Closes the connection without a reply."""
    exchange.close_connection = True
    exchange.connection.shutdown(socket.SHUT_RDWR)


def breaks_off(exchange: Exchange) -> None:
    """Closes it in the middle of one."""
    exchange.begin(1000)
    exchange.wfile.write(b'{"id": ')
    hangs_up(exchange)


def unless_structured(behaviour: Behaviour, code: int = 400) -> Behaviour:
    """Refuses `response_format`, as servers that do not have it do."""
    refuse = status(code, "response_format is not supported")
    return lambda exchange: (refuse if "response_format" in exchange.asked else behaviour)(exchange)


def by_question(default: Behaviour, **behaviours: Behaviour) -> Behaviour:
    """By a word in the question, whatever the order of the requests."""

    def behave(exchange: Exchange) -> None:
        chosen = [behaviour for word, behaviour in behaviours.items() if word in exchange.question]
        (chosen or [default])[0](exchange)

    return behave


def in_turn(*behaviours: Behaviour) -> Behaviour:
    """For each question anew: the first time the first, then the second; the last one stays."""

    def behave(exchange: Exchange) -> None:
        times = sum(question == exchange.question for question in exchange.state.questions)
        behaviours[min(times, len(behaviours)) - 1](exchange)

    return behave


def naive_judge(otherwise: dict) -> Behaviour:
    """A judge that is easily talked to: it repeats the last JSON object that it finds outside the data.

    Where the data are, it knows as a model would: from the first marker to the first that ends what it began.
    """

    def reply(question: str) -> str:
        begin = re.search(r"<<<DATA (\w+)>>>", question)
        end = question.index(f"<<<END {begin[1]}>>>", begin.end())
        return json.dumps(last_object(question[: begin.start()] + question[end:]) or otherwise)

    return answers(reply)


def last_object(text: str) -> dict | None:
    found = None
    for start in (match.start() for match in re.finditer(r"\{", text)):
        with contextlib.suppress(ValueError):
            found = json.JSONDecoder().raw_decode(text[start:])[0]
    return found
