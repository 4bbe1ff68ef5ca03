"""A service in this process, on an event loop of its own in another thread, and raw requests to it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import uvloop
from torch import nn

import pykernels as pk
from pykernels.serve.in_process import Addresses, running
from pykernels.serve.service import Options, Service

PATIENCE = 60  # seconds: whoever waits longer hangs


class Twins(nn.Module):
    """Two inputs and two outputs by name, of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor, count: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(image), "twice": count * 2}


def save(folder: Path, name: str, model: nn.Module, *inputs: torch.Tensor, version: int = 1, **options: Any) -> Path:
    """An optimized network as ``folder/name/version/net.pk``."""
    path = folder / name / str(version) / "net.pk"
    path.parent.mkdir(parents=True)
    torch.manual_seed(version)
    pk.optimize(model.eval(), inputs, **options).save(path)
    return path


class Running:
    """A service that runs, seen from outside of its event loop."""

    def __init__(self, addresses: Addresses, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        self.addresses, self.service, self.loop = addresses, service, loop

    @property
    def http(self) -> str:
        return f"{self.addresses.host}:{self.addresses.http}"

    @property
    def grpc(self) -> str:
        return f"{self.addresses.host}:{self.addresses.grpc}"

    def on_loop(self, work: Any) -> Any:
        """The result of a coroutine on the service's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def raw(
        self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a request as curl sends one."""
        connection = http.client.HTTPConnection(self.addresses.host, self.addresses.http, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()

    def json(self, method: str, path: str, content: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON of a request with JSON."""
        body = b"" if content is None else json.dumps(content).encode()
        status, _, answer = self.raw(method, path, body, {"content-type": "application/json", **headers})
        return status, json.loads(answer) if answer else None


@contextlib.contextmanager
def serving(**options: Any) -> Iterator[Running]:
    """A service with these options of `Options`."""
    ready: Future[Running] = Future()
    ended = threading.Event()

    async def run() -> None:
        try:
            async with running(Options(**options), port=0, grpc_port=0) as (addresses, service):
                await service.repository.settled()
                ready.set_result(Running(addresses, service, asyncio.get_running_loop()))
                while not ended.is_set():
                    await asyncio.sleep(0.01)
        except BaseException as error:
            if not ready.done():
                ready.set_exception(error)
            raise

    thread = threading.Thread(target=lambda: uvloop.run(run()), daemon=True)
    thread.start()
    try:
        yield ready.result(PATIENCE)
    finally:
        ended.set()
        thread.join(PATIENCE)
        assert not thread.is_alive()
