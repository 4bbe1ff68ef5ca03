"""How fast is this GPU with our kernels, and with what else there is?

    make gpu-bench
    python -m benchmarks.gpu.bench [--only gemm conv network memory codecs] [--rounds 20] [--autotune]

gemm     an int8 linear layer, u8 in and out: ours, cuBLASLt's product alone, torch._int_mm with a compiled epilogue,
         cuBLAS in fp16
conv     ResNet-50's convolutions with ReLU at batch 32 and 128: ours in int8, cuDNN in fp16
network  whole networks: ours in int8, torch.compile in fp16 and bf16, channels_last; --autotune: its max-autotune
         and TensorRT by torch_tensorrt where that is installed, too
memory   pools and arithmetic on bytes, beside a copy of as many bytes as they must move
codecs   gradient codecs, likewise

First everything is compiled, by as many processes as there are cores; then one after another is timed, and printed. All
rivals run in CUDA graphs, one after another in each round, and each one's best round counts. Writes JSON and charts to
docs/benchmarks/gpu.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu import bench_networks, check_codecs, cublaslt
from benchmarks.gpu.timing import FOLDER, REPEAT, Case, best, draw, facts, require_gpu, save, show
from benchmarks.gpu.warm import warm
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


def gemm(shapes: Iterable[tuple[int, int, int]] = GEMMS, device: str = "cuda") -> Iterator[Case]:
    @torch.compile(dynamic=True)
    def epilogue(acc: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return (torch.relu(acc.float() * scale + bias) * 0.2).round().add(3.0).clamp(0, 255).to(torch.uint8)

    def rivals(m: int, n: int, k: int) -> dict[str, Callable[[], Any]]:
        a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
        copies = REPEAT if m <= FEW else 1
        weights = [torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device) for _ in range(copies)]
        scale, bias = torch.rand(n, device=device) * 1e-3 + 1e-4, torch.randn(n, device=device)
        signed, x, h = a.view(torch.int8), a.half(), bias.half()
        padded = F.pad(signed, (0, 0, 0, max(0, 17 - m)))  # torch._int_mm asks for more than 16 rows
        quantized = (0.02, 131, 5.0, 3, torch.uint8, "relu")
        made: dict[str, Callable[[torch.Tensor], Callable[[], Any]]] = {
            "pykernels int8": lambda b: functools.partial(
                ops.int8_linear, a, ops.int8_linear_pack(b, scale, bias), n, *quantized
            ),
            "cuBLASLt s8, product alone": lambda b: cublaslt.int8_gemm(signed, b),
            "_int_mm, compiled epilogue": lambda b: lambda: epilogue(torch._int_mm(padded, b.t()), scale, bias),
            "cuBLAS fp16 and ReLU": lambda b: functools.partial(half_linear, x, b.half(), h),
        }
        return {
            name: in_turn([at_first_call(functools.partial(make, b)) for b in weights]) for name, make in made.items()
        }

    def speed(m: int, n: int, k: int, ours: float | None) -> Row:
        return {"TOP/s": round(2e-12 * m * n * k / ours, 1) if ours else None,
                "weights GB/s": round(1e-9 * n * k / ours) if ours and m <= FEW else None}  # fmt: skip

    for m, n, k in shapes:
        yield Case({"M": m, "N": n, "K": k}, functools.partial(rivals, m, n, k), functools.partial(speed, m, n, k))


def layers(network: str) -> list[dict[str, Any]]:
    """Of a file of shapes."""
    shapes = json.loads((pathlib.Path(bench.__file__).parent / "shapes" / f"{network}.json").read_text())
    found: list[dict[str, Any]] = shapes["layers"]
    return found


def conv(
    batches: Iterable[int] = (32, 128), shapes: list[dict[str, Any]] | None = None, device: str = "cuda"
) -> Iterator[Case]:
    def rivals(batch: int, layer: dict[str, Any]) -> dict[str, Callable[[], Any]]:
        i, o, size, kernel, stride, pad = (layer[key] for key in ("in", "out", "size", "kernel", "stride", "padding"))
        x = torch.randint(0, 256, (batch, i, size, size), dtype=torch.uint8, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        w = torch.randint(-128, 128, (o, i, kernel, kernel), dtype=torch.int8, device=device)
        scale, bias = torch.rand(o, device=device) * 1e-3 + 1e-4, torch.randn(o, device=device)
        packed = ops.qconv2d_pack(w, scale, bias)
        half = [t.half() for t in (x, w.contiguous(memory_format=torch.channels_last), bias)]
        geometry = [[kernel] * 2, [stride] * 2, [pad] * 4, [1, 1], 1]
        quantized = (0.02, 0, 0.1, 3, torch.uint8, "relu")  # 0: as behind ReLU
        plain = [[stride] * 2, [pad] * 2, [1, 1], 1]
        return {
            "pykernels int8": lambda: ops.qconv2d(x, packed, o, *geometry, *quantized),
            "cuDNN fp16": lambda: torch.cudnn_convolution_relu(*half, *plain),
        }

    for batch in batches:
        for layer in layers("resnet50") if shapes is None else shapes:
            title = "{in}x{size}x{size}, {out} of {kernel}x{kernel}/{stride}".format(**layer)
            head = {"layer": title, "batch": batch, "count": layer["count"]}
            yield Case(head, functools.partial(rivals, batch, layer))


def memory(batch: int = 128, device: str = "cuda") -> Iterator[Case]:
    @functools.cache
    def image(dtype: torch.dtype) -> torch.Tensor:
        x = torch.randn(batch, 64, 112, 112, device=device).contiguous(memory_format=torch.channels_last)
        return x.mul(30).clamp(0, 255).byte() if dtype == torch.uint8 else x.to(dtype)

    @functools.cache
    def tokens() -> torch.Tensor:
        return torch.randn(128 * batch, 4096, device=device)

    def rivals(moved: int, call: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
        source = torch.empty(moved // 2, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return {"pykernels": call, "copy": lambda: target.copy_(source)}

    def case(op: str, moved: int, call: Callable[[], Any]) -> Case:
        return Case({"op": op, "MB": round(moved / 1e6)}, functools.partial(rivals, moved, call))

    n = batch * 64 * 112 * 112
    window = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("uint8", torch.uint8)):
        yield case(f"max_pool2d 3x3/2 {name}", n * dtype.itemsize * 5 // 4,
                   lambda dtype=dtype: ops.max_pool2d(image(dtype), *window))  # fmt: skip
    real, u8 = torch.float32, torch.uint8
    yield case("adaptive_avg_pool2d fp32", 4 * n, lambda: ops.adaptive_avg_pool2d(image(real), [1, 1]))
    yield case("qadaptive_avg_pool2d uint8", n,
               lambda: ops.qadaptive_avg_pool2d(image(u8), [1, 1], 0.1, 3, 0.1, 3, u8))  # fmt: skip
    yield case("quantize_per_tensor", 5 * n, lambda: ops.quantize_per_tensor(image(real), 0.03, 128, u8))
    yield case("dequantize_per_tensor", 5 * n, lambda: ops.dequantize_per_tensor(image(u8), 0.03, 128, real))
    yield case("qadd", 3 * n, lambda: ops.qadd(image(u8), image(u8), 0.1, 3, 0.2, 120, 0.1, 3, u8, "relu"))
    yield case("quantize_per_token", 5 * 128 * batch * 4096, lambda: ops.quantize_per_token(tokens(), u8))


def codecs() -> Iterator[Case]:
    return check_codecs.cases(2**26)


# Whose kernels are compiled by other processes, and which then are timed by this one.
CASES: dict[str, Callable[[], Iterator[Case]]] = {"gemm": gemm, "conv": conv, "memory": memory, "codecs": codecs}


def compile_case(part: str, number: int) -> None:
    """In a process of `warm`."""
    list(CASES[part]())[number].compile()


def copy_bandwidth() -> float:
    """GB/s of a copy of 1 GiB, bytes read and written counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / best([lambda: target.copy_(source)], 20)[0] / 1e9


