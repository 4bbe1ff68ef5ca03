"""Stand-ins for torch.cuda, so that what becomes a CUDA graph, and what is copied to a device and back, can be tested
on the CPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import pykernels as pk
from pykernels import optimized
from pykernels.cuda import registry
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


class Gpu:
    """CUDA devices made of this machine's memory, for networks that `pk.load` or `Optimized.to` put there.

    What is copied to a device must be pinned, and a network there takes nothing else. What comes back is poison until
    somebody has waited for an event that was recorded behind it on the same stream. Calls become graphs as ever.
    """

    def __init__(self, patch: pytest.MonkeyPatch, count: int = 1) -> None:
        self.log: list[str] = []
        self.streams: list[Any] = []
        self.graphs: list[tuple[CudaGraphs, Network, Cuda]] = []
        self._current = threading.local()
        self._to, self._forward, self._move = torch.Tensor.to, pk.Optimized.forward, pk.Optimized.to
        complaint = registry.unusable

        def unusable(device: torch.device) -> str | None:
            if device.type != "cuda":
                return complaint(device)
            return None if (device.index or 0) < count else f"torch finds {count} CUDA devices here"

        patch.setattr(registry, "unusable", unusable)
        patch.setattr(optimized, "CudaGraphs", self._capturing)
        patch.setattr(pk.Optimized, "to", lambda network, device: self._moved(network, device))
        patch.setattr(pk.Optimized, "forward", lambda network, *args, **kwargs: self._called(network, args, kwargs))
        patch.setattr(torch.Tensor, "pin_memory", self._pinned)
        patch.setattr(torch.Tensor, "to", lambda x, *args, **kwargs: self._copied(x, args, kwargs))
        for name, value in {
            "Stream": self._stream,
            "Event": self._event,
            "stream": self._on,
            "synchronize": lambda device: self.log.append(f"synchronized {device}"),
            "get_device_name": lambda device: "A GPU",
            "device_count": lambda: count,
        }.items():
            patch.setattr(torch.cuda, name, value)

    @property
    def captured(self) -> int:
        """How many graphs were captured."""
        return sum(cuda.log.count("captured") for _, _, cuda in self.graphs)

    def _capturing(self, program: Any) -> CudaGraphs:
        self.graphs.append(graphs(network=Network(program)))
        return self.graphs[-1][0]

    def _moved(self, network: pk.Optimized, device: Any) -> pk.Optimized:
        if torch.device(device).type != "cuda":
            return self._move(network, device)
        network._report, network._graphs = network._report.on(torch.device(device)), None
        return network

    def _called(self, network: pk.Optimized, args: Any, kwargs: Any) -> Any:
        if network.report().device == "cpu":
            return self._forward(network, *args, **kwargs)
        assert all(hasattr(x, "on_gpu") for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        assert self._current.stream is not None, "the default stream waits for every other"
        answer = self._forward(network, *args, **kwargs)
        for y in pytree.tree_leaves(answer):
            y.on_gpu = True
        return answer

    @staticmethod
    def _pinned(x: Any) -> Any:
        y = x.clone()
        y.pinned = True
        return y

    def _copied(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "non_blocking" not in kwargs:
            return self._to(x, *args, **kwargs)
        assert kwargs["non_blocking"]
        if torch.device(args[0]).type == "cuda":
            assert x.pinned
            y = x.clone()
            y.on_gpu = True
            return y
        assert x.on_gpu
        y = torch.full_like(x, 77)
        self._current.stream.pending.append((y, x))
        return y

    def _stream(self, device: torch.device) -> Any:
        self.streams.append(type("Stream", (), {"pending": [], "thread": threading.current_thread()})())
        return self.streams[-1]

    @contextlib.contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        assert stream.thread is threading.current_thread()
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = None

    def _event(self, blocking: bool) -> Any:
        gpu = self

        class Event:
            def record(self) -> None:
                self.behind, gpu._current.stream.pending = gpu._current.stream.pending, []

            def synchronize(self) -> None:
                for y, x in self.behind:
                    y.copy_(x)
                gpu.log.append("slept" if blocking else "span")

        return Event()
