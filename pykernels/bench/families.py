"""From the shapes in shapes/*.json to cases: what each family measures, with seeded data and the work it amounts to."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from pykernels import reference
from pykernels.bench import zoo
from pykernels.bench.case import Case, QuantizedLayer, pairs_saturate, qdq_ops
from pykernels.ops.names import ACTIVATIONS

SHAPES = pathlib.Path(__file__).parent / "shapes"
TOKENS = 128
SIZES = {"fp32": 4, "bf16": 2, "int8": 1}
Make = Callable[[], Case]
_REQUIRED = {
    "gemm": {"m", "k", "n"},
    "linear": {"name", "k", "n", "activation", "count"},
    "conv": {"in", "out", "size", "kernel", "stride", "padding", "groups", "activation", "count"},
    "pool": {"name", "kind", "channels", "size", "kernel", "stride", "padding"},
    "quantize": {"kind", "shape"},
    "codec": {"name", "block", "elements"},
    "sparse": {"data", "elements", "k"},
    "network": {"name", "batch"},
}
FAMILIES = tuple(_REQUIRED)


def load_shapes(folder: pathlib.Path = SHAPES) -> dict[str, dict[str, Any]]:
    """The shape files by name: {"resnet50": {"family": "conv", "source": ..., "layers": [...]}, ...}.

    Raises:
        ValueError: a file has an unknown family, no layers, or a layer without one of its family's keys.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text())
        family = data.get("family")
        if family not in _REQUIRED:
            raise ValueError(f"{file.name}: family must be one of {', '.join(FAMILIES)}, not {family!r}")
        if not data.get("layers"):
            raise ValueError(f"{file.name}: layers is empty")
        for i, layer in enumerate(data["layers"]):
            if missing := _REQUIRED[family] - layer.keys():
                raise ValueError(f"{file.name}: layer {i} lacks {', '.join(sorted(missing))}")
        if family == "linear" and not data.get("rows"):
            raise ValueError(f"{file.name}: rows is empty")
        found[file.stem] = data
    return found


def cases(family: str, groups: tuple[str, ...] = (), folder: pathlib.Path = SHAPES) -> Iterator[tuple[str, Make]]:
    """The cases of a family as (label, function that makes the case), so that only one at a time holds memory.

    groups: names of shape files, or for networks names of networks; none: all.

    Raises:
        ValueError: the family is unknown.
    """
    if family not in _REQUIRED:
        raise ValueError(f"family: must be one of {', '.join(FAMILIES)}, not {family!r}")
    for group, data in load_shapes(folder).items():
        if data["family"] != family:
            continue
        for layer in data["layers"]:
            if groups and group not in groups and str(layer.get("name")) not in groups:
                continue
            yield from _MAKERS[family](group, layer, data)


