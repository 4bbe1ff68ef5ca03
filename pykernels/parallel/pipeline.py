"""Pipelines of torch: activations and their gradients travel between stages as records of a codec.

A stage of ``torch.distributed.pipelining`` makes the operations that receive and send in four methods, and consumes
what was received in two. A registered stage's six methods are wrapped: each tensor of an operation is replaced by its
payload, which is encoded before it is sent and decoded before the chunk is computed. Schedules, the order of messages
and the exchange of shapes stay torch's, and what goes between two stages of one rank stays as it is. On a CPU what is
received is asked for before anything of the same batch is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.stage import _PipelineStageBase
from torch.nn.parallel import DistributedDataParallel

from pykernels.comm.collectives import agree
from pykernels.comm.layout import FLOATS, check_block, lay_out_tensor
from pykernels.comm.register import register
from pykernels.comm.stats import Meter, Stats
from pykernels.comm.wire import Wire, draw
from pykernels.ops import compress

STAGE_CODECS = ("fp32", "bf16", "fp16", "fp8", "int8", "int4")
FORMAT = 1  # of state_dict
FORWARD, BACKWARD = "forward", "backward"


class StageHandle:
    """A registered stage: its statistics, what a checkpoint must hold of it, and the way back."""

    def __init__(self, stage: _PipelineStageBase, codecs: dict[str, str], block: int, stochastic: bool, seed: int):
        self.stage, self.codecs, self.block, self.stochastic, self.seed = stage, codecs, block, stochastic, seed
        self._meter = Meter()
        self._messages = 0  # of gradients, so far: each draws anew
        self._wires: dict[tuple[str, torch.Size, torch.dtype], Wire | None] = {}
        # Payloads stay until the next step's take their places, since a send may be under way until the step ends.
        self._payloads: dict[tuple[str, str, int, int], torch.Tensor] = {}
        self._arriving: dict[tuple[str, int], list[tuple[Wire, torch.Tensor, torch.Tensor]]] = {}
        self._methods = {
            "get_fwd_recv_ops": partial(self._receive, stage.get_fwd_recv_ops, FORWARD),
            "get_bwd_recv_ops": partial(self._receive, stage.get_bwd_recv_ops, BACKWARD),
            "get_fwd_send_ops": partial(self._send, stage.get_fwd_send_ops, FORWARD),
            "get_bwd_send_ops": partial(self._send, stage.get_bwd_send_ops, BACKWARD),
            "forward_one_chunk": partial(self._compute, stage.forward_one_chunk, FORWARD),
            "backward_one_chunk": partial(self._compute, stage.backward_one_chunk, BACKWARD),
        }
        vars(stage).update(self._methods)  # before those of its class

    def remove(self) -> None:
        """Send everything uncompressed again. All ranks do it between the same steps."""
        for name, method in self._methods.items():
            if vars(self.stage).get(name) is method:  # not those of a handle that was made since
                del vars(self.stage)[name]

    def _wire(self, direction: str, tensor: torch.Tensor) -> Wire | None:
        """How `tensor` travels; None for as it is. Both ends know its shape and dtype, and come to the same answer."""
        codec = self.codecs[direction]
        key = direction, tensor.shape, tensor.dtype
        if key not in self._wires:
            wire = None
            if codec != "fp32" and tensor.dtype in FLOATS:
                layout = lay_out_tensor(tensor.shape, codec, self.block)
                random = direction == BACKWARD and self.stochastic and compress.CODECS[codec].stochastic
                if layout.payload_bytes < tensor.numel() * tensor.element_size():
                    wire = Wire(layout, codec, direction, stochastic=random)
            self._wires[key] = wire
        return self._wires[key]

    def _payload(self, key: tuple[str, str, int, int], wire: Wire, device: torch.device) -> torch.Tensor:
        payload = self._payloads.get(key)
        if payload is None or payload.numel() != wire.layout.payload_bytes:
            payload = torch.zeros(wire.layout.payload_bytes, dtype=torch.uint8, device=device)
            self._payloads[key] = payload
        return payload

    def _receive(self, original: Callable[[int], list[dist.P2POp]], direction: str, chunk: int) -> list[dist.P2POp]:
        operations = original(chunk)
        arriving = self._arriving[direction, chunk] = []
        for place, operation in enumerate(operations):
            tensor = operation.tensor
            if (wire := self._wire(direction, tensor)) is not None:
                operation.tensor = self._payload((direction, "received", chunk, place), wire, tensor.device)
                arriving.append((wire, operation.tensor, tensor))
            if tensor.device.type == "cpu":
                _receive_now(operation)
        return operations

    @torch.no_grad()
    def _send(self, original: Callable[[int], list[dist.P2POp]], direction: str, chunk: int) -> list[dist.P2POp]:
        operations = original(chunk)
        for place, operation in enumerate(operations):
            tensor = operation.tensor
            if (wire := self._wire(direction, tensor)) is not None:
                if any(size > 1 and not stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
                    what = "output" if direction == FORWARD else "input's gradient"
                    raise ValueError(
                        f"pykernels: stage {self.stage.stage_index}: {what} {place} of shape {tuple(tensor.shape)} is "
                        "expanded: several of its elements are one in memory, where the other stage cannot write them; "
                        "call contiguous()"
                    )
                operation.tensor = self._payload((direction, "sent", chunk, place), wire, tensor.device)
                seed = 0
                if wire.stochastic:
                    seed = draw(self.seed, self.stage.stage_index, self._messages)
                    self._messages += 1
                with self._meter.timed("encode"):
                    wire.encode(tensor.detach().contiguous(), operation.tensor, seed)
            self._meter.sent(tensor.nbytes, operation.tensor.nbytes)
        return operations

    def _compute(self, original: Callable[..., Any], direction: str, chunk: int, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.get("full_backward", True) and isinstance(self.stage.submod, DistributedDataParallel):
            raise RuntimeError(
                f"pykernels: stage {self.stage.stage_index} is in DistributedDataParallel under a zero-bubble "
                "schedule, whose backward in two parts never averages its gradients: take fully_shard or another one"
            )
        with torch.no_grad(), self._meter.timed("decode"):
            for wire, payload, tensor in self._arriving.pop((direction, chunk), ()):
                flat = tensor.detach()
                whole = flat if flat.is_contiguous() else torch.empty_like(flat, memory_format=torch.contiguous_format)
                wire.decode(payload, whole)
                if whole is not flat:
                    flat.copy_(whole)
        if direction == FORWARD and chunk == 0:
            self._meter.total.steps += 1
        return original(chunk, *args, **kwargs)

    def stats(self) -> Stats:
        """Bytes that this stage would have sent uncompressed, and that it sent; seconds of encoding and decoding."""
        return self._meter.snapshot()

    def state_dict(self) -> dict[str, Any]:
        """What goes on drawing where it stopped. Each stage has its own."""
        return {"format": FORMAT, "stage": self.stage.stage_index, "codecs": dict(self.codecs), "sent": self._messages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ValueError: a state of another format, stage or pair of codecs, or a damaged one.
        """
        mine = self.state_dict()
        if not isinstance(state, Mapping) or type(state.get("sent")) is not int:
            raise ValueError(
                f"pykernels: state_dict: {type(state).__name__} is not what state_dict gave: it is damaged"
            )
        for what in ("format", "stage", "codecs"):
            if state.get(what) != mine[what]:
                raise ValueError(f"pykernels: state_dict: {what} is {state.get(what)}, here it is {mine[what]}")
        self._messages = state["sent"]


