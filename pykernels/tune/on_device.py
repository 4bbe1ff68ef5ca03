"""Networks on CUDA devices, called from the host: inputs and answers in the host's memory, as whoever serves has them.

A call copies its inputs to the device, computes, and copies the answers back, on a stream of its thread. So the copies
of one thread run beside the other threads' calls, and nothing of a call is under way any more when it returns.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pykernels.cuda import registry
from pykernels.cuda.graphs import PATIENCE
from pykernels.optimized import Optimized

__all__ = ["OnDevice", "calls_to_warm_up", "copy_on", "from_host"]


class OnDevice:
    """A network on a CUDA device that takes and answers with tensors of the host's memory, from any thread.

    Args:
        network: on a CUDA device. Its calls replay CUDA graphs as ever.

    Attributes:
        network: as given.
        device: where it is.
        bytes: of its weights there.
    """

    def __init__(self, network: Optimized) -> None:
        self.network = network
        self.device = torch.device(network.report().device)
        self.bytes = network.report().bytes_after
        self.in_spec, self.out_spec = network.in_spec, network.out_spec
        self.input_names, self.output_names = network.input_names, network.output_names
        self.example, self.free, self.dynamic = network.example, network.free, network.dynamic
        self._threads = threading.local()
        torch.cuda.synchronize(self.device)  # the weights are there before any stream reads them

    def nested(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Flat inputs as the positional and the keyword ones of a call."""
        return self.network.nested(inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer, in the host's memory (pinned).

        Raises:
            ValueError: an input is elsewhere: what writes it may still run on another stream.
        """
        with torch.cuda.stream(self._stream()):
            args, kwargs = pytree.tree_map(self._sent, (args, kwargs))
            answer = pytree.tree_map(_fetched, self.network(*args, **kwargs))
            # Waiting sleeps: the cores are shared with an event loop, or with other instances.
            done = torch.cuda.Event(blocking=True)
            done.record()
        done.synchronize()
        return answer

    def _stream(self) -> Any:
        """Of this thread: the default one would wait for all the others."""
        if not hasattr(self._threads, "stream"):
            self._threads.stream = torch.cuda.Stream(self.device)
        return self._threads.stream

    def _sent(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.device.type != "cpu":
            raise ValueError(f"inputs: a tensor is on {x.device}; calls from the host take those of its memory")
        # From pageable memory the driver copies piece by piece, and the thread waits.
        return x.pin_memory().to(self.device, non_blocking=True)


def _fetched(y: Any) -> Any:
    return y.to("cpu", non_blocking=True) if isinstance(y, torch.Tensor) else y  # pinned: torch sees to that


def copy_on(network: Optimized, device: torch.device | str) -> Optimized:
    """The network where it is on `device` already (``cuda`` is any CUDA device), else a copy of it there.

    Raises:
        ValueError: our ops do not run on `device`, or it is not here.
    """
    here, wanted = torch.device(network.report().device), torch.device(device)
    if here.type == wanted.type and wanted.index in (None, here.index):
        return network
    complaint = registry.unusable(wanted)
    if complaint is not None:
        raise ValueError(f"device: {wanted} cannot be used: {complaint}")
    return copy.deepcopy(network).to(wanted)


def from_host(network: Optimized) -> Optimized | OnDevice:
    """What is called with tensors of the host's memory: the network itself on the CPU."""
    return network if network.report().device == "cpu" else OnDevice(network)


def calls_to_warm_up(network: Any) -> int:
    """After so many calls of a kind of input those that follow are like each other: kernels are compiled, and a CUDA
    graph is captured even where so many kinds came before that a new one has to wait."""
    there = isinstance(network, OnDevice) or (isinstance(network, Optimized) and network.report().device != "cpu")
    return PATIENCE if there else 1
