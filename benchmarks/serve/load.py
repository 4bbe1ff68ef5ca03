"""Clients that ask a server again and again, from a process of their own: what became of every request."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import multiprocessing
import ssl
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Asked", "Load", "told"]


class Asked(NamedTuple):
    """A request: when it was sent and answered (`time.monotonic`), and by what: a status, or the name of an error."""

    begin: float
    end: float
    answer: int | str


class Load:
    """Some clients, each of which sends its next request when it has the answer to the last one.

    Args:
        url: of the server; https is not verified.
        model: its name.
        x: what is asked for, sent as bytes.
        clients: how many ask at once.
        hang_up: seconds after which clients close their connection without waiting for the answer, if any.
        timeout: seconds after which a request counts as not answered.
        host: the network namespace they are in, if not in this one.
    """

    def __init__(
        self,
        url: str,
        model: str,
        x: np.ndarray,
        clients: int,
        hang_up: float | None = None,
        timeout: float = 60.0,
        host: str | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop, self._begun = context.Event(), context.Event()
        self._found: Any = context.SimpleQueue()
        self._process = context.Process(
            target=_run,
            args=(f"{url}/v2/models/{model}/infer", x, clients, hang_up, timeout, host),
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
            found = self._found.get() if self._process.is_alive() else None
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
    url: str,
    x: np.ndarray,
    clients: int,
    hang_up: float | None,
    timeout: float,
    host: str | None,
    *,
    begun: Any,
    stop: Any,
    found: Any,
) -> None:
    import aiohttp
    import tritonclient.http as triton

    if host is not None:
        _enter(host)

    given = triton.InferInput("x", list(x.shape), triton.np_to_triton_dtype(x.dtype))
    given.set_data_from_numpy(x)
    body, length = triton.InferenceServerClient.generate_request_body([given])
    headers = {"Inference-Header-Content-Length": str(length), "Content-Type": "application/octet-stream"}
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    asked: list[tuple[float, float, int | str]] = []

    async def one(session: aiohttp.ClientSession) -> None:
        while not stop.is_set():
            begin = time.monotonic()
            answer: int | str
            try:
                async with asyncio.timeout(hang_up), session.post(url, data=body, headers=headers) as response:
                    await response.read()
                    answer = response.status
            except TimeoutError:
                answer = "hung up" if hang_up is not None else "TimeoutError"
            except aiohttp.ClientError as error:
                answer = f"{type(error).__name__}: {error}"
            asked.append((begin, time.monotonic(), answer))
            if answer != 200:
                await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        connector = aiohttp.TCPConnector(limit=clients, ssl=unverified)
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=timeout), auto_decompress=False
        ) as session:
            begun.set()
            await asyncio.gather(*(one(session) for _ in range(clients)))

    asyncio.run(all_of_them())
    found.put(asked)
