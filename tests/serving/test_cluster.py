"""Two Ray nodes on one machine: a replica is killed under load, another one comes, all are replaced, and all end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import httpx2 as httpx
import psutil
import pytest
import websockets
import websockets.sync.client
from waiting import eventually

os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback; Ray reads it when it is imported
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError

from vita_audio.cli import serve
from vita_audio.serving import cluster
from vita_audio.serving.cluster import Plan
from vita_audio.serving.config import Scale, ServeOptions
from vita_audio.serving.errors import ApiError
from vita_audio.serving.gateway import Gateway, ReplicaLost

SPEECH = {"model": "tiny", "input": "the quiet river runs", "temperature": 0}


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@dataclass
class TwoNodes:
    """Deploys the tiny model on two nodes, or a new revision of it. Returns the address."""

    ray_address: str
    deploy: Callable[[str], str]


@pytest.fixture(scope="module")
def two_nodes(tiny_world) -> Iterator[TwoNodes]:
    from ray.cluster_utils import Cluster

    port = free_port()
    os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(free_port())  # two nodes, one machine
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    flags = [
        "--model_name_or_path",
        tiny_world.model_dir,
        "--served_name",
        "tiny",
        "--audio_tokenizer_type",
        "mel_vq",
    ]
    flags += ["--audio_tokenizer_path", tiny_world.codec_dir, "--port", port, "--drain_seconds", 20]
    flags += ["--ray_address", cluster.address, "--replicas", 2, "--cpus_per_replica", 0.5]

    def run(revision: str) -> str:
        serve.main([str(flag) for flag in [*flags, "--revision", revision]])
        return f"http://127.0.0.1:{port}"

    try:
        cluster.add_node(num_cpus=2)
        yield TwoNodes(cluster.address, run)
    finally:
        ray.shutdown()
        cluster.shutdown()


class Load:
    """Requests and conversations that go on until they are told to end; failures are collected.

    Args:
        address: of the cluster.
        sound: format of the speech. ``flac`` comes in one piece at the end, so it can be asked for again until then.
    """

    def __init__(self, address: str, sound: str = "pcm"):
        self._address = address
        self._speech = SPEECH | {"response_format": sound}
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def more(self, count: int) -> None:
        """Wait for further answers of each kind."""
        before = self.counts.copy()
        while any(self.counts[kind] < before[kind] + count for kind in ("speech", "turns")):
            assert self._thread.is_alive()
            time.sleep(0.05)

    async def _run(self) -> None:
        await asyncio.gather(*(self._repeat(self._speak) for _ in range(2)), self._repeat(self._converse))

    async def _repeat(self, visit) -> None:
        while not self._over.is_set():
            try:
                await visit()
            except Exception as error:
                self.failures.append(f"{visit.__name__}: {error!r}")
            await asyncio.sleep(0.05)

    async def _speak(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            response = await client.post(f"{self._address}/v1/audio/speech", json=self._speech)
            response.raise_for_status()
            assert len(response.content) > 1000
        self.counts["speech"] += 1

    async def _converse(self) -> None:
        """A turn on a connection of its own. One whose replica dies is told so, and no failure."""
        async with websockets.connect(realtime(self._address)) as connection:
            item = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hello"}]}
            for event in (
                {"type": "conversation.item.create", "item": item},
                {"type": "response.create", "response": {"max_output_tokens": 8}},
            ):
                await connection.send(json.dumps(event))
            async for text in connection:
                event = json.loads(text)
                if event["type"] == "error":
                    assert event["error"]["code"] == "replica_lost"
                    self.counts["told"] += 1
                    return
                if event["type"] == "response.done":
                    self.counts["turns"] += 1
                    return
        raise AssertionError("the connection ended")


def realtime(address: str) -> str:
    return address.replace("http", "ws") + "/v1/realtime"


def figures(address: str) -> str:
    return httpx.get(f"{address}/metrics", timeout=30).text


def replicas(address: str) -> dict[str, float]:
    """The replicas by name, with the number of listings of models that each has answered."""
    found: dict[str, float] = {}
    for line in figures(address).splitlines():
        name = line.partition('replica="')[2].partition('"')[0]
        if line.startswith("vita_audio_slots_used{"):
            found.setdefault(name, 0)
        elif line.startswith("vita_audio_requests_total{") and 'path="/v1/models"' in line:
            found[name] = float(line.rsplit(" ", 1)[1])
    return found


def wait_for_replicas(address: str, fine) -> dict[str, float]:
    deadline = time.monotonic() + 90
    while not fine(found := replicas(address)):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def long_answer(address: str, size: int) -> httpx.Response:
    """An answer of so many tokens."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": size}
    long = body | {"stream": True, "repetition_penalty": 10, "mode": "vanilla"}
    return httpx.post(f"{address}/v1/chat/completions", json=long, timeout=60)


