"""The same service on Ray Serve: replicas, routing, health and restarts are Ray's; each replica is the ingress itself,
with protocols, batches and networks, since a second hop would cost more than small networks do."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.grpc_util import RayServegRPCContext

import pykernels.serve.stubs  # noqa: F401  # requests by way of a proxy are read by it
from pykernels.serve import jobs
from pykernels.serve.application import application
from pykernels.serve.cores import pin
from pykernels.serve.environment import JOBS, NAME, STUBS
from pykernels.serve.errors import Overloaded, Refused, Unavailable
from pykernels.serve.protocols import http, http_v2
from pykernels.serve.protocols.grpc_v2 import OPEN, UNARY, Answers, authorization
from pykernels.serve.service import Options, Service

__all__ = ["Replica", "bind", "build", "run"]

SHUTDOWN = 15.0  # seconds in which a replica answers what it has taken
log = logging.getLogger(__name__)


@serve.ingress()
class Replica:
    """One replica: pinned to cores of its own, then a `Service`.

    Args:
        options: fields of `Options`.
    """

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray waits for it
        self.options = Options(**options)
        pin(serve.get_replica_context().rank.local_rank, self.options.cores)
        self.service = Service(self.options)
        self.answers = Answers(lambda: self.service)
        url = self.options.jobs
        self.jobs = None if url is None else jobs.Jobs(url, self.options.queue)
        await self.service.start()

    def __serve_build_asgi_app__(self) -> Any:
        taken = self.jobs
        return application(lambda: self.service, None if taken is None else lambda: taken)

    async def check_health(self) -> None:
        """Ray asks this again and again; a replica that fails is replaced."""
        if not self.service.live:
            raise RuntimeError(self.service.runner.death)

    async def job(self, name: str, version: str, header: str | None, body: bytes) -> jobs.Answer:
        """A job's answer, for the consumers.

        Raises:
            Overloaded, Unavailable: not now.
        """
        try:
            model = await self.service.repository.get(name, version)
            with self.service.budget.hold() as held:
                held.grow(len(body))
                held.parse(http.json_bytes(body, header))
                answer = await http_v2.response(self.service, model, http_v2.call_of(bytearray(body), header))
        except (Overloaded, Unavailable):
            raise
        except Refused as refused:
            answer = http.error(refused)
        return answer.status_code, dict(answer.headers), bytes(answer.body)

    async def ModelInfer(self, request: Any, grpc_context: RayServegRPCContext) -> Any:
        return await self._told(grpc_context, lambda: self.answers.ModelInfer(request, None))

    async def ModelStreamInfer(self, requests: Any, grpc_context: RayServegRPCContext) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self._told(grpc_context, lambda r=request: self.answers.stream(r, None))  # type: ignore[misc]

    async def _told(self, context: RayServegRPCContext, answer: Callable[[], Any], checked: bool = True) -> Any:
        try:
            if checked:
                self.service.token.check(authorization(context.invocation_metadata()))
            return await answer()
        except Refused as refused:
            import grpc

            context.set_code(getattr(grpc.StatusCode, refused.code))
            context.set_details(str(refused))
            raise


def _unary(name: str) -> Callable[..., Any]:
    async def answer(self: Replica, request: Any, grpc_context: RayServegRPCContext) -> Any:
        return await self._told(grpc_context, lambda: getattr(self.answers, name)(request), checked=name not in OPEN)

    answer.__name__ = name
    return answer


for _name in UNARY:
    setattr(Replica, _name, _unary(_name))


def bind(options: Options, replicas: int) -> Any:
    """The application for Ray Serve.

    Args:
        options: what is served; each replica has `options.instances` instances.
        replicas: how many.

    Raises:
        ValueError: the device has a number: which GPU a replica gets is Ray's to say.
    """
    if ":" in options.device:
        raise ValueError(f"device: on Ray it is cuda, and Ray says which, not {options.device}")
    gpus = {} if options.device == "cpu" else {"num_gpus": options.gpus}
    waiting = options.queue + 4 * options.batch * options.instances
    deployment = serve.deployment(
        Replica,
        name=NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": options.cores, **gpus},
        max_ongoing_requests=waiting,  # the replica's own bound comes first, and says when to come again
        graceful_shutdown_timeout_s=SHUTDOWN,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )
    return deployment.bind(dataclasses.asdict(options))


def build(arguments: dict[str, Any]) -> Any:
    """What ``import_path: pykernels.serve.engine:build`` of a Serve config names.

    Args:
        arguments: fields of `Options`, and ``replicas``.

    Raises:
        ValueError, TypeError: they are none.
    """
    replicas = arguments.pop("replicas", 1)
    return bind(Options(**arguments), replicas)


def run(
    options: Options,
    replicas: int,
    host: str,
    port: int,
    grpc_port: int,
    started: Callable[[int, int], None] | None = None,
) -> None:
    """Serve on a Ray of this machine until SIGTERM or SIGINT, then drain.

    Args:
        started: called with the ports of HTTP and gRPC when replicas answer.

    Raises:
        ValueError: nothing can be served.
        RuntimeError: Ray could not start it.
    """
    import ray

    stop = threading.Event()
    ray.init(
        address="local",  # one of its own, beside any that runs here
        num_cpus=replicas * options.cores,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(_paths())}},
    )
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has set handlers of its own
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": host, "port": port, "request_timeout_s": None},
            grpc_options={"port": grpc_port, "grpc_servicer_functions": [STUBS]},
        )
        serve.run(bind(options, replicas), name=NAME, route_prefix="/")
        if options.jobs is not None:
            serve.run(jobs.bind(options.jobs, jobs.at_once(options, replicas)), name=JOBS, route_prefix=None)
        if started is not None:
            started(port, grpc_port)
        stop.wait()
    finally:
        # Replicas answer what they have taken. `serve.shutdown` would wait half a minute for its controller besides.
        applications = [NAME] if options.jobs is None else [NAME, JOBS]
        with contextlib.suppress(Exception), ThreadPoolExecutor() as threads:
            list(threads.map(serve.delete, applications))
        ray.shutdown()


def _paths() -> list[str]:
    """Where workers find this package."""
    import pykernels

    own = str(Path(pykernels.__file__).parent.parent)
    return [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
