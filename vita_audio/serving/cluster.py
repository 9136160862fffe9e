"""Many machines: replicas of the server on Ray Serve, behind a gateway. Needs the extra ``ray``.

    scripts/serve.sh --ray --replicas 2                  Ray on this machine, or with --ray_address on a cluster
    serve deploy configs/serving/cluster.yaml            the same application from a file

Ray starts, watches, multiplies and replaces the replicas; each is a whole server on a free port of its node. A request
goes to the less busy of two replicas, or, if it names a session in ``X-Session-ID``, to that session's.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray._common.network_utils import build_address
from ray.exceptions import RayError
from ray.serve._private import replica as ray_replica
from ray.serve.context import _get_global_client
from ray.serve.exceptions import BackPressureError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from vita_audio.inference import CodecOptions, RuntimeOptions, SpeechPipeline
from vita_audio.inference.pipeline import check_family, read_checkpoint_config
from vita_audio.serving.app import create_app
from vita_audio.serving.config import Scale, ServeOptions, read_keys
from vita_audio.serving.errors import overloaded
from vita_audio.serving.gateway import Gateway, ReplicaLost
from vita_audio.serving.server import Server
from vita_audio.serving.service import Service, read_voices

HEALTH_SECONDS = 2.0
NAME = "vita-audio"
_WARM_UP_SECONDS = 60.0


class Plan(BaseModel):
    """What is deployed: the ``args`` of the configuration file.

    Attributes:
        model_name_or_path: checkpoint folder, on every node.
        codec, runtime: see :meth:`~vita_audio.inference.SpeechPipeline.open`.
        server: limits; ``host`` and ``port`` are those of Ray's proxies.
        scale: how many servers.
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    model_name_or_path: str
    codec: CodecOptions
    runtime: RuntimeOptions = RuntimeOptions()
    server: ServeOptions = ServeOptions()
    scale: Scale = Scale()


def application(args: Plan) -> serve.Application:
    """The application for Ray Serve; the ``import_path`` of the configuration file."""
    options, scale = args.server, args.scale
    places = options.slots + options.queue
    replica = serve.deployment(
        name="replica",
        ray_actor_options={"num_cpus": scale.cpus_per_replica, "num_gpus": scale.gpus_per_replica},
        autoscaling_config={
            "min_replicas": scale.replicas,
            "max_replicas": scale.most_replicas or scale.replicas,
            "target_ongoing_requests": options.slots,
            "upscale_delay_s": scale.grow_seconds,
            "downscale_delay_s": scale.shrink_seconds,
        },
        max_ongoing_requests=places,
        max_queued_requests=options.queue,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_wait_loop_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=options.drain_seconds,
        max_surge_percent=100,  # an old replica goes when its successor is ready
        request_router_config={"request_router_class": SessionRouter},
    )(Replica)
    gateway = serve.deployment(
        name="gateway",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=places * 64,
        health_check_period_s=HEALTH_SECONDS,
        graceful_shutdown_timeout_s=options.drain_seconds,
        max_surge_percent=100,
    )(serve.ingress()(Entrance))
    return gateway.bind(replica.bind(args), options)


