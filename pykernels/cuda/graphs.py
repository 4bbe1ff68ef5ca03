"""The GPU's plan of a lowered network: its launches captured once as a CUDA graph, then replayed with one call.

At small batches a GPU waits for Python to launch the next kernel. A graph has all launches of a network in it, with the
memory of everything between input and output; it belongs to one device and to the shapes, strides and dtypes that it
was captured for. Inputs are copied into the graph's, outputs are copied out of it.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _python_dispatch

from pykernels.ops.errors import reason

__all__ = ["PATIENCE", "CudaGraphs"]

SHAPES = 8  # graphs kept
PATIENCE = 8  # calls after which another kind of input takes the place of the one that was used last the longest ago
WARM_UP = 3  # calls before a capture: kernels are compiled and workspaces allocated in the first


@dataclass
class _Captured:
    graph: Any
    inputs: list[torch.Tensor]
    outputs: list[Any]


class CudaGraphs:
    """Calls `program` through CUDA graphs, one for each kind of input; itself where that cannot be.

    Calls of several threads and streams wait for each other, since they share the graphs' memory.

    Args:
        program: takes tensors and other values, returns a flat tuple of tensors and other values.
        limit: how many graphs are kept.
        cuda: torch.cuda, or what stands in for it in a test.

    Attributes:
        refused: why no graph is captured any more, since a capture failed; or None.
    """

    device_type = "cuda"

    def __init__(self, program: Callable[..., Any], limit: int = SHAPES, cuda: Any = torch.cuda) -> None:
        self.program = program
        self.limit = limit
        self.cuda = cuda
        self.refused: str | None = None
        self._kept: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._waiting: Counter[Hashable] = Counter()
        self._pools: dict[torch.device, Any] = {}
        self._done: dict[torch.device, Any] = {}  # events: the outputs of the last call have been copied out
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """What `program` returns for these inputs."""
        if self.why_not(inputs) is not None:
            return self.program(*inputs)
        device = next(x.device for x in inputs if isinstance(x, torch.Tensor))
        key = _key(inputs)
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        with self._lock, self.cuda.device(device), torch.inference_mode(False), torch.no_grad():
            stream = self.cuda.current_stream(device)
            if device not in self._done:
                self._pools[device], self._done[device] = self.cuda.graph_pool_handle(), self.cuda.Event()
            stream.wait_event(self._done[device])
            captured = self._kept.get(key)
            if captured is None:
                if not self._worth(key):
                    return self.program(*inputs)
                captured = self._capture(inputs, device)
                if captured is None:
                    return self.program(*inputs)
                while len(self._kept) >= self.limit:  # a capture has waited for all that ran before
                    self._kept.popitem(last=False)
                self._kept[key] = captured
            self._kept.move_to_end(key)
            for static, x in zip(captured.inputs, tensors, strict=True):
                static.copy_(x, non_blocking=True)
            captured.graph.replay()
            outputs = tuple(y.clone() if isinstance(y, torch.Tensor) else y for y in captured.outputs)
            self._done[device].record(stream)
        return outputs

    def _worth(self, key: Hashable) -> bool:
        """Whether to capture this kind of input: with many kinds in turn, each capture would drive out another."""
        if len(self._kept) < self.limit:
            return True
        if len(self._waiting) >= 8 * self.limit:
            self._waiting.clear()
        self._waiting[key] += 1
        if self._waiting[key] < PATIENCE:
            return False
        del self._waiting[key]
        return True

    def why_not(self, inputs: tuple[Any, ...]) -> str | None:
        """Why this call runs without a graph, or None."""
        if self.refused is not None:
            return self.refused
        if torch.compiler.is_compiling() or _python_dispatch.is_in_torch_dispatch_mode():
            return "the call is traced"
        devices = {x.device for x in inputs if isinstance(x, torch.Tensor)}
        if {device.type for device in devices} != {self.device_type}:
            return f"inputs are not on a {self.device_type} device"
        if len(devices) > 1:
            return "inputs are on several devices"
        if self.cuda.is_current_stream_capturing():
            return "a capture is under way: the network becomes part of it"
        if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
            return "gradients are recorded"
        if torch._C._are_functorch_transforms_active():
            return "the call is transformed by torch.func"
        if not all(isinstance(x, (torch.Tensor, int, float, bool, str, type(None))) for x in inputs):
            return "an input is neither a tensor nor a number"
        return None

    def __len__(self) -> int:
        return len(self._kept)

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the network captures its own graphs."""

    def __reduce__(self) -> Any:
        return _nothing, ()

    def _capture(self, inputs: tuple[Any, ...], device: torch.device) -> _Captured | None:
        """A graph for inputs like these; None, with the reason in `refused`, when there can be none."""
        given = [_like(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        current, side = self.cuda.current_stream(device), self.cuda.Stream(device)
        side.wait_stream(current)
        with self.cuda.stream(side):
            for _ in range(WARM_UP):
                self.program(*given)
        current.wait_stream(side)
        graph = self.cuda.CUDAGraph()
        try:
            # Other threads may allocate and synchronize meanwhile.
            with self.cuda.graph(graph, self._pools[device], side, capture_error_mode="thread_local"):
                outputs = list(self.program(*given))
        except RuntimeError as error:
            self.refused = f"the network cannot be captured as a CUDA graph ({reason(error)})"
            warnings.warn(f"pykernels: {self.refused}; it runs call by call", stacklevel=4)
            return None
        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        return _Captured(graph, tensors, outputs)


def _like(x: torch.Tensor) -> torch.Tensor:
    """A tensor of x's strides and values that owns its memory."""
    static = (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) if _dense(x) else torch.empty_like(x)
    )
    return static.copy_(x)


def _dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _key(inputs: tuple[Any, ...]) -> Hashable:
    return tuple(
        (x.device, x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else (type(x), x) for x in inputs
    )


def _nothing() -> None:
    return None