@pytest.mark.slow
def test_a_cluster_stands_the_death_the_replacement_and_the_end_of_replicas(two_nodes):
    address = two_nodes.deploy("1")
    first = wait_for_replicas(address, lambda found: len(found) == 2)

    for _ in range(6):
        httpx.get(f"{address}/v1/models", headers={"X-Session-ID": "one"}).raise_for_status()
    # A session stays on its replica.
    wait_for_replicas(address, lambda found: sorted(found.values()) == [0, 6])

    family = {each.pid: each.name() for each in psutil.Process().children(recursive=True)}
    listening = {
        entry.laddr.ip: family[entry.pid]
        for entry in psutil.net_connections("tcp")
        if entry.status == psutil.CONN_LISTEN and entry.pid in family
    }
    assert set(listening) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, listening

    told, held = asyncio.run(kill_one_under_load(address))
    assert 0 < told < held  # the conversations of the killed replica, and only they
    back = wait_for_replicas(address, lambda found: len(found) == 2 and set(found) != set(first))

    with Load(address) as load:
        load.more(2)
        assert two_nodes.deploy("2") == address
        wait_for_replicas(address, lambda found: len(found) == 2 and not set(found) & set(back))
        load.more(2)
    assert load.failures == []
    assert not load.counts["told"]
    end_while_answering(address, two_nodes.ray_address)


def end_while_answering(address: str, ray_address: str) -> None:
    """What ``--ray`` does at the end: a reply ends completely, a new one is refused, a conversation is closed."""
    with (
        websockets.sync.client.connect(realtime(address)) as talk,
        ThreadPoolExecutor() as pool,
        ray.init(address=ray_address, log_to_driver=False),
    ):
        talk.recv()
        running = pool.submit(long_answer, address, 600)
        eventually(lambda: "vita_audio_slots_used{" in (page := figures(address)) and "} 1.0" in page)
        ended = pool.submit(cluster._drain, ServeOptions(drain_seconds=60))
        refused = eventually(lambda: (answer := long_answer(address, 1)).status_code == 503 and answer)
        assert int(refused.headers["retry-after"]) > 0
        assert running.result().text.endswith("data: [DONE]\n\n")
        ended.result()
        with pytest.raises(websockets.ConnectionClosed):
            talk.recv()
        assert talk.close_code == 1012


async def kill_one_under_load(address: str) -> tuple[int, int]:
    """Returns how many of some idle conversations were told that their replica is gone, and their number."""
    connections = [await websockets.connect(realtime(address)) for _ in range(10)]
    for connection in connections:
        assert json.loads(await connection.recv())["type"] == "session.created"
    load = Load(address, "flac")
    with load:
        await asyncio.to_thread(load.more, 2)
        family = psutil.Process().children(recursive=True)
        victim = next(each for each in family if each.name() == "ray::ServeReplica:vita-audio:replica")
        victim.send_signal(signal.SIGKILL)
        await asyncio.to_thread(load.more, 5)
    assert load.failures == []
    told = 0
    for connection in connections:
        with contextlib.suppress(websockets.ConnectionClosed):  # what came before is read all the same
            await connection.send('{"type": "input_audio_buffer.clear"}')
        event = json.loads(await connection.recv())
        if event["type"] == "error":
            assert event["error"]["code"] == "replica_lost"
            told += 1
        else:
            assert event["type"] == "input_audio_buffer.cleared"
        await connection.close()
    return told, len(connections)


@pytest.fixture
def ray_untouched(monkeypatch):
    from ray.serve._private import replica

    monkeypatch.setattr(replica, "add_port_to_grpc_server", replica.add_port_to_grpc_server)


def test_a_replica_is_a_server_of_its_own_until_it_is_deleted(tiny_world, ray_untouched, monkeypatch):
    codec = {"audio_tokenizer_type": "mel_vq", "audio_tokenizer_path": tiny_world.codec_dir}
    replica = cluster.Replica(Plan(model_name_or_path=str(tiny_world.model_dir), codec=codec))
    address = asyncio.run(anext(replica.lease()))
    assert address.startswith("http://127.0.0.1:")
    assert httpx.get(f"{address}/health").status_code == 200
    replica.check_health()
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="one"))
    monkeypatch.setattr(cluster.serve, "get_replica_context", lambda: context)
    name, page = replica.metrics()
    assert name == "one"
    assert "vita_audio_slots_used" in page
    asyncio.run(replica.drain())
    assert httpx.get(f"{address}/v1/models").json()["error"]["code"] == "shutting_down"
    asyncio.run(replica.close())
    replica.__del__()
    with pytest.raises(RuntimeError, match="has ended"):
        replica.check_health()


