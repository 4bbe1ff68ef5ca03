"""The table of every op of the schema with sample calls, which the framework contract is tested on.

A new op is added here: `test_contract` fails until it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pykernels.network.plan.format import Program, Record, encode

ops = torch.ops.pykernels
NHWC = torch.channels_last


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
        op: name in `torch.ops.pykernels`.
        make: builds the tensors of the call, by argument name; the first dimension of those named in `batched` is a
            batch size that may change.
        rest: the arguments that are no tensors, by name.
        batched: tensor arguments whose first dimension is the batch.
        label: what is particular about this call.
        mutated: tensor arguments that the op writes into.
    """

    op: str
    make: Callable[[int], dict[str, torch.Tensor]]
    rest: dict[str, Any]
    batched: tuple[str, ...] = ("x",)
    label: str = ""
    mutated: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For the test's id."""
        return f"{self.op} {self.label}".strip()

    def arguments(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The op's arguments that depend on tensors."""
        if self.op == "qcat":
            return {"xs": [tensors["a"], tensors["b"]]}
        if self.op == "run_plan":
            n = tensors["x"].shape[0]
            fixed = {name: tensors[name] for name in ("plan", "weights")}
            return {**fixed, "inputs": [tensors["x"]], "out_sizes": [n, 8, 4, 3, n, 96]}
        return dict(tensors)

    def call(self, **tensors: torch.Tensor) -> Any:
        """Run the op. One without outputs writes into copies of its mutated arguments, which are returned."""
        gathered = self.arguments(tensors)
        gathered |= {name: tensors[name].clone() for name in self.mutated}
        outputs = getattr(ops, self.op)(**gathered, **self.rest)
        return [gathered[name] for name in self.mutated] if self.mutated else outputs


def images(n: int, c: int = 8, h: int = 9, w: int = 7) -> torch.Tensor:
    return torch.randn(n, c, h, w)


def bytes_(t: torch.Tensor, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    zero_point = 128 if dtype == torch.uint8 else 0
    return (t * 30 + zero_point).round().clamp(*((0, 255) if dtype == torch.uint8 else (-128, 127))).to(dtype)


def plan() -> torch.Tensor:
    """A max pool over [n, 8, 9, 7], and the same flattened."""
    pool = Record("max_pool2d", [0], [2, 2, 2, 2, 0, 0, 1, 1, 0])
    return encode(Program(0, [(0, 4)], [pool, Record("reshape", [1], [-2, -1])], [(1, True), (2, False)]))


def layouts(t: torch.Tensor) -> list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]]:
    return [("contiguous", torch.Tensor.contiguous), ("channels_last", lambda x: x.contiguous(memory_format=NHWC))]


GEOMETRY = {"kernel_size": [3, 3], "stride": [2, 1], "padding": [1, 0, 1, 1], "dilation": [1, 1], "groups": 1}
POOL = {"kernel_size": [3, 2], "stride": [2, 2], "padding": [1, 1], "ceil_mode": True}
QUANT = {"x_scale": 0.05, "x_zero_point": 128}
FLOAT_OUT = {"out_scale": None, "out_zero_point": 0}
OUT = {"out_scale": 0.1, "out_zero_point": 3, "out_dtype": torch.uint8}


def _scales(n: int) -> torch.Tensor:
    return torch.rand(n) * 0.02 + 0.001


CPU_ONLY = {"run_plan"}  # ops that are for CPU tensors