def _gemm(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    m, k, n = s["m"], s["k"], s["n"]
    name = f"{m}x{k}x{n}"

    def make() -> Case:
        g, top = torch.Generator().manual_seed(0), _largest_weight()
        layer = QuantizedLayer(
            x=torch.randint(0, 256, (m, k), generator=g, dtype=torch.uint8),
            x_scale=0.02,
            x_zero_point=128,
            weight=torch.randint(-top, top + 1, (n, k), generator=g, dtype=torch.int8),
            weight_scale=torch.rand(n, generator=g) * 1e-3 + 1e-3,
            bias=torch.randn(n, generator=g),
            out_scale=None,
            out_zero_point=0,
        )
        traffic = {"int8": m * k + n * k + 4.0 * m * n}
        return Case("gemm", group, name, 2.0 * m * n * k, traffic, quantized=layer, precisions=("int8",))

    yield name, make


def _activation(name: str) -> nn.Module:
    module: nn.Module = getattr(nn, ACTIVATIONS[name].module or "Identity")()
    return module


def _linear(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    k, n = s["k"], s["n"]
    for rows in data["rows"]:
        name = f"{s['name']} {rows}x{k}x{n}" + ("" if s["activation"] == "none" else f" {s['activation']}")

        def make(rows: int = rows, name: str = name) -> Case:
            with _seeded():
                model = nn.Sequential(nn.Linear(k, n), _activation(s["activation"])).eval()
                x = torch.randn(rows, k)
            # A dynamic int8 linear reads and writes fp32; only its weights are bytes.
            traffic = {p: float((rows * (k + n) + n) * (2 if p == "bf16" else 4) + n * k * z) for p, z in SIZES.items()}
            return Case("linear", group, name, 2.0 * rows * n * k, traffic, model, (x,), calibration=(x,))

        yield f"{group} {name}", make


def _conv(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    depthwise = s["groups"] == s["in"] and s["groups"] > 1
    kind = (
        f"{s['kernel']}x{s['kernel']}" + (f"/{s['stride']}" if s["stride"] > 1 else "") + (" dw" if depthwise else "")
    )
    name = f"{s['size']}x{s['size']}x{s['in']} {kind} -> {s['out']}"
    name += "" if s["activation"] == "none" else f" {s['activation']}"

    def make() -> Case:
        with _seeded():
            conv = nn.Conv2d(s["in"], s["out"], s["kernel"], s["stride"], s["padding"], groups=s["groups"])
            model = nn.Sequential(conv, _activation(s["activation"])).eval()
            x = torch.randn(1, s["in"], s["size"], s["size"]).contiguous(memory_format=torch.channels_last)
        layer = _quantized_conv(conv, x, s["activation"])
        out = (s["size"] + 2 * s["padding"] - s["kernel"]) // s["stride"] + 1
        values = x.numel() + conv.weight.numel() + s["out"] * out * out
        work = 2.0 * conv.weight.numel() * out * out
        traffic = {p: float(values * z + 4 * s["out"]) for p, z in SIZES.items()}
        return Case("conv", group, name, work, traffic, model, (x,), layer, parameters={"count": s["count"]})

    yield f"{group} {name}", make


def _quantized_conv(conv: nn.Conv2d, x: torch.Tensor, activation: str) -> QuantizedLayer:
    """Post-training quantization by minimum and maximum. relu6 becomes relu whose output range ends at 6."""
    weight, bias = conv.weight.detach(), conv.bias
    assert bias is not None
    scale = weight.abs().amax((1, 2, 3)) / _largest_weight()
    x_scale, x_zero = _affine(x)
    with torch.no_grad():
        y = conv(x)
        if activation != "none":
            y = torch.clamp(y, 0.0, 6.0 if activation == "relu6" else float("inf"))
    out_scale, out_zero = _affine(y)
    q = torch.clamp(torch.round(x / x_scale) + x_zero, 0, 255).to(torch.uint8)
    return QuantizedLayer(
        x=q.contiguous(memory_format=torch.channels_last),
        x_scale=x_scale,
        x_zero_point=x_zero,
        weight=torch.clamp(torch.round(weight / scale[:, None, None, None]), -127, 127).to(torch.int8),
        weight_scale=scale,
        bias=bias.detach(),
        out_scale=out_scale,
        out_zero_point=out_zero,
        stride=int(conv.stride[0]),
        padding=int(conv.padding[0]),
        groups=conv.groups,
        activation="none" if activation == "none" else "relu",
    )


def _affine(x: torch.Tensor) -> tuple[float, int]:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = float(torch.tensor((high - low) / 255, dtype=torch.float32))
    return scale, min(255, max(0, round(-low / scale)))


class _PoolBytes(nn.Module):
    """The pool on u8 with one scale: the maximum of the bytes, or the mean rounded half to even."""

    def __init__(self, pool: nn.Module, maximum: bool) -> None:
        super().__init__()
        self.pool = pool
        self.maximum = maximum

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.pool(x.float())
        return (y if self.maximum else torch.round(y)).to(torch.uint8)


def _pool(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    name = f"{s['name']} {s['kind']} {s['size']}x{s['size']}x{s['channels']} {s['kernel']}x{s['kernel']}/{s['stride']}"

    def make(precisions: tuple[str, ...]) -> Case:
        kernel, stride, padding = s["kernel"], s["stride"], s["padding"]
        pool: nn.Module = {
            "max": lambda: nn.MaxPool2d(kernel, stride, padding),
            "avg": lambda: nn.AvgPool2d(kernel, stride, padding),
            "global": lambda: nn.AdaptiveAvgPool2d(1),
        }[s["kind"]]()
        with _seeded():
            x = torch.randn(1, s["channels"], s["size"], s["size"])
        out = pool(x).numel()
        traffic = {p: float((x.numel() + out) * z) for p, z in SIZES.items()}
        if precisions == ("int8",):
            x = torch.clamp(torch.round(x * 40 + 100), 0, 255).to(torch.uint8)
            pool = _PoolBytes(pool, s["kind"] == "max")
        x = x.contiguous(memory_format=torch.channels_last)
        parameters = {"scale": 0.025, "zero_point": 100, **s}
        return Case("pool", group, name, 0.0, traffic, pool.eval(), (x,), parameters=parameters, precisions=precisions)

    yield f"{group} {name} floats", lambda: make(("fp32", "bf16"))
    yield f"{group} {name} bytes", lambda: make(("int8",))


class _QuantizePass(nn.Module):
    """Quantize, dequantize, or add two quantized tensors with relu: torch's own Q/DQ operators."""

    def __init__(self, kind: str, scale: float, zero_point: int, out_scale: float) -> None:
        super().__init__()
        self.kind, self.scale, self.zero_point, self.out_scale = kind, scale, zero_point, out_scale
        self.ops = qdq_ops()

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        q = self.ops
        if self.kind == "quantize":
            return q.quantize_per_tensor(xs[0], self.scale, self.zero_point, 0, 255, torch.uint8)
        a, *b = (q.dequantize_per_tensor(x, self.scale, self.zero_point, 0, 255, torch.uint8) for x in xs)
        if self.kind == "dequantize":
            return a
        return q.quantize_per_tensor(torch.relu(a + b[0]), self.out_scale, self.zero_point, 0, 255, torch.uint8)


def _quantize(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    name = f"{s['kind']} {'x'.join(map(str, s['shape']))}"

    def make() -> Case:
        parameters = {"kind": s["kind"], "scale": 0.025, "zero_point": 100, "out_scale": 0.04}
        with _seeded():
            x = torch.randn(s["shape"]).contiguous(memory_format=torch.channels_last)
            other = torch.randn(s["shape"]).contiguous(memory_format=torch.channels_last)
        inputs: tuple[torch.Tensor, ...] = (x,)
        if s["kind"] != "quantize":
            inputs = tuple(torch.clamp(torch.round(v * 40 + 100), 0, 255).to(torch.uint8) for v in (x, other))
        if s["kind"] == "dequantize":
            inputs = inputs[:1]
        moved = {"quantize": 5.0, "dequantize": 5.0, "add": 3.0}[s["kind"]] * x.numel()
        model = _QuantizePass(s["kind"], 0.025, 100, 0.04).eval()
        return Case(
            "quantize", group, name, 0.0, {"int8": moved}, model, inputs, parameters=parameters, precisions=("int8",)
        )

    yield name, make


class _CodecPass(nn.Module):
    """The oracle of one pass of a codec: what its bytes mean, fp32 [elements]."""

    def __init__(self, kind: str, codec: str, block: int, elements: int) -> None:
        super().__init__()
        self.kind, self.codec, self.block, self.elements = kind, codec, block, elements
        self.bytes = -(-elements // block) * reference.record_bytes(codec, block)
        self.segments = torch.tensor([[0, elements, 0]])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        payload = torch.zeros(self.bytes, dtype=torch.uint8)
        reference.compress_encode(x, None, payload, self.segments, self.codec, self.block)
        return payload

    def decode(self, payloads: torch.Tensor) -> torch.Tensor:
        payloads = payloads.view(-1, self.bytes)
        out = torch.zeros(self.elements)
        reference.compress_decode(payloads, out, self.segments, self.codec, self.block, 1.0 / len(payloads))
        return out

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        if self.kind == "encode":
            return self.decode(self.encode(data))
        mean = self.decode(data)
        return mean if self.kind == "decode" else self.decode(self.encode(mean))


def _codec(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    codec, block, n = s["name"], s["block"], s["elements"]
    for kind, ranks in (("encode", 1), ("decode", 1), ("reduce", 4)):
        name = f"{kind} {codec} {n}"

        def make(kind: str = kind, ranks: int = ranks, name: str = name) -> Case:
            model = _CodecPass(kind, codec, block, n).eval()
            with _seeded():
                x = torch.randn(n) * 1e-3
            inputs = x if kind == "encode" else model.encode(x).repeat(ranks, 1)
            # Gradients in and residuals in and out; bytes in, gradients out; bytes in and out, residuals in and out.
            moved = {"encode": 12 * n + model.bytes, "decode": 4 * n + model.bytes, "reduce": 8 * n + 5 * model.bytes}
            parameters = {
                "kind": kind, "codec": codec, "block": block, "elements": n, "segments": model.segments,
                "bytes": model.bytes, "decode": model.decode,
            }  # fmt: skip
            tolerance = {"fp32": 0.05 if codec == "int8" else 0.0}  # torch's codecs round otherwise
            return Case(
                "codec", group, name, 0.0, {"fp32": float(moved[kind])}, model, (inputs,), parameters=parameters,
                tolerance=tolerance, precisions=("fp32",),
            )  # fmt: skip

        yield f"{group} {name}", make


class _Largest(nn.Module):
    """The k largest magnitudes, descending: fp32 [k]. Which elements stand for equal ones is left open."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.topk(x.abs(), self.k).values


def _sparse(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    n, k = s["elements"], s["k"]
    name = f"{k} of {n} {s['data']}"

    def make() -> Case:
        with _seeded():
            x = torch.full((n,), 1e-3) if s["data"] == "equal" else torch.randn(n) * 1e-3
            if s["data"] == "heavy-tailed":
                x /= torch.rand(n).clamp_(min=1e-4) ** 2  # a draw may be 0
        moved = float(12 * n + 8 * k)  # gradients in, residuals in and out, positions and values
        return Case(
            "sparse", group, name, 0.0, {"fp32": moved}, _Largest(k).eval(), (x,), parameters={"k": k},
            tolerance={"fp32": 0.0}, precisions=("fp32",),
        )  # fmt: skip

    yield f"{group} {name}", make


def _network(group: str, s: dict[str, Any], data: dict[str, Any]) -> Iterator[tuple[str, Make]]:
    yield f"{s['name']} b{s['batch']}", lambda: network_case(s["name"], s["batch"], group=group)


def network_case(name: str, batch: int = 1, size: int = 224, group: str = "networks") -> Case:
    """A whole network on `batch` images of size x size, or of texts of `TOKENS` tokens.

    Raises:
        ModuleNotFoundError: what the network is made from is not installed.
        ValueError: there is no such network.
    """
    model = _NETWORKS[name]() if name in _NETWORKS else zoo.network(name, size=size)

    def example() -> torch.Tensor:
        if name == "bert_base":
            return torch.randint(0, 30522, (batch, TOKENS))
        return torch.randn(batch, 3, size, size)

    with _seeded():
        x = example()
        calibration = tuple(example() for _ in range(max(1, 16 // batch)))
    work, values, weights = zoo.count(model, x)
    traffic = {p: float((values + weights) * z) for p, z in SIZES.items()}
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    # int8: these weights are random, so the error says that the answer is the network's, not how accurate int8 is.
    tolerance = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.5}
    return Case("network", group, f"{name} b{batch}", work, traffic, model, (x,), None, calibration, {}, tolerance)


_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_lite0": zoo.efficientnet_lite0,
    "bert_base": zoo.bert_base,
    "unet": zoo.unet,
}
"""Those that are not torchvision's."""


def _largest_weight() -> int:
    return 63 if pairs_saturate() else 127


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


_MAKERS: dict[str, Callable[[str, dict[str, Any], dict[str, Any]], Iterator[tuple[str, Make]]]] = {
    "gemm": _gemm,
    "linear": _linear,
    "conv": _conv,
    "pool": _pool,
    "quantize": _quantize,
    "codec": _codec,
    "sparse": _sparse,
    "network": _network,
}
