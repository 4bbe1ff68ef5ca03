"""Measure the int8 GEMM and convolution in every configuration, and write this device's table to pykernels/cuda/tuned.

    python -m benchmarks.gpu.tune [--only conv gemm] [--seconds 330] [--rounds 8] [--dry-run]

conv  ResNet-50's and MobileNetV2's layers that the implicit GEMM runs, batch 1 and 32
gemm  layers of ResNet-50, MobileNetV2, a BERT and a 7B language model, at 1 to 65536 rows

Each by the CUDA library's configurations and by each tile that Triton's kernel could take.

Where no time is left, or --only leaves a part out, the table keeps what it had.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

from benchmarks.gpu.timing import compare, facts, require_gpu
from pykernels import bench
from pykernels.cuda import tables
from pykernels.cuda.triton import gemm
from pykernels.cuda.triton.conv import conv_by_formula
from pykernels.cuda.triton.conv_shape import ConvShape, conv_shape

PARTS = ("conv", "gemm")
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)
# N, K: ResNet-50's pointwise layers, MobileNetV2's, a BERT's, a 7B language model's.
WIDTHS = ((64, 256), (256, 64), (256, 1024), (512, 2048), (1024, 256), (2048, 512), (96, 16), (144, 32), (32, 192),
          (384, 64), (96, 576), (960, 160), (320, 960), (768, 768), (3072, 768), (768, 3072), (4096, 4096),
          (12288, 4096), (4096, 11008), (22016, 4096))  # fmt: skip
NETWORKS = ("resnet50", "mobilenet_v2")
BATCHES = (1, 32)
PRODUCTS = 2**39  # shapes with more, which would take long, do as the largest that is measured
Calls = dict[str, Callable[[], Any]]
Tile = tuple[int, ...]
Makers = tuple[Callable[[], Calls], Callable[[], Callable[[], Any]]]
ops = torch.ops.pykernels
T = TypeVar("T")


def tiles(formula: gemm.Config, candidates: Iterable[list[int]], processors: int, m: int, n: int, k: int) -> list[Tile]:
    """The formula's, and the candidates that neither waste most of a tile on this shape nor make far too many."""
    rows, columns = (max(16, 2 ** math.ceil(math.log2(size))) for size in (m, n))
    found = [formula]
    for candidate in candidates:
        c = gemm.measured(tuple(candidate))
        if min(64, rows) <= c.bm <= rows and c.bn <= columns:
            found.append(gemm.measured((*candidate, gemm.split_of(c, processors, m, n, k))))
    return list(dict.fromkeys((c.bm, c.bn, c.bk, c.warps, c.stages, c.resident, c.split) for c in found))


def forced(tile: Tile, call: Callable[[], Any]) -> Any:
    with tables.forced(tile):
        return call()


def by_tile(found: list[Tile], call: Callable[[], Any]) -> Calls:
    return {json.dumps(tile): functools.partial(forced, tile, call) for tile in found}


def library_calls(op: str, capability: tuple[int, int], *arguments: Any) -> Calls:
    """Every configuration of an op of the library that runs here, by name."""
    return {
        name: functools.partial(getattr(ops, f"_cuda_{op}"), *arguments, index)
        for name, (index, needed) in tables.configurations(op).items()
        if tables.runs(needed, capability)
    }


