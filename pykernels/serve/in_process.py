"""One process that serves: the HTTP application under uvicorn and the protocol's gRPC form under grpc.aio, on one event
loop. It has nobody who starts it again: containers, tests and one's own machine have."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import grpc
import uvicorn
import uvloop
from tritonclient.grpc import service_pb2_grpc

from pykernels.serve.application import application
from pykernels.serve.protocols.grpc_v2 import Servicer, options
from pykernels.serve.service import Options, Service

__all__ = ["Addresses", "running", "serve"]

GRACE = 20.0  # seconds for answers after a signal; SageMaker and Kubernetes kill after 30


@dataclass(frozen=True)
class Addresses:
    """Where a process listens; `grpc` is 0 where it does not speak it."""

    host: str
    http: int
    grpc: int


class _Server(uvicorn.Server):
    """One that leaves signals to us: it would refuse connections before the load balancer knows."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # as in uvicorn
        yield


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small packets at once (TCP_NODELAY) only where the socket says that it is one of TCP's.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"host and port: {host}:{port} cannot be listened on: {error}") from error
    return listener


@contextlib.asynccontextmanager
async def running(
    options_: Options, host: str = "127.0.0.1", port: int = 8000, grpc_port: int | None = 8001
) -> AsyncIterator[tuple[Addresses, Service]]:
    """A service that listens while the context lasts; at its end it answers what it has taken, and refuses the rest.

    Args:
        options_: what is served, and how.
        host: the interface to listen on.
        port, grpc_port: 0 chooses one that is free; None does not speak gRPC.

    Raises:
        OSError: a port is taken, or a file cannot be read.
        ValueError: there is nothing to serve, or the options do not fit this machine.
    """
    listener = _listener(host, port)
    service = Service(options_)
    server = grpc.aio.server(options=tuple(options(service)), maximum_concurrent_rpcs=None)
    web = _Server(
        uvicorn.Config(
            application(lambda: service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(GRACE),
            server_header=False,
            h11_max_incomplete_event_size=1 << 16,
        )
    )
    task: asyncio.Task[None] | None = None
    try:
        await service.start()
        place = 0
        if grpc_port is not None:
            service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(lambda: service), server)
            place = server.add_insecure_port(f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}")
            await server.start()
        task = asyncio.create_task(web.serve(sockets=[listener]))
        while not web.started:
            if task.done():
                task.result()
                raise OSError("the HTTP server did not start")
            await asyncio.sleep(0.005)
        yield Addresses(host, listener.getsockname()[1], place), service
    finally:
        # New requests are refused by name while those that were taken are answered; then nobody listens any more.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(service.close(), GRACE)
        await server.stop(1.0)
        web.should_exit = True
        if task is not None:
            await task
        listener.close()


def serve(
    options_: Options, host: str, port: int, grpc_port: int | None, started: Callable[[int, int], None] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. The event loop is uvloop's, as Ray's is.

    Args:
        started: called with the ports of HTTP and gRPC when it listens.

    Raises:
        OSError, ValueError: as `running`.
    """

    async def until_told() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with running(options_, host, port, grpc_port) as (addresses, _):
            if started is not None:
                started(addresses.http, addresses.grpc)
            await stop.wait()

    uvloop.run(until_told())
