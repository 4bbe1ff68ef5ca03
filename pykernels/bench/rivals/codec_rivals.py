"""What gradient codecs are held against: a copy of as many bytes, and the codecs of torch's own quantization hooks."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import quantization_hooks as hooks

from pykernels.bench.case import Case
from pykernels.bench.rivals.base import Absent, Rival, Run

_CHANNEL = 512
"""Elements of a channel: the default of `quantization_perchannel_hook`."""


class Copy(Rival):
    """`Tensor.copy_` of half as many bytes as the codec reads and writes: a ceiling, without an answer."""

    name = "torch copy_"
    families = frozenset({"codec", "sparse"})

    def __init__(self) -> None:
        super().__init__("fp32")

    def prepare(self, case: Case) -> Run:
        source = torch.ones(int(case.traffic["fp32"]) // 2, dtype=torch.uint8)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    def meaning(self, case: Case, output: Any) -> Any:
        return case.oracle


class TopK(Rival):
    """`torch.topk` of the magnitudes: no error feedback, and the positions in no order."""

    name = "torch.topk"
    families = frozenset({"sparse"})

    def __init__(self) -> None:
        super().__init__("fp32")

    def prepare(self, case: Case) -> Run:
        x, k = case.inputs[0], case.parameters["k"]
        return lambda: torch.topk(x.abs(), k).values


class TorchHook(Rival):
    """The codec inside `quantization_pertensor_hook` or `quantization_perchannel_hook`: 8 bits, no error feedback."""

    families = frozenset({"codec"})

    def __init__(self, per_channel: bool) -> None:
        super().__init__("fp32")
        self.per_channel = per_channel
        self.name = f"{'per-channel' if per_channel else 'per-tensor'} hook"

    def prepare(self, case: Case) -> Run:
        kind, codec = case.parameters["kind"], case.parameters["codec"]
        if codec != "int8":
            raise Absent("torch's hooks have 8 bits a gradient")
        if kind == "reduce":
            raise Absent("torch's hooks send every gradient to every rank")
        if kind == "encode":
            x = self._rows(case.inputs[0])
            return lambda: self._encode(x)
        codes, scale, zero_point = self._encode(self._rows(case.oracle))
        decode = hooks._dequantize_per_channel_backend if self.per_channel else hooks._dequantize_per_tensor_backend
        return lambda: decode(codes, scale, zero_point)

    def meaning(self, case: Case, output: Any) -> Any:
        if isinstance(output, tuple):
            codes, scale, zero_point = output
            shape = (-1, 1) if self.per_channel else (1,)
            output = (codes.float() - zero_point.view(shape)) * scale.view(shape)
        return output.view(-1)

    def _rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(-1, _CHANNEL) if self.per_channel else x

    def _encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        observers = torch.ao.quantization
        observer = observers.PerChannelMinMaxObserver() if self.per_channel else observers.MinMaxObserver()
        observer(x)
        scale, zero_point = observer.calculate_qparams()
        encode = hooks._quantize_per_channel_backend if self.per_channel else hooks._quantize_per_tensor_backend
        return encode(x, scale, zero_point), scale, zero_point