def columns(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, sums and biases of n columns of random weights."""
    return (
        torch.rand(n, device=device) + 0.5,
        torch.randint(-128 * k, 128 * k, (n,), dtype=torch.int32, device=device),
        torch.randn(n, device=device),
    )


def library_gemm(m: int, n: int, k: int, capability: tuple[int, int], device: str) -> Calls:
    """u8 in and out."""
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    out = torch.empty(m, n, dtype=torch.uint8, device=device)
    finish = (0.01, 128, 5.0, 128, "relu", None, 1.0, 0, "before")
    return library_calls("int8_gemm", capability, a, b, out, *columns(n, k, device), None, None, *finish)


def library_conv(s: ConvShape, capability: tuple[int, int], device: str) -> Calls:
    """Likewise; the zero point is that behind ReLU."""
    nhwc, k = torch.channels_last, s.kernel[0] * s.kernel[1] * s.c
    x = torch.randint(0, 256, (s.n, s.c, s.h, s.w), dtype=torch.uint8, device=device).contiguous(memory_format=nhwc)
    w = torch.randint(-128, 128, (s.o, k), dtype=torch.int8, device=device)
    out = torch.empty(s.out, dtype=torch.uint8, device=device, memory_format=nhwc)
    geometry = [list(sizes) for sizes in (s.kernel, s.stride, s.padding, s.dilation)]
    finish = (0.01, 0, 5.0, 128, "relu", None, 1.0, 0, "before")
    return library_calls("int8_conv", capability, x, w, out, *geometry, *columns(s.o, k, device), *finish)


def linear_call(m: int, n: int, k: int, device: str) -> Callable[[], Any]:
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    packed = ops.int8_linear_pack(b, torch.rand(n, device=device) + 0.5, torch.randn(n, device=device))
    return lambda: ops.int8_linear(a, packed, n, 0.01, 128, 5.0, 128, torch.uint8, "relu")


def conv_call(s: ConvShape, device: str) -> Callable[[], Any]:
    x = torch.randint(0, 256, (s.n, s.c, s.h, s.w), dtype=torch.uint8, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.randint(-128, 128, (s.o, s.c, *s.kernel), dtype=torch.int8, device=device)
    packed = ops.qconv2d_pack(w, torch.rand(s.o, device=device) + 0.5, torch.randn(s.o, device=device), 1)
    geometry = [list(s.kernel), list(s.stride), list(s.padding), list(s.dilation), 1]
    return lambda: ops.qconv2d(x, packed, s.o, *geometry, 0.01, 0, 5.0, 128, torch.uint8, "relu")


def conv_shapes(batches: Iterable[int]) -> Iterator[tuple[ConvShape, tuple[int, int, int], int]]:
    """The layers that the implicit GEMM runs, each once: shape, M, N, K, and bytes of a pixel's channels."""
    folder = pathlib.Path(bench.__file__).parent / "shapes"
    layers = [layer for name in NETWORKS for layer in json.loads((folder / f"{name}.json").read_text())["layers"]]
    seen = set()
    for batch in batches:
        for layer in layers:
            x = torch.empty(batch, layer["in"], layer["size"], layer["size"], dtype=torch.uint8, device="meta")
            pairs = [[layer[key]] * count for key, count in (("kernel", 2), ("stride", 2), ("padding", 4))]
            s = conv_shape("qconv2d", x, layer["out"], *pairs, [1, 1], layer["groups"])
            at = s.layout(torch.int8)
            if s.groups == 1 and not (s.pointwise or at.runs or s in seen):
                seen.add(s)
                yield s, (s.n * s.oh * s.ow, s.o, s.kernel[0] * s.kernel[1] * at.row), at.row


def ladder(points: dict[int, T]) -> list[tuple[int | None, T]]:
    """Winners by M as a table's rows: neighbours that agree are one, and the last has no largest M."""
    rows: list[tuple[int | None, T]] = []
    for m, winner in sorted(points.items()):
        if rows and rows[-1][1] == winner:
            rows.pop()
        rows.append((m, winner))
    return [*rows[:-1], (None, rows[-1][1])]


def names_ladder(points: dict[int, str]) -> list[tuple[int | None, str]]:
    """Likewise of names, where swapped configurations take no residual: the last row is none of them."""
    rows = ladder(points)
    if rows[-1][1].endswith("swapped"):
        last = next((winner for _, winner in sorted(points.items(), reverse=True) if not winner.endswith("swapped")),
                    tables.TRITON)  # fmt: skip
        rows = [*rows[:-1], (max(points), rows[-1][1]), (None, last)]
    return rows


def fastest(times: dict[str, float | str]) -> str | None:
    ran = {name: seconds for name, seconds in times.items() if isinstance(seconds, float)}
    return min(ran, key=ran.__getitem__, default=None)


class Ladders(collections.defaultdict[str, dict[int, Any]]):
    """Winners by width and M."""

    def __init__(self) -> None:
        super().__init__(dict)


class Tuner:
    """Measures until `seconds` have passed; `table` is then what was found, over what the file held."""

    def __init__(self, name: str, capability: tuple[int, int], processors: int, seconds: float, rounds: int,
                 device: str = "cuda") -> None:  # fmt: skip
        self.table = json.loads((tables.FOLDER / f"{name}.json").read_text())
        self.capability, self.processors, self.rounds, self.device = capability, processors, rounds, device
        self.arch = 10 * capability[0] + capability[1]
        self.end = time.monotonic() + seconds
        self.left_out = 0
        self.times: dict[str, dict[str, float | str]] = {}

    def measure(self, title: str, products: int, make: Callable[[], Calls]) -> dict[str, float | str]:
        """Seconds by name, or nothing where no time is left."""
        if time.monotonic() > self.end:
            self.left_out += 1
            return {}
        taken = compare(make(), self.rounds, 5)
        winner = fastest(taken)
        if winner is None:
            print(f"{title}: nothing ran: {taken}", flush=True)
            return {}
        speed = 2e-12 * products / float(taken[winner])
        print(f"{title}: {winner}, {speed:.1f} TOP/s, of {len(taken)}", flush=True)
        self.times[title] = {
            key: value if isinstance(value, str) else round(value * 1e6, 2) for key, value in taken.items()
        }
        return taken

    def part(self, kind: str, shapes: Iterable[tuple[tuple[int, int, int], gemm.Config, str, Makers]]) -> None:
        """Measure shapes: M, N and K, the tile by formula, a title, and what makes the library's and Triton's calls."""
        op, names, found = f"int8_{kind}", Ladders(), Ladders()
        for (m, n, k), formula, title, (by_library, by_triton) in shapes:
            some = tiles(formula, self.table["triton"]["candidates"], self.processors, m, n, k)
            make = lambda: {**by_library(), **by_tile(some, by_triton())}  # noqa: B023, E731 - called in this turn
            taken = self.measure(f"{kind} {title}", m * n * k, make)
            winner = fastest(taken)
            ours = fastest({name: value for name, value in taken.items() if name.startswith("[")})
            if winner is not None:
                names[f"{n}x{k}"][m] = tables.TRITON if winner.startswith("[") else winner
            if ours is not None:
                found[f"{n}x{k}"][m] = tuple(json.loads(ours))
        self.table["triton"][kind] |= {width: ladder(points) for width, points in found.items()}
        if names and tables.configurations(op):
            before = self.table.get(op, {}) if self.measured(kind) else {}
            self.table[op] = before | {width: names_ladder(points) for width, points in names.items()}

    def measured(self, kind: str) -> bool:
        """Whether the file's table was measured, and not reasoned."""
        return any(title.startswith(kind) for title in self.table.get("microseconds", {}))

    def conv(self, batches: Iterable[int] = BATCHES) -> None:
        self.part("conv", (
            (sizes, conv_by_formula(self.arch, self.processors, s, row),
             f"{s.n}x{s.c}x{s.h}x{s.w}, {s.o} of {s.kernel[0]}x{s.kernel[1]}/{s.stride[0]}",
             (functools.partial(library_conv, s, self.capability, self.device),
              functools.partial(conv_call, s, self.device)))
            for s, sizes, row in conv_shapes(batches)
        ))  # fmt: skip

    def gemm(self, widths: Iterable[tuple[int, int]] = WIDTHS, rows: Iterable[int] = ROWS) -> None:
        self.part("gemm", (
            ((m, n, k), gemm.by_formula(self.arch, self.processors, m, n, k), f"{m}x{n}x{k}",
             (functools.partial(library_gemm, m, n, k, self.capability, self.device),
              functools.partial(linear_call, m, n, k, self.device)))
            for n, k in widths for m in rows if m * n * k <= PRODUCTS
        ))  # fmt: skip

    def finish(self, device: dict[str, Any]) -> str:
        """The table as text."""
        note = f"measured {time.strftime('%Y-%m-%d')} by python -m benchmarks.gpu.tune"
        kept = [kind for kind in PARTS if not any(title.startswith(kind) for title in self.times)]
        note += f"; {' and '.join(kept)} as before" if kept else ""
        if self.left_out:
            note += f"; no time was left for {self.left_out} shapes"
        table = {**self.table, "note": note, **{key: device[key] for key in ("device", "torch")}}
        table["microseconds"] = table.get("microseconds", {}) | self.times
        return json.dumps(table, indent=1) + "\n"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--seconds", type=float, default=330, help="after which nothing more is measured")
    arguments.add_argument("--rounds", type=int, default=8, help="of which the best counts")
    arguments.add_argument("--dry-run", action="store_true", help="print the table and write nothing")
    given = arguments.parse_args()
    require_gpu("tune")
    capability = torch.cuda.get_device_capability()
    name = tables.architecture(capability)
    if name is None:
        raise SystemExit(f"tune: there is no table for compute capability {capability}")
    if not tables.configurations("int8_gemm"):
        print("tune: the CUDA library is not loaded: Triton's tiles alone are measured")
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    tuner = Tuner(name, capability, processors, given.seconds, given.rounds)
    for part in given.only:
        getattr(tuner, part)()
    text = tuner.finish(facts())
    if given.dry_run:
        print(text)
    else:
        path = tables.FOLDER / f"{name}.json"
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
