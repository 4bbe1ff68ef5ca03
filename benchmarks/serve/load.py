"""Clients that ask a server again and again, from a process of their own: what became of every request."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import multiprocessing
import pathlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

__all__ = ["Asked", "Load", "told"]


class Asked(NamedTuple):
    """A request: when it was sent and answered (`time.monotonic`), and by what: a status, or the name of an error."""

    begin: float
    end: float
    answer: int | str


class Given(NamedTuple):
    """What clients are told: whom to ask and what; the certificate that they trust, where there is TLS; what they send
    again, where they do (gRPC's service config); seconds after which a request counts as not answered."""

    protocol: str
    address: str
    model: str
    x: np.ndarray
    certificate: str | None
    retries: str | None
    timeout: float


Ask: TypeAlias = Callable[[], Awaitable[int | str]]  # one request; what became of it, as in `Asked`


class Load:
    """Some clients, each of which sends its next request when it has the answer to the last one.

    Args:
        address: of the server, ``host:port``.
        model: its name.
        x: what is asked for, sent as bytes.
        clients: how many ask at once.
        protocol: ``http`` or ``grpc``.
        certificate: the server's own, where it speaks TLS.
        retries: service config of gRPC's clients; without, nothing is sent again.
        hang_up: seconds after which clients close their connection without waiting for the answer, if any.
        timeout: seconds after which a request counts as not answered.
        host: the network namespace they are in, if not in this one.
    """

    def __init__(
        self,
        address: str,
        model: str,
        x: np.ndarray,
        clients: int,
        protocol: str = "http",
        certificate: pathlib.Path | None = None,
        retries: str | None = None,
        hang_up: float | None = None,
        timeout: float = 60.0,
        host: str | None = None,
    ) -> None:
        trusted = None if certificate is None else str(certificate)
        given = Given(protocol, address, model, x, trusted, retries, timeout)
        context = multiprocessing.get_context("spawn")
        self._stop, self._begun = context.Event(), context.Event()
        self._found: Any = context.SimpleQueue()
        self._process = context.Process(
            target=_run,
            args=(given, clients, hang_up, host),
            kwargs={"begun": self._begun, "stop": self._stop, "found": self._found},
        )

    @contextlib.contextmanager
    def running(self) -> Iterator[list[Asked]]:
        """Asks while the context lasts; the list that it yields is filled at its end."""
        asked: list[Asked] = []
        self._process.start()
        try:
            if not self._begun.wait(60):
                raise RuntimeError("the clients did not start")
            yield asked
        finally:
            self._stop.set()
            while self._process.is_alive() and self._found.empty():
                time.sleep(0.05)
            found = None if self._found.empty() else self._found.get()
            self._process.join()
        if found is None:
            raise RuntimeError("the clients died")
        asked += [Asked(*each) for each in found]


def told(asked: list[Asked]) -> dict[int | str, int]:
    """How often each answer came."""
    return dict(collections.Counter(each.answer for each in asked).most_common())


def _enter(host: str) -> None:
    """Move this process into a network namespace (`os.setns` comes with Python 3.12)."""
    with open(f"/var/run/netns/{host}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {host}")


def _run(
    given: Given, clients: int, hang_up: float | None, host: str | None, *, begun: Any, stop: Any, found: Any
) -> None:
    if host is not None:
        _enter(host)
    asked: list[tuple[float, float, int | str]] = []

    async def one(ask: Ask) -> None:
        while not stop.is_set():
            begin = time.monotonic()
            answer: int | str
            try:
                async with asyncio.timeout(hang_up):
                    answer = await ask()
            except TimeoutError:
                answer = "hung up" if hang_up is not None else "TimeoutError"
            asked.append((begin, time.monotonic(), answer))
            if answer != 200:
                await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        async with contextlib.AsyncExitStack() as opened:
            asks = [await opened.enter_async_context(_PROTOCOLS[given.protocol](given)) for _ in range(clients)]
            begun.set()
            await asyncio.gather(*map(one, asks))

    asyncio.run(all_of_them())
    found.put(asked)


@contextlib.asynccontextmanager
async def _http(given: Given) -> AsyncIterator[Ask]:
    import aiohttp
    import tritonclient.http as triton

    tensor = triton.InferInput("x", list(given.x.shape), triton.np_to_triton_dtype(given.x.dtype))
    tensor.set_data_from_numpy(given.x)
    body, length = triton.InferenceServerClient.generate_request_body([tensor])
    headers = {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}
    trusted = None if given.certificate is None else ssl.create_default_context(cafile=given.certificate)
    if trusted is not None:
        trusted.check_hostname = False
    scheme = "http" if trusted is None else "https"
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=trusted or True),
        timeout=aiohttp.ClientTimeout(total=given.timeout),
        auto_decompress=False,
    ) as session:

        async def ask() -> int | str:
            try:
                url = f"{scheme}://{given.address}/v2/models/{given.model}/infer"
                async with session.post(url, data=body, headers=headers) as response:
                    await response.read()
                    return response.status
            except aiohttp.ClientError as error:
                return f"{type(error).__name__}: {error}"

        yield ask


@contextlib.asynccontextmanager
async def _grpc(given: Given) -> AsyncIterator[Ask]:
    import grpc
    import tritonclient.grpc as triton
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    request = service_pb2.ModelInferRequest(model_name=given.model, raw_input_contents=[given.x.tobytes()])
    request.inputs.add(name="x", shape=given.x.shape, datatype=triton.np_to_triton_dtype(given.x.dtype))
    options: list[tuple[str, Any]] = [("grpc.use_local_subchannel_pool", 1)]  # a connection for each, as over HTTP
    if given.retries is None:
        options.append(("grpc.enable_retries", 0))
    else:
        options += [("grpc.service_config", given.retries), ("grpc.per_rpc_retry_buffer_size", 2 * given.x.nbytes)]
    if given.certificate is None:
        channel = grpc.aio.insecure_channel(given.address, options)
    else:
        trusted = grpc.ssl_channel_credentials(pathlib.Path(given.certificate).read_bytes())
        named = ("grpc.ssl_target_name_override", "localhost")
        channel = grpc.aio.secure_channel(given.address, trusted, [*options, named])
    async with channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

        async def ask() -> int | str:
            try:
                await infer(request, timeout=given.timeout)
                return 200  # OK, as HTTP calls it
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"

        yield ask


_PROTOCOLS: dict[str, Callable[[Given], contextlib.AbstractAsyncContextManager[Ask]]] = {"http": _http, "grpc": _grpc}