def samples() -> list[Sample]:
    """Every op, each in the memory formats and dtypes that matter to its shape function."""
    found: list[Sample] = []

    def add(
        op: str,
        make: Callable[[int], dict[str, torch.Tensor]],
        label: str = "",
        *,
        batched=("x",),
        mutated=(),
        **rest: Any,
    ) -> None:
        found.append(Sample(op, make, rest, tuple(batched), label, tuple(mutated)))

    weight, bias = torch.randn(16, 8, 3, 3) * 0.2, torch.randn(16)
    matrix, row = torch.randn(5, 12) * 0.3, torch.randn(5)
    q_weight, q_matrix = bytes_(weight * 4, torch.int8), bytes_(matrix * 4, torch.int8)

    # linear
    add("int8_mm", lambda n: {"a": bytes_(torch.randn(n, 4, 12)), "b": q_matrix.t()}, batched=["a"])
    add("linear_pack", lambda n: {"weight": matrix, "bias": row}, batched=[])
    add("int8_linear_pack", lambda n: {"weight": q_matrix, "weight_scale": _scales(5), "bias": row}, batched=[])
    for label, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        packed = ops.linear_pack(matrix.to(dtype), row)
        add("linear", lambda n, p=packed, d=dtype: {"x": torch.randn(n, 3, 12).to(d), "packed": p}, label,
            out_features=5, activation="gelu")  # fmt: skip
    packed = ops.linear_pack(matrix, None)
    add("linear", lambda n, p=packed: {"x": torch.randn(n, 12), "packed": p, "residual": torch.randn(n, 5)}, "residual",
        batched=["x", "residual"], out_features=5, residual_order="after")  # fmt: skip
    q_packed = ops.int8_linear_pack(q_matrix, _scales(5), row)
    add("int8_linear", lambda n, p=q_packed: {"x": torch.randn(n, 3, 12), "packed": p}, "dynamic", out_features=5)
    add("int8_linear", lambda n, p=q_packed: {"x": torch.randn(n, 12).half(), "packed": p}, "float16", out_features=5)
    add("int8_linear", lambda n, p=q_packed: {"x": bytes_(torch.randn(n, 12)), "packed": p}, "8 bit in and out",
        out_features=5, **QUANT, **OUT, activation="relu")  # fmt: skip

    # conv
    add("conv2d_pack", lambda n: {"weight": weight, "bias": bias}, batched=[])
    add("qconv2d_pack", lambda n: {"weight": q_weight, "weight_scale": _scales(16), "bias": bias}, batched=[])
    conv_packed = ops.conv2d_pack(weight, bias)
    q_conv_packed = ops.qconv2d_pack(q_weight, _scales(16), bias)
    statistics = {"running_mean": torch.randn(16), "running_var": torch.rand(16) + 0.5}
    for label, layout in layouts(weight):
        add("conv2d", lambda n, f=layout: {"x": f(images(n)), "packed": conv_packed}, label,
            out_channels=16, **GEOMETRY, activation="relu")  # fmt: skip
        add("qconv2d", lambda n, f=layout: {"x": f(bytes_(images(n))), "packed": q_conv_packed}, label,
            out_channels=16, **GEOMETRY, **QUANT, **OUT)  # fmt: skip
        geometry = {name: value for name, value in GEOMETRY.items() if name != "kernel_size"}
        add("conv_bn_act",
            lambda n, f=layout: {"x": f(images(n)), "weight": weight, "bias": bias, **statistics, "gamma": bias,
                                 "beta": bias},
            label, eps=1e-5, **geometry)  # fmt: skip
    add("qconv2d", lambda n: {"x": bytes_(images(n)), "packed": q_conv_packed, "residual": bytes_(images(n, 16, 5, 6))},
        "residual, float out", batched=["x", "residual"], out_channels=16, **GEOMETRY, **QUANT, **FLOAT_OUT,
        out_dtype=torch.float32, residual_scale=0.02, residual_zero_point=128)  # fmt: skip

    half_packed = ops.conv2d_pack(weight.half(), bias)
    add("conv2d", lambda n: {"x": images(n).half(), "packed": half_packed}, "float16", out_channels=16, **GEOMETRY)
    add("qconv2d",
        lambda n: {"x": bytes_(images(n)), "packed": q_conv_packed, "residual": images(n, 16, 5, 6).half()},
        "float16", batched=["x", "residual"], out_channels=16, **GEOMETRY, **QUANT, **FLOAT_OUT,
        out_dtype=torch.half)  # fmt: skip
    add("conv_bn_act",
        lambda n: {"x": images(n).half(), "weight": weight.half(), "bias": bias, **statistics, "gamma": bias,
                   "beta": bias},
        "float16", eps=1e-5, **geometry)  # fmt: skip

    # pool
    for label, layout in layouts(weight):

        def make(n: int, f=layout) -> dict[str, torch.Tensor]:
            return {"x": f(images(n))}

        def make_bytes(n: int, f=layout) -> dict[str, torch.Tensor]:
            return {"x": f(bytes_(images(n)))}

        for name in ("max_pool2d", "max_pool2d_with_indices"):
            add(name, make, label, dilation=[1, 2], **POOL)
        add("max_pool2d", make_bytes, f"{label} uint8", dilation=[1, 1], **POOL)
        for name in ("adaptive_max_pool2d", "adaptive_max_pool2d_with_indices", "adaptive_avg_pool2d"):
            add(name, make, label, output_size=[3, 2])
        add("avg_pool2d", make, label, count_include_pad=False, divisor_override=None, **POOL)
        add("qavg_pool2d", make_bytes, label, count_include_pad=True, divisor_override=5, **POOL, **QUANT, **OUT)
        add("qadaptive_avg_pool2d", make_bytes, label, output_size=[1, 1], **QUANT, out_scale=None, out_zero_point=0,
            out_dtype=torch.float32)  # fmt: skip
    for name in ("max_pool2d_with_indices", "adaptive_avg_pool2d"):
        rest = {"dilation": [1, 1], **POOL} if name.startswith("max") else {"output_size": [3, 2]}
        add(name, lambda n: {"x": images(n).half()}, "float16", **rest)

    # quantize
    q8 = {"dtype": torch.uint8}
    for label, layout in layouts(weight):

        def values(n: int, f=layout) -> dict[str, torch.Tensor]:
            return {"x": f(images(n))}

        def quantized(n: int, f=layout) -> dict[str, torch.Tensor]:
            return {"x": f(bytes_(images(n)))}

        def channels(n: int, f=layout) -> dict[str, torch.Tensor]:
            return {"x": f(images(n)), "scale": _scales(8), "zero_point": torch.full((8,), 7, dtype=torch.int32)}

        def pair(n: int, f=layout) -> dict[str, torch.Tensor]:
            return {"a": f(bytes_(images(n))), "b": f(bytes_(images(n)))}

        add("quantize_per_tensor", values, label, scale=0.03, zero_point=128, **q8)
        add("dequantize_per_tensor", quantized, label, scale=0.03, zero_point=128, dtype=torch.bfloat16)
        add("quantize_per_channel", channels, label, axis=1, dtype=torch.int8)
        add("dequantize_per_channel", lambda n, f=layout: {**channels(n, f), "x": f(bytes_(images(n)))}, label, axis=1,
            dtype=torch.float32)  # fmt: skip
        parameters = {"a_scale": 0.1, "a_zero_point": 3, "b_scale": 0.2, "b_zero_point": 120, **OUT}
        add("qadd", pair, label, batched=["a", "b"], **parameters, activation="relu")
        add("qmul", pair, label, batched=["a", "b"], **parameters)
        add("qmul", lambda n, f=layout: {"a": f(bytes_(images(n))), "b": bytes_(images(n, 8, 1, 1))}, f"{label}, gate",
            batched=["a", "b"], **parameters)  # fmt: skip
        add("run_plan", lambda n, f=layout: {"plan": plan(), "weights": torch.empty(0, dtype=torch.uint8),
            "x": f(images(n))}, label, out_dims=[4, 2], out_dtypes=[0, 0], out_channels_last=[1, 0])  # fmt: skip
        add("qcat", pair, label, batched=["a", "b"], scales=[0.1, 0.2], zero_points=[3, 4], dim=1, **OUT)
        add(
            "qlookup",
            lambda n, f=layout: {"x": f(bytes_(images(n))), "table": torch.arange(256).to(torch.uint8)},
            label,
        )
        # pointwise, upsample
        add("activate", values, label, activation="silu")
        add("leaky_relu", values, label, negative_slope=0.1)
        add("add", lambda n, f=layout: {"a": f(images(n)), "b": images(n, 8, 1, 1)}, label, batched=["a", "b"],
            activation="relu")  # fmt: skip
        for make in (values, quantized):
            kind = label if make is values else f"{label} uint8"
            add("upsample_nearest2d", make, kind, output_size=[11, 5], scale_factors=[])
            add("upsample_bilinear2d", make, kind, output_size=[], align_corners=False, scale_factors=[2.0, 1.5])
            add("interleave", make, kind, stride=[2, 2], crop=[0, 1, 2, 0], groups=2)
    add("activate", lambda n: {"x": images(n).half()}, "float16", activation="gelu")
    add("upsample_bilinear2d", lambda n: {"x": images(n).bfloat16()}, "bfloat16", output_size=[4, 9],
        align_corners=True, scale_factors=[])  # fmt: skip

    # normalize
    add("softmax", lambda n: {"x": images(n)}, dim=1)
    add("softmax", lambda n: {"x": torch.randn(n, 12).half()}, "float16", dim=-1)
    add("layer_norm", lambda n: {"x": torch.randn(n, 3, 12), "weight": torch.randn(12), "bias": torch.randn(12)},
        eps=1e-5)  # fmt: skip
    add("layer_norm", lambda n: {"x": torch.randn(n, 12).bfloat16()}, "bfloat16", weight=None, bias=None, eps=1e-5)

    # attention
    heads = ["query", "key", "value"]
    add("attention", lambda n: {"query": torch.randn(n, 4, 5, 8), "key": torch.randn(n, 2, 7, 8),
                                "value": torch.randn(n, 2, 7, 6)},
        batched=heads, mask=None, causal=True, scale=0.5)  # fmt: skip
    add("attention",
        lambda n: {"query": torch.randn(n, 5, 2, 8).half().transpose(1, 2), "key": torch.randn(n, 2, 7, 8).half(),
                   "value": torch.randn(n, 2, 7, 8).half()},
        "float16", batched=heads, mask=torch.rand(5, 7) < 0.8, causal=False, scale=None)  # fmt: skip

    add("quantize_per_tensor", lambda n: {"x": images(n).half()}, "float16", scale=0.03, zero_point=128, **q8)
    add("dequantize_per_tensor", lambda n: {"x": bytes_(images(n))}, "float16", scale=0.03, zero_point=128,
        dtype=torch.float16)  # fmt: skip
    add("quantize_per_token", lambda n: {"x": torch.randn(n, 5, 12)}, **q8)
    add("quantize_per_token", lambda n: {"x": torch.randn(n, 5, 12).half()}, "float16", **q8)
    add("dequantize_per_token",
        lambda n: {"x": bytes_(torch.randn(n, 12)), "scale": torch.rand(n, 1) + 0.1,
                   "zero_point": torch.full((n, 1), 9, dtype=torch.int32)},
        batched=["x", "scale", "zero_point"], dtype=torch.float32)  # fmt: skip
    add("quantize_per_block", lambda n: {"x": torch.randn(n, 40)}, block_size=16)
    add("dequantize_per_block",
        lambda n: {"x": bytes_(torch.randn(n, 32), torch.int8), "scale": torch.rand(n * 2) + 0.1},
        batched=["x", "scale"], block_size=16, dtype=torch.float32)  # fmt: skip

    # compress: 40 elements an image, of which two runs are sent
    segments = torch.tensor([[0, 70, 0], [81, 20, 3 * 36]])
    sent = torch.zeros(4 * 36, dtype=torch.uint8)
    ops.compress_encode(torch.randn(101), None, sent, segments, "int8", 32)
    add("compress_encode",
        lambda n: {"x": torch.randn(n, 40), "residual": torch.randn(n, 40), "payload": torch.zeros_like(sent),
                   "segments": segments},
        batched=["x", "residual"], mutated=["residual", "payload"], codec="int8", block=32, stochastic=True,
        seed=5)  # fmt: skip
    add("compress_encode",
        lambda n: {"x": torch.randn(n, 40).bfloat16(), "payload": torch.zeros_like(sent), "segments": segments},
        "no residual", mutated=["payload"], residual=None, codec="int4", block=32)  # fmt: skip
    add("compress_decode",
        lambda n: {"payloads": sent[None].repeat(2, 1), "out": torch.randn(n, 40), "segments": segments},
        batched=["out"], mutated=["out"], codec="int8", block=32, factor=0.5)  # fmt: skip
    add("compress_decode",
        lambda n: {"payloads": sent.repeat(n, 1), "out": torch.randn(101), "segments": segments,
                   "weights": torch.rand(n)},
        "weights", batched=["payloads", "weights"], mutated=["out"], codec="int8", block=32)  # fmt: skip
    add("compress_reduce",
        lambda n: {"payloads": sent.repeat(n, 1), "residual": torch.randn(101), "payload": torch.zeros_like(sent),
                   "segments": segments},
        batched=["payloads"], mutated=["residual", "payload"], codec="int8", block=32, factor=0.25)  # fmt: skip

    # sparse: 9 elements of the same runs
    chosen = torch.zeros(72, dtype=torch.uint8)
    ops.sparse_encode(torch.randn(101), torch.zeros(101), None, chosen, segments, 9)
    for label, velocity in (("", None), ("velocity", torch.randn(101))):
        add("sparse_encode",
            lambda n, v=velocity: {"x": torch.randn(101), "residual": torch.randn(101),
                                   "payload": torch.zeros(72 + n).byte(), "segments": segments,
                                   **({} if v is None else {"velocity": v})},
            label, batched=["payload"], mutated=["residual", "payload", *(["velocity"] if label else [])], k=9,
            **({"momentum": 0.9} if label else {"velocity": None}))  # fmt: skip
    add("sparse_decode", lambda n: {"payloads": chosen.repeat(n, 1), "out": torch.randn(101)}, batched=["payloads"],
        mutated=["out"], k=9, factor=0.25)  # fmt: skip
    add("randomk_encode",
        lambda n: {"x": torch.randn(n, 40), "residual": torch.randn(n, 40), "values": torch.zeros(9),
                   "segments": segments},
        batched=["x", "residual"], mutated=["residual", "values"], k=9, seed=3)  # fmt: skip
    add("randomk_decode", lambda n: {"values": torch.randn(9), "out": torch.randn(n, 40), "segments": segments},
        batched=["out"], mutated=["out"], k=9, seed=3, factor=0.5)  # fmt: skip
    return found