class Calls:
    """A deployment's handle: calls of ``lease`` give an address or fail."""

    def __init__(self, answer: str | Exception):
        self.answer, self.sessions, self.cancelled = answer, [], 0
        self.lease = self

    def options(self, stream: bool, session_id: str) -> Calls:
        assert stream
        self.sessions.append(session_id)
        return self

    def remote(self) -> Calls:
        return self

    async def __anext__(self) -> str:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled += 1

    def broadcast(self, method: str) -> Calls:
        assert method == "metrics"
        return self

    async def results_async(self, **_: object) -> list:
        return [("one", "page"), RuntimeError("gone")]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("http://127.0.0.1:1", None),
        (BackPressureError(1, 1), ApiError),
        (RayError("gone"), ReplicaLost),
    ],
)
def test_a_lease_ends_however_it_went(ray_untouched, answer, error):
    calls = Calls(answer)
    entrance = cluster.Entrance(calls, ServeOptions())
    assert isinstance(entrance.__serve_build_asgi_app__(), Gateway)
    assert asyncio.run(entrance._metrics()) == {"one": "page"}

    async def take() -> str:
        async with entrance._lease("mine") as address:
            return address

    if error is None:
        assert asyncio.run(take()) == answer
    else:
        with pytest.raises(error):
            asyncio.run(take())
    assert calls.sessions == ["mine"]
    assert calls.cancelled == 1


def test_requests_without_a_session_choose_between_two_replicas(monkeypatch):
    async def by_hash(self, candidates, request) -> list:
        return [candidates[:1]]

    monkeypatch.setattr(cluster.ConsistentHashRouter, "choose_replicas", by_hash)
    router = object.__new__(cluster.SessionRouter)

    def request(session: str) -> SimpleNamespace:
        metadata = SimpleNamespace(session_id=session)
        return SimpleNamespace(metadata=metadata, routing_context=SimpleNamespace())

    ((one, two),) = asyncio.run(router.choose_replicas(["a", "b", "c"], request("")))
    assert one != two
    assert asyncio.run(router.choose_replicas(["a", "b", "c"], request("mine"))) == [["a"]]


def test_a_cluster_that_is_not_there_is_one_line(tiny_world):
    flags = ["--model_name_or_path", tiny_world.model_dir, "--audio_tokenizer_type", "mel_vq"]
    flags += ["--audio_tokenizer_path", tiny_world.codec_dir, "--ray_address", "no-such-scheme://x"]
    with pytest.raises(OSError, match="no Ray cluster at no-such-scheme"):
        serve.main([str(flag) for flag in flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "none"], "none: no such folder"),
        (["--voices_dir", "none"], "none: there is no such folder"),
        (["--port", "taken"], r"cannot listen on 127.0.0.1:\d+: Address already in use"),
        (["--port", "0"], "port=0"),
        (["--host", "203.0.113.7"], "cannot listen on 203.0.113.7"),
    ],
)
def test_what_a_server_on_this_machine_lacks_is_said_before_ray_is_started(
    tiny_world, codec_flags, monkeypatch, flags, message
):
    monkeypatch.setattr(cluster.ray, "init", lambda **_: pytest.fail("Ray was started"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        given = [str(taken.getsockname()[1]) if flag == "taken" else flag for flag in flags]
        with pytest.raises((ValueError, OSError), match=message):
            serve.main(["--ray", "--model_name_or_path", str(tiny_world.model_dir), *codec_flags, *given])


def test_replicas_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 2.0})
    cluster._check_room(Scale(replicas=2))
    with pytest.raises(ValueError, match="3 times 1 CPUs are more than the 2 here"):
        cluster._check_room(Scale(replicas=3))
    with pytest.raises(ValueError, match=r"1 times 0\.5 GPUs are more than the 0 here"):
        cluster._check_room(Scale(gpus_per_replica=0.5))


def test_a_port_other_than_that_of_a_running_serve_is_refused(monkeypatch):
    client = SimpleNamespace(http_config=SimpleNamespace(port=8000))
    monkeypatch.setattr(cluster, "_get_global_client", lambda: client)
    cluster._check_port(ServeOptions(port=8000))
    with pytest.raises(ValueError, match="Serve runs at port 8000"):
        cluster._check_port(ServeOptions(port=8001))


def test_the_reason_why_a_replica_does_not_start_is_its_own_error(monkeypatch):
    text = "The deployment failed to start 3 times.\nTraceback …\nvita_audio.models.CheckpointError: no weights\n"
    deployments = {"gateway": SimpleNamespace(message=""), "replica": SimpleNamespace(message=text)}
    status = SimpleNamespace(applications={cluster.NAME: SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr(cluster.serve, "status", lambda: status)
    assert cluster._reason(RuntimeError("Failed to update the deployments")) == "no weights"
    status.applications.clear()
    assert cluster._reason(RuntimeError("Trace\nValueError: bad port\n")) == "bad port"


@pytest.mark.parametrize(
    "wrong", [{"replicas": 0}, {"replicas": 3, "most_replicas": 2}, {"gpus_per_replica": -1.0}]
)
def test_a_scale_out_of_range_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=list(wrong)[-1]):
        Scale(**wrong)
