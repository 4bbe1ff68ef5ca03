"""A stand-in for torch.cuda, so that what becomes a CUDA graph can be tested on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pykernels.cuda.graphs import CudaGraphs


class Network:
    """A program that remembers its last call: what a graph captures."""

    def __init__(self, fn: Callable[..., tuple[Any, ...]] = lambda x, *_: (x * 2 + 1, None)) -> None:
        self.fn = fn
        self.calls = 0

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        self.calls += 1
        self.last = inputs, self.fn(*inputs)
        return self.last[1]


class Cuda:
    """Streams, events and graphs that do their work at once, and a log of it."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.log: list[str] = []
        self.capturing = False
        self.fails = False

    def _noted(self, name: str) -> Any:
        return type(name, (), {"__getattr__": lambda _, what: lambda *args: self.log.append(f"{name}.{what}")})()

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self, device: torch.device) -> Any:
        return self._noted("current")

    def Stream(self, device: torch.device) -> Any:
        return self._noted("side")

    def Event(self) -> Any:
        return self._noted("event")

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> str:
        self.log.append("pool")
        return "pool"

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def CUDAGraph(self) -> Any:
        cuda = self

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")
                inputs, outputs = self.captured
                for y, new in zip(outputs, cuda.network.fn(*inputs), strict=True):
                    if isinstance(y, torch.Tensor):
                        y.copy_(new)

        return Graph()

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: str, stream: Any, capture_error_mode: str) -> Iterator[None]:
        assert pool == "pool" and capture_error_mode == "thread_local"
        yield
        if self.fails:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore words")
        graph.captured = self.network.last
        self.log.append("captured")


def graphs(limit: int = 8, network: Network | None = None) -> tuple[CudaGraphs, Network, Cuda]:
    network = network or Network()
    cuda = Cuda(network)
    found = CudaGraphs(network, limit, cuda)
    found.device_type = "cpu"
    return found, network, cuda