@contextmanager
def deployed(plan: Plan, address: str | None) -> Iterator[None]:
    """Deploy, and wait until all replicas are ready. What runs there already under our name is replaced in turn.

    Args:
        plan: what is deployed.
        address: of a Ray cluster, where the application stays; None: Ray is started on this machine, and ended with
            the context, after running replies.

    Raises:
        ValueError: on this machine, a folder cannot be used, or the replicas have no room.
        OSError: the replicas do not start, the address cannot be used, or there is no such cluster.
    """
    options = plan.server
    if address is None:
        _check_machine(plan)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError) as error:
        raise OSError(f"there is no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    try:
        if threading.current_thread() is threading.main_thread():
            # Ray's handler would abort this process with a stack trace, and leave nobody to end Ray.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        if address is None:
            _check_room(plan.scale)
        try:
            serve.start(proxy_location="EveryNode", http_options={"host": options.host, "port": options.port})
            _check_port(options)
            serve.run(application(plan), name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise OSError(f"the replicas do not start: {_reason(error)}") from error
        if address is None:
            _warm_up(options)
        yield
        if address is None:
            _drain(options)
    finally:
        ray.shutdown()


def _check_machine(plan: Plan) -> None:
    """What a server on this machine needs. Ray tries a replica several times before it says that one cannot start.

    Raises:
        ValueError: the model or a voice cannot be used.
        OSError: the address cannot be used.
    """
    check_family(read_checkpoint_config(plan.model_name_or_path), plan.codec.audio_tokenizer_type)
    read_voices(plan.server.voices_dir)
    address = (plan.server.host, plan.server.port)
    try:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        socket.create_server(address, family=family).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise OSError(f"the server cannot listen on {address[0]}:{address[1]}: {reason}") from error


def _check_room(scale: Scale) -> None:
    """Whether the least number of replicas fits the nodes of this cluster; Ray would wait for further nodes.

    Raises:
        ValueError: it does not.
    """
    found = ray.cluster_resources()
    for resource, each in (("CPU", scale.cpus_per_replica), ("GPU", scale.gpus_per_replica)):
        if scale.replicas * each > found.get(resource, 0):
            needed = f"{scale.replicas} times {each:g} {resource}s are more than the {found.get(resource, 0):g} here"
            raise ValueError(f"replicas={scale.replicas}: {needed}; change --{resource.lower()}s_per_replica")


def _check_port(options: ServeOptions) -> None:
    """Where Serve runs already, it keeps its port.

    Raises:
        ValueError: that is another one.
    """
    client = _get_global_client()
    assert client is not None  # Serve has been started
    runs_at = client.http_config.port
    if runs_at != options.port:
        raise ValueError(
            f"port={options.port}: Serve runs at port {runs_at} of this cluster already; give that"
        )


def _reason(error: Exception) -> str:
    """The last line of the error that a replica's start ended with, else of what Serve says."""
    application = serve.status().applications.get(NAME)
    deployments = () if application is None else application.deployments.values()
    text = next((each.message for each in deployments if "Error" in each.message), str(error))
    last = [line.strip() for line in text.splitlines() if line.strip()][-1]
    return re.sub(r"^[\w.]*Error: ", "", last)


def _warm_up(options: ServeOptions) -> None:
    """Wait for an answer: proxy and gateway connect to each other and to the replicas at the first request."""
    deadline = time.monotonic() + _WARM_UP_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError), urlopen(f"{options.url}/health", timeout=_WARM_UP_SECONDS):
            return
        time.sleep(0.2)
    raise OSError(f"the gateway does not answer at {options.url}")


def _drain(options: ServeOptions) -> None:
    """Let running replies end. Serve's own way to end would kill its proxies first, and all replies with them."""
    replicas = serve.get_deployment_handle("replica", NAME)
    try:
        for step in ("drain", "close"):
            answers = replicas.broadcast(step)
            with suppress(TimeoutError):
                answers.results(timeout_s=options.drain_seconds + HEALTH_SECONDS, return_exceptions=True)
    finally:
        replicas.shutdown()  # its thread would go on, and start Ray again


class Replica:
    """One server, with one model on one device."""

    def __init__(self, plan: Plan):
        _listen_on_the_nodes_address()
        options = plan.server
        pipeline = SpeechPipeline.open(plan.model_name_or_path, plan.codec, plan.runtime)
        self._service = Service(pipeline, options, Path(plan.model_name_or_path).resolve().name)
        app = create_app(self._service, read_keys(options.api_key_file))
        self._server = Server(app, self._service, host=get_node_ip_address(), port=0)
        # Ray's own calls must not wait for the server's, nor the other way round.
        self._thread = threading.Thread(
            target=asyncio.run, args=(self._server.serve(),), name="server", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError("the server did not start; the log says why")
            time.sleep(0.05)

    async def lease(self) -> AsyncIterator[str]:
        """The address; the caller cancels this call when it has no more use for the replica."""
        yield self._server.address
        await asyncio.Event().wait()

    def metrics(self) -> tuple[str, str]:
        """The replica's name, and its figures for Prometheus."""
        return serve.get_replica_context().replica_id.unique_id, self._service.metrics.text().decode()

    async def drain(self) -> None:
        """Refuse new replies. Returns when the running ones have ended."""
        self._service.draining = True
        await self._service.until_idle()

    async def close(self) -> None:
        """End the server. Returns when its conversations are closed."""
        self._server.should_exit = True
        await asyncio.to_thread(self._thread.join)

    def check_health(self) -> None:
        """Called by Ray.

        Raises:
            RuntimeError: the replica must be replaced.
        """
        if not self._thread.is_alive() or not self._service.ready:
            raise RuntimeError("the server has ended")

    def __del__(self) -> None:
        """Called by Ray at the end, when no lease is left."""
        self._server.should_exit = True
        self._thread.join(5)


def _listen_on_the_nodes_address() -> None:
    """Keep this process off other addresses: Ray's port for calls between deployments is opened on all of them.

    No option of Ray 2.60 changes that. A test looks at every address that a deployment listens on.
    """
    add_port = ray_replica.add_port_to_grpc_server
    address = build_address(get_node_ip_address(), 0)
    ray_replica.add_port_to_grpc_server = lambda server, _: add_port(server, address)


class Entrance:
    """The gateway as a deployment."""

    def __init__(self, replicas: DeploymentHandle[Any], options: ServeOptions):
        _listen_on_the_nodes_address()
        self._replicas = replicas
        self._options = options

    def __serve_build_asgi_app__(self) -> Gateway:
        """Called by Ray."""
        return Gateway(self._lease, self._options, self._metrics)

    @asynccontextmanager
    async def _lease(self, session: str) -> AsyncIterator[str]:
        stream: Any = self._replicas.options(stream=True, session_id=session).lease.remote()
        try:
            try:
                address = await anext(stream)
            except BackPressureError as error:
                raise overloaded() from error
            except RayError as error:
                raise ReplicaLost from error
            yield address
        finally:
            stream.cancel()

    async def _metrics(self) -> dict[str, str]:
        pages = await self._replicas.broadcast("metrics").results_async(timeout_s=5, return_exceptions=True)
        return dict(page for page in pages if not isinstance(page, BaseException))


class SessionRouter(ConsistentHashRouter):
    """Requests of a session go to its replica; all others to the less busy of two."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: Any = None
    ) -> list[list[Any]]:
        """See the base class."""
        if candidate_replicas and pending_request is not None and not pending_request.metadata.session_id:
            pending_request.routing_context.should_backoff = True
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        return list(await super().choose_replicas(candidate_replicas, pending_request))
