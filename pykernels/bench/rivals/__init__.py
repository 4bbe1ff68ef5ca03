"""Everybody who can be measured. To add one: a class with `prepare(case)` (see base.py) and a line here."""

from __future__ import annotations

from pykernels.bench.rivals.base import Absent, Rival, Run
from pykernels.bench.rivals.codec_rivals import Copy, TopK, TorchHook
from pykernels.bench.rivals.onnxruntime_rival import OnnxRuntime
from pykernels.bench.rivals.openvino_rival import OpenVino
from pykernels.bench.rivals.ours import Ours, OursSums
from pykernels.bench.rivals.remote import ExecuTorch, LiteRT
from pykernels.bench.rivals.torch_rivals import Compiled, DynamicLinear, Eager, InductorInt8, IntMM, TorchaoLinear

__all__ = ["Absent", "Rival", "Run", "everybody"]


def everybody() -> list[Rival]:
    """All rivals and ours, in the order in which tables show them."""
    return [
        Ours("fp32"),
        Ours("bf16"),
        Ours("int8"),
        OursSums(),
        Eager("fp32"),
        Eager("bf16"),
        Eager("int8"),
        Compiled("fp32"),
        Compiled("bf16"),
        Compiled("int8"),
        InductorInt8(),
        OnnxRuntime("fp32"),
        OnnxRuntime("int8"),
        OpenVino("fp32"),
        OpenVino("bf16"),
        OpenVino("int8"),
        ExecuTorch("fp32"),
        ExecuTorch("int8"),
        LiteRT("fp32"),
        LiteRT("int8"),
        IntMM(),
        DynamicLinear(),
        TorchaoLinear(),
        Copy(),
        TopK(),
        TorchHook(per_channel=False),
        TorchHook(per_channel=True),
    ]
