"""How fast is this GPU with our kernels, and with what else there is?

    make gpu-bench          (python -m benchmarks.gpu.bench [--only gemm conv network memory codecs] [--rounds 20])

gemm     an int8 linear layer, u8 in and out: ours, cuBLASLt's product alone, torch._int_mm with a compiled epilogue,
         cuBLAS in fp16
conv     ResNet-50's convolutions with ReLU at batch 32 and 128: ours in int8, cuDNN in fp16
network  ResNet-50 at batch 1, 32 and 128: ours in int8, torch.compile in fp16 channels_last
memory   pools and arithmetic on bytes, beside a copy of as many bytes as they must move
codecs   gradient codecs, likewise

Every rival runs in CUDA graphs, one after another in each round, and the best round counts. Writes JSON and charts to
docs/benchmarks/gpu.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu import check_codecs, cublaslt
from benchmarks.gpu.timing import FOLDER, REPEAT, best, compare, draw, facts, require_gpu, save, show
from pykernels import bench

PARTS = ("gemm", "conv", "network", "memory", "codecs")
ops = torch.ops.pykernels
Row = dict[str, Any]
# M, N, K: decoding and prefill of a 7B language model, ResNet-50's pointwise convolutions at batch 32.
GEMMS = ((1, 4096, 4096), (16, 4096, 4096), (64, 4096, 4096), (128, 4096, 4096), (256, 4096, 4096), (2048, 4096, 4096),
         (2048, 4096, 8192), (16, 22016, 4096), (2048, 22016, 4096), (8192, 8192, 8192), (100352, 256, 64),
         (25088, 512, 128), (6272, 1024, 256), (1568, 2048, 512))  # fmt: skip
FEW = 128  # rows up to which a layer waits for its weights: each call then has weights of its own, which no cache holds


def in_turn(calls: list[Callable[[], Any]]) -> Callable[[], Any]:
    """The next of `calls` at each call."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


def at_first_call(make: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """What `make` returns, which is asked for late: `compare` tells of what cannot be made, and goes on."""
    made: list[Callable[[], Any]] = []

    def call() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return call


def half_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, bias).relu_()


def gemm(rounds: int, shapes: Iterable[tuple[int, int, int]] = GEMMS, device: str = "cuda") -> list[Row]:
    rows: list[Row] = []

    @torch.compile(dynamic=True)
    def epilogue(acc: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (torch.relu(acc.float() * scale + bias) * 0.2).round().add(3.0).clamp(0, 255).to(torch.uint8)

    for m, n, k in shapes:
        a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
        copies = REPEAT if m <= FEW else 1
        weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device) for _ in range(copies)]
        scale, bias = torch.rand(n, device=device) * 1e-3 + 1e-4, torch.randn(n, device=device)
        signed, x, h = a.view(torch.int8), a.half(), bias.half()
        padded = F.pad(signed, (0, 0, 0, max(0, 17 - m)))  # torch._int_mm asks for more than 16 rows
        quantized = (0.02, 131, 5.0, 3, torch.uint8, "relu")
        rivals: dict[str, Callable[[torch.Tensor], Callable[[], Any]]] = {
            "pykernels int8": lambda b, a=a, n=n, q=quantized, s=scale, c=bias: functools.partial(
                ops.int8_linear, a, ops.int8_linear_pack(b, s, c), n, *q
            ),
            "cuBLASLt s8, product alone": lambda b, p=signed: cublaslt.int8_gemm(p, b),
            "_int_mm, compiled epilogue": lambda b, p=padded, s=scale, c=bias: (
                lambda: epilogue(torch._int_mm(p, b.t()), s, c)
            ),
            "cuBLAS fp16 and ReLU": lambda b, x=x, h=h: functools.partial(half_linear, x, b.half(), h),
        }
        calls = {
            name: in_turn([at_first_call(functools.partial(make, b)) for b in weights]) for name, make in rivals.items()
        }
        times = compare(calls, rounds)
        ours = times["pykernels int8"]
        known = isinstance(ours, float)
        speed = {"TOP/s": round(2e-12 * m * n * k / ours, 1) if known else None,
                 "weights GB/s": round(1e-9 * n * k / ours) if known and m <= FEW else None}  # fmt: skip
        rows.append({"M": m, "N": n, "K": k, **speed, "times": times})
    return rows


def layers(network: str) -> list[dict[str, Any]]:
    """Of a file of shapes."""
    shapes = json.loads((pathlib.Path(bench.__file__).parent / "shapes" / f"{network}.json").read_text())
    found: list[dict[str, Any]] = shapes["layers"]
    return found