def _receive_now(operation: dist.P2POp) -> None:
    """Begin to receive; whoever runs the operation gets the work that is under way.

    gloo sends data when the receiver has said that it is ready, and says so over the connection that carries the data
    of the other direction, behind what was begun there. Schedules send before they receive: of two ranks that exchange
    something, the later one would hold up the other until all it sends has gone, and both directions take turns.
    """
    work = operation.op(operation.tensor, group=operation.group, tag=operation.tag, group_src=operation.group_peer)
    operation.op = lambda *args, **kwargs: work


@register.register
def register_stage(
    stage: _PipelineStageBase,
    forward: str = "int8",
    backward: str = "int8",
    *,
    block: int = 256,
    stochastic: bool = True,
    seed: int = 0,
) -> StageHandle:
    """Compress what a pipeline's stage sends to other ranks: ``comm.register(stage, forward="int8", backward="int8")``.

    Call it for every stage, between its construction and the first step, on all ranks alike: ranks with several stages
    as often as the others have. Any schedule, ``PipelineStage`` or ``build_stage``. Tensors in fp32, bf16 and fp16 are
    compressed; others, and those that would not become smaller, go as they are. A record never holds two tokens (rows
    of the last dimension; where that is short, of as many of the last dimensions as have 128 elements that fill their
    records). There is no error feedback: the next chunk holds other samples, to which the error does not belong.

    Args:
        forward: codec of activations, one of ``STAGE_CODECS``; "fp32" leaves them as they are, whatever their dtype.
        backward: codec of their gradients.
        block: elements that share a scale, at most; a multiple of 32.
        stochastic: round gradients at random, without bias, where the codec can (int8, int4).
        seed: of that rounding.

    Raises:
        ValueError: an unknown codec, or a block out of range.
        RuntimeError: the stage is registered already; ranks disagree about codecs or options.
    """
    for name, codec in ((FORWARD, forward), (BACKWARD, backward)):
        if codec not in STAGE_CODECS:
            raise ValueError(f"pykernels: {name} must be one of {', '.join(STAGE_CODECS)}, not {codec!r}")
    check_block(block)
    if "forward_one_chunk" in vars(stage):
        raise RuntimeError(f"pykernels: stage {stage.stage_index} is registered already: remove() its handle first")
    group = stage.group if stage.group is not None else dist.group.WORLD
    assert group is not None  # a stage cannot be made without one
    options = [f"forward {forward}", f"backward {backward}", f"block {block}"]
    agree(group, "a pipeline", options, None, "All stages of a pipeline must be registered with the same codecs")
    return StageHandle(stage, {FORWARD: forward, BACKWARD: backward}, block, stochastic, seed)
