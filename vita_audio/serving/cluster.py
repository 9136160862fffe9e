"""Many machines: replicas of the server on Ray Serve, behind a gateway. Needs the extra ``ray``.

    scripts/serve.sh --ray --replicas 2                  Ray on this machine, or with --ray_address on a cluster
    serve deploy configs/serving/cluster.yaml            the same application from a file

Ray starts, watches, multiplies and replaces the replicas; each is a whole server on a free port of its node. A request
goes to the less busy of two replicas, or, if it names a session in ``X-Session-ID``, to that session's.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve
from ray._common.network_utils import build_address
from ray.exceptions import RayError
from ray.serve._private import replica as ray_replica
from ray.serve.exceptions import BackPressureError
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from vita_audio.inference import CodecOptions, RuntimeOptions, SpeechPipeline
from vita_audio.serving.app import create_app
from vita_audio.serving.config import Scale, ServeOptions, read_keys
from vita_audio.serving.errors import overloaded
from vita_audio.serving.gateway import Gateway, ReplicaLost
from vita_audio.serving.server import Server
from vita_audio.serving.service import Service

HEALTH_SECONDS = 2.0
NAME = "vita-audio"


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
        address: of a Ray cluster, where the application stays; None: Ray is started on this machine, and ended at the
            end of the context, after running replies.

    Raises:
        OSError: the replicas do not start, or there is no such cluster.
    """
    options = plan.server
    try:
        ray.init(
            address=address or "local",
            include_dashboard=False if address is None else None,
            log_to_driver=False,
        )
    except (ConnectionError, RuntimeError) as error:
        raise OSError(f"there is no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    try:
        serve.start(proxy_location="EveryNode", http_options={"host": options.host, "port": options.port})
        try:
            serve.run(application(plan), name=NAME, route_prefix="/")
        except RuntimeError as error:
            reason = [line for line in str(error).splitlines() if line.strip()][-1]
            raise OSError(f"the replicas do not start: {reason.strip()}") from error
        yield
        if address is None:
            serve.shutdown()
    finally:
        ray.shutdown()


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