def conv(
    rounds: int, batches: Iterable[int] = (32, 128), shapes: list[dict[str, Any]] | None = None, device: str = "cuda"
) -> list[Row]:
    rows: list[Row] = []
    for batch in batches:
        for layer in layers("resnet50") if shapes is None else shapes:
            i, o, size, kernel, stride, pad = (
                layer[key] for key in ("in", "out", "size", "kernel", "stride", "padding")
            )
            x = torch.randint(0, 256, (batch, i, size, size), dtype=torch.uint8, device=device)
            x = x.contiguous(memory_format=torch.channels_last)
            w = torch.randint(-128, 128, (o, i, kernel, kernel), dtype=torch.int8, device=device)
            scale, bias = torch.rand(o, device=device) * 1e-3 + 1e-4, torch.randn(o, device=device)
            packed = ops.qconv2d_pack(w, scale, bias)
            half = [t.half() for t in (x, w.contiguous(memory_format=torch.channels_last), bias)]
            geometry = [[kernel] * 2, [stride] * 2, [pad] * 4, [1, 1], 1]
            quantized = (0.02, 0, 0.1, 3, torch.uint8, "relu")  # 0: as behind ReLU
            plain = [[stride] * 2, [pad] * 2, [1, 1], 1]
            calls: dict[str, Callable[[], Any]] = {
                "pykernels int8": lambda x=x, p=packed, o=o, g=geometry, q=quantized: ops.qconv2d(x, p, o, *g, *q),
                "cuDNN fp16": lambda h=half, g=plain: torch.cudnn_convolution_relu(*h, *g),
            }
            times = compare(calls, rounds)
            title = f"{i}x{size}x{size}, {o} of {kernel}x{kernel}/{stride}"
            rows.append({"layer": title, "batch": batch, "count": layer["count"], "times": times})
            del x, half
    return rows


def network(rounds: int) -> list[Row]:
    """The optimized network is made on the CPU, where PT2E calibrates it, and its weights are packed again for CUDA."""
    import pykernels
    from pykernels.bench.zoo import network as build

    model = build("resnet50").eval()
    small = torch.randn(4, 3, 224, 224)
    with torch.no_grad():
        ours = pykernels.optimize(model, small, precision="int8", calibration=[small])
    ours.to("cuda")
    ours.cuda_graph = False  # `compare` captures every rival
    half = model.cuda().half().to(memory_format=torch.channels_last)
    compiled = torch.compile(half, dynamic=False)
    rows: list[Row] = []
    for batch in (1, 32, 128):
        x = torch.randn(batch, 3, 224, 224, device="cuda").contiguous(memory_format=torch.channels_last)
        h = x.half()
        with torch.no_grad():
            times = compare({"pykernels int8": lambda x=x: ours(x), "torch.compile fp16": lambda h=h: compiled(h)},
                            rounds, 1)  # fmt: skip
        rows.append({"network": "ResNet-50", "batch": batch, "times": times})
    return rows


def memory(rounds: int, batch: int = 128, device: str = "cuda") -> list[Row]:
    rows: list[Row] = []

    def add(op: str, moved: int, call: Callable[[], Any]) -> None:
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        rows.append({"op": op, "MB": round(moved / 1e6),
                     "times": compare({"pykernels": call, "copy": lambda: target.copy_(source)}, rounds)})  # fmt: skip

    x = torch.randn(batch, 64, 112, 112, device=device).contiguous(memory_format=torch.channels_last)
    n = x.numel()
    for name, t, size in (("fp32", x, 4), ("bf16", x.bfloat16(), 2), ("uint8", x.mul(30).clamp(0, 255).byte(), 1)):
        add(
            f"max_pool2d 3x3/2 {name}",
            n * size * 5 // 4,
            lambda t=t: ops.max_pool2d(t, [3, 3], [2, 2], [1, 1], [1, 1], False),
        )
    q = x.mul(30).clamp(0, 255).byte()
    add("adaptive_avg_pool2d fp32", 4 * n, lambda: ops.adaptive_avg_pool2d(x, [1, 1]))
    add("quantize_per_tensor", 5 * n, lambda: ops.quantize_per_tensor(x, 0.03, 128, torch.uint8))
    add("dequantize_per_tensor", 5 * n, lambda: ops.dequantize_per_tensor(q, 0.03, 128, torch.float32))
    add("qadd", 3 * n, lambda: ops.qadd(q, q, 0.1, 3, 0.2, 120, 0.1, 3, torch.uint8, "relu"))
    rows_of = torch.randn(128 * batch, 4096, device=device)
    add("quantize_per_token", 5 * rows_of.numel(), lambda: ops.quantize_per_token(rows_of, torch.uint8))
    return rows


def codecs(rounds: int) -> list[Row]:
    return check_codecs.measure(2**26, rounds)


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB, bytes read and written counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / best([lambda: target.copy_(source)], 20)[0] / 1e9


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--rounds", type=int, default=20, help="of which the best counts")
    given = arguments.parse_args()
    require_gpu("bench")
    torch.backends.cudnn.benchmark = True
    report: dict[str, Any] = {"facts": facts(), "date": time.strftime("%Y-%m-%d"), "copy_GB_s": round(copy_bandwidth())}
    measured = {"gemm": gemm, "conv": conv, "network": network, "memory": memory, "codecs": codecs}
    for part in given.only:
        try:
            rows = measured[part](given.rounds)
        except Exception as error:  # a part that cannot run is told of, and the others are measured
            report[part] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{part} did not run: {report[part]}", flush=True)
            continue
        report[part] = rows
        show(f"{part}, {report['facts']['device']}", rows)
        draw(f"{part}, {report['facts']['device']}, torch {torch.__version__}", rows, FOLDER / f"{part}.png")
        save("bench", report)
    print(f"written: {save('bench', report)}")


if __name__ == "__main__":
    main()