class Report:
    """The report, printed and written to docs/benchmarks/gpu as it grows."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.found: dict[str, Any] = {"facts": facts, "date": time.strftime("%Y-%m-%d"), "copy_GB_s": None}

    def begin(self) -> None:
        self.found["copy_GB_s"] = round(copy_bandwidth())

    def add(self, part: str, row: Row, line: str) -> None:
        self.found.setdefault(part, []).append(row)
        print(f"{part}: {line}", flush=True)
        save("bench", self.found)

    def end(self, part: str, error: str | None = None) -> None:
        """Its table and chart. `error`: why the rest of it did not run."""
        if error is not None:
            self.found.setdefault("did_not_run", {})[part] = error
            print(f"{part} did not run to its end: {error}", flush=True)
        rows = self.found.get(part)
        if rows:
            title = f"{part}, {self.found['facts']['device']}, torch {torch.__version__}"
            show(title, rows)
            draw(title, rows, FOLDER / f"{part}.png")
        save("bench", self.found)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--rounds", type=int, default=20, help="of which the best counts")
    arguments.add_argument(
        "--autotune", action="store_true", help="torch.compile's max-autotune and TensorRT, too: minutes"
    )
    given = arguments.parse_args()
    require_gpu("bench")
    begin = time.monotonic()
    torch.backends.cudnn.benchmark = True
    report = Report(facts())
    parts = [part for part in PARTS if part in given.only and part in CASES]
    networks = bench_networks.Networks(given.rounds, given.autotune) if "network" in given.only else None
    if networks is not None:
        networks.start()
    warm([functools.partial(compile_case, part, i) for part in parts for i in range(len(list(CASES[part]())))])
    if networks is not None:
        networks.wait()
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    report.begin()
    for part in parts:
        error = None
        try:
            for case in CASES[part]():
                row = case.measure(given.rounds)
                report.add(part, row, case.line(row))
        except Exception as raised:  # a part that cannot run is told of, and the others are measured
            error = f"{type(raised).__name__}: {raised}".splitlines()[0]
        report.end(part, error)
    if networks is not None:
        for row, line in networks.measure():
            report.add("network", row, line)
        report.end("network", "; ".join(networks.errors) or None)
    print(f"{time.monotonic() - begin:.0f} s; written: {save('bench', report.found)}")


if __name__ == "__main__":
    main()
