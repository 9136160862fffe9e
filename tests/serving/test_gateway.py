"""The gateway in front of two real servers, one of which dies. Ray's part is in test_cluster.py."""

from __future__ import annotations

import importlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import httpx2 as httpx
import pytest
import uvicorn
import websockets.exceptions
import websockets.sync.client
from waiting import eventually

from vita_audio.serving.config import ServeOptions
from vita_audio.serving.errors import overloaded
from vita_audio.serving.gateway import Gateway
from vita_audio.serving.metrics import joined_pages

REPOSITORY = Path(__file__).resolve().parents[2]
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}


class Door:
    """A gateway whose leases name the addresses of a list in turn; the last one stays."""

    def __init__(self, addresses: list[str], **options):
        self.addresses = addresses
        self.sessions: list[str] = []
        self.open = 0
        self.gateway = Gateway(self.lease, ServeOptions(**options))

    @asynccontextmanager
    async def lease(self, session: str):
        self.sessions.append(session)
        if not self.addresses:
            raise overloaded()
        self.open += 1
        try:
            yield self.addresses.pop(0) if len(self.addresses) > 1 else self.addresses[0]
        finally:
            self.open -= 1


@contextmanager
def opened(door: Door) -> Iterator[str]:
    """The gateway's address."""
    server = uvicorn.Server(uvicorn.Config(door.gateway, port=0, log_level="critical", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def dying(answer: bytes) -> Iterator[str]:
    """A replica that ends in the middle of its answer."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture(scope="module")
def door(running) -> Iterator[tuple[Door, str]]:
    door = Door([running.address])
    with opened(door) as address:
        yield door, address


def test_a_request_passes_and_comes_back_as_it_is(door, running):
    door, address = door
    headers = {"X-Session-ID": "mine", "Host": running.address.removeprefix("http://")}
    answer = httpx.post(f"{address}/v1/chat/completions", json=HELLO, headers=headers)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert door.sessions[-1] == "mine"
    refused = httpx.post(f"{address}/v1/chat/completions?x=%C3%A4", json=HELLO | {"n": 2})
    assert refused.json()["error"]["param"] == "n"
    stream = httpx.post(f"{address}/v1/chat/completions", json=HELLO | {"stream": True}).text
    assert stream.endswith("data: [DONE]\n\n")
    eventually(lambda: not door.open)


def test_a_conversation_passes(door):
    door, address = door
    with websockets.sync.client.connect(address.replace("http", "ws") + "/v1/realtime") as talk:
        assert json.loads(talk.recv())["type"] == "session.created"
        assert door.open == 1
        talk.send('{"type": "input_audio_buffer.clear"}')
        assert json.loads(talk.recv())["type"] == "input_audio_buffer.cleared"
        talk.send(b"{")
        assert json.loads(talk.recv())["type"] == "error"
    eventually(lambda: not door.open)


def test_a_refused_conversation_is_refused(door):
    with pytest.raises(websockets.exceptions.InvalidStatus):
        websockets.sync.client.connect(
            door[1].replace("http", "ws") + "/v1/realtime", origin="https://evil.example"
        )


def test_a_request_that_nobody_has_answered_goes_to_another_replica(running):
    with dying(b"") as dead, opened(Door([dead, "http://127.0.0.1:1", running.address])) as address:
        assert httpx.post(f"{address}/v1/chat/completions", json=HELLO).status_code == 200


def test_where_no_replica_answers_it_is_said():
    with opened(Door(["http://127.0.0.1:1"])) as address:
        answer = httpx.get(f"{address}/v1/models", timeout=30)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "replica_lost")
        assert answer.headers["retry-after"] == "1"


def test_a_stream_that_breaks_off_ends_with_an_error_event_and_a_file_does_not_look_complete():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: "
    with dying(head + b"text/event-stream\r\n\r\n5\r\ndata:\r\n") as dead, opened(Door([dead])) as address:
        text = httpx.get(f"{address}/v1/x").text
        assert json.loads(text.partition("data:data: ")[2])["error"]["code"] == "replica_lost"
    with (
        dying(head + b"audio/wav\r\n\r\n5\r\nRIFF0\r\n") as dead,
        opened(Door([dead])) as address,
        pytest.raises(httpx.RemoteProtocolError),
    ):
        httpx.get(f"{address}/v1/x")


def test_a_conversation_whose_replica_dies_gets_an_error_event(pipeline, serve):
    with (
        serve(pipeline) as replica,
        opened(Door([replica.address])) as address,
        websockets.sync.client.connect(address.replace("http", "ws") + "/v1/realtime") as talk,
    ):
        talk.recv()
        for connection in replica.server.server_state.connections.copy():
            replica.loop.call_soon_threadsafe(connection.transport.abort)
        assert json.loads(talk.recv())["error"]["code"] == "replica_lost"
        with pytest.raises(websockets.exceptions.ConnectionClosed):
            talk.recv()
        assert talk.close_code == 1011


def test_a_full_cluster_refuses_requests_and_conversations():
    with opened(Door([])) as address:
        assert httpx.get(f"{address}/v1/models").json()["error"]["code"] == "overloaded"
        with websockets.sync.client.connect(address.replace("http", "ws") + "/v1/realtime") as talk:
            assert json.loads(talk.recv())["error"]["code"] == "overloaded"


def test_a_key_has_a_limited_number_of_connections_at_all_replicas_together(running, pipeline, serve):
    with (
        serve(pipeline) as other,
        opened(Door([running.address, other.address], sessions_per_key=1, api_key_file="keys")) as address,
    ):

        def talk(key: str):
            return websockets.sync.client.connect(
                address.replace("http", "ws") + "/v1/realtime",
                additional_headers={"Authorization": f"Bearer {key}"},
            )

        def first_event(key: str) -> str:
            with talk(key) as second:
                event = json.loads(second.recv())
                return event["error"]["code"] if event["type"] == "error" else event["type"]

        with talk("mine") as first:
            first.recv()
            assert first_event("mine") == "too_many_sessions"
            assert first_event("another") == "session.created"
        eventually(lambda: first_event("mine") == "session.created")


def test_a_body_that_is_too_large_is_refused_at_the_door(running):
    with opened(Door([running.address], body_megabytes=0.0001)) as address:
        answer = httpx.post(f"{address}/v1/chat/completions", json=HELLO | {"user": "x" * 200})
        assert answer.status_code == 413


def test_a_client_that_leaves_ends_its_lease(running):
    door = Door([running.address])
    body = HELLO | {"stream": True, "repetition_penalty": 10, "max_tokens": 1024, "mode": "vanilla"}
    with opened(door) as address:
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=30) as answer:
            next(answer.iter_lines())
        eventually(lambda: not door.open)
        running.assert_nothing_is_left()


def test_the_benchmark_sees_replicas_come_and_go(running, tiny_world, monkeypatch, capsys):
    """Of one server, which shows its figures as those of two replicas until both have been seen."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    looks = 0

    async def metrics() -> dict[str, str]:
        nonlocal looks
        page = httpx.get(f"{running.address}/metrics").text
        looks += not looks or 'outcome="complete"' in page
        return {"one": page, "two": page} if 1 < looks < 8 else {"one": page}

    door = Door([running.address])
    door.gateway = Gateway(door.lease, ServeOptions(), metrics)
    with opened(door) as address:
        at = ["--url", address, "--questions", str(tiny_world.data_dir / "sqa.jsonl")]
        importlib.import_module("benchmarks.scale").main([*at, "--talkers", "2", "--patience", "60"])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["replicas"] == 1
    assert record["failures"] == 0


def test_figures_of_replicas_are_told_apart_by_their_names():
    page = '# HELP a_total What.\n# TYPE a_total counter\na_total{x="1"} 2.0\n'
    text = joined_pages({"one": page, "two": page}).decode()
    assert 'a_total{replica="one",x="1"} 2.0' in text
    assert 'a_total{replica="two",x="1"} 2.0' in text
    assert text.count("# TYPE") == 1
