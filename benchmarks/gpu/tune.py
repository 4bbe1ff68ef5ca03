"""Measure the int8 GEMM and convolution in every configuration, and write this device's table to pykernels/cuda/tuned.

    python -m benchmarks.gpu.tune [--only conv gemm few_channels] [--seconds 330] [--rounds 8] [--again] [--dry-run]

conv          ResNet-50's and MobileNetV2's layers that the implicit GEMM runs, batch 1 and 32
gemm          layers of ResNet-50, MobileNetV2, a BERT and a 7B language model, at 1 to 65536 rows
few_channels  first layers of ResNet-50 and MobileNetV2, batch 1, 32 and 128: the library's kernels and Triton's one

Each by the CUDA library's configurations and by each tile that Triton's kernel could take, all compiled first, by as
many processes as there are cores.

Times go to docs/benchmarks/gpu/tune-<device>.json, and the table, which is made from them, is written anew, after each
shape. So a run that was cut off, or whose seconds are over, is gone on with by the next one: shapes that this device
has measured with these versions and kernels are not measured again, unless --again says so. Where --only leaves a part
out, the table keeps what it had.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from benchmarks.gpu.timing import FOLDER, compare, facts, require_gpu
from benchmarks.gpu.warm import kernels_only, warm
from pykernels import bench
from pykernels.cuda import tables
from pykernels.cuda.triton import gemm, library, short_k
from pykernels.cuda.triton.conv import conv_by_formula
from pykernels.cuda.triton.conv_shape import ConvShape, conv_shape

PARTS = ("conv", "gemm", "few_channels")
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)
# N, K: ResNet-50's pointwise layers, MobileNetV2's, a BERT's, a 7B language model's.
WIDTHS = ((64, 256), (256, 64), (256, 1024), (512, 2048), (1024, 256), (2048, 512), (96, 16), (144, 32), (32, 192),
          (384, 64), (96, 576), (960, 160), (320, 960), (768, 768), (3072, 768), (768, 3072), (4096, 4096),
          (12288, 4096), (4096, 11008), (22016, 4096))  # fmt: skip
NETWORKS = ("resnet50", "mobilenet_v2")
BATCHES = (1, 32)
FEW_BATCHES = (1, 32, 128)  # of layers of few channels, which there are few of
PRODUCTS = 2**39  # shapes with more, which would take long, do as the largest that is measured
Calls = dict[str, Callable[[], Any]]
Tile = tuple[int, ...]
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


def forced(tile: Tile | str, call: Callable[[], Any]) -> Any:
    with tables.forced(tile):
        return call()


def short_calls(kind: str, on: Machine, sizes: tuple[int, int, int], call: Callable[[], Any]) -> Calls:
    """The kernel of a short K, where a launcher would take it."""
    fits = kind == "gemm" and short_k.fits(on.arch, on.processors, *sizes)
    return {tables.SHORT_K: functools.partial(forced, tables.SHORT_K, call)} if fits else {}


def without_library(call: Callable[[], Any]) -> Any:
    with tables.disabled():
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


def library_few_channels(s: ConvShape, capability: tuple[int, int], device: str) -> Calls:
    """Likewise, of the configurations that run this layer; the zero point is that of an image."""
    nhwc, row = torch.channels_last, s.kernel[0] * s.layout(torch.int8).row
    x = torch.randint(0, 256, (s.n, s.c, s.h, s.w), dtype=torch.uint8, device=device).contiguous(memory_format=nhwc)
    w = torch.randint(-128, 128, (s.o, row), dtype=torch.int8, device=device)
    out = torch.empty(s.out, dtype=torch.uint8, device=device, memory_format=nhwc)
    geometry = [list(sizes) for sizes in (s.kernel, s.stride, s.padding)]
    finish = (0.01, 114, 5.0, 128, "relu", None, 1.0, 0, "before")
    calls = library_calls("int8_few_channels", capability, x, w, out, *geometry, *columns(s.o, row, device), *finish)
    return {name: calls[name] for name in tables.few_channels_fit(s.kernel, s.o) if name in calls}


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


@dataclass(frozen=True)
class Shape:
    """One product that is measured.

    Attributes:
        kind: one of PARTS.
        sizes: M, N and K, as tables know it.
        formula: the tile by formula, or None where Triton's kernel has no other.
        library, triton: make the library's calls by name, and the call of Triton's kernel.
    """

    kind: str
    title: str
    sizes: tuple[int, int, int]
    formula: gemm.Config | None
    library: Callable[[], Calls]
    triton: Callable[[], Callable[[], Any]]

    @property
    def width(self) -> str:
        return f"{self.sizes[1]}x{self.sizes[2]}"


@dataclass(frozen=True)
class Machine:
    """What is tuned for; `device` is where the tensors are."""

    capability: tuple[int, int]
    processors: int
    device: str = "cuda"

    @property
    def arch(self) -> int:
        return 10 * self.capability[0] + self.capability[1]


def gemm_layers(on: Machine, widths: Iterable[tuple[int, int]] = WIDTHS, rows: Iterable[int] = ROWS) -> Iterator[Shape]:
    for n, k in widths:
        for m in rows:
            if m * n * k <= PRODUCTS:
                yield Shape(
                    "gemm", f"gemm {m}x{n}x{k}", (m, n, k), gemm.by_formula(on.arch, on.processors, m, n, k),
                    functools.partial(library_gemm, m, n, k, on.capability, on.device),
                    functools.partial(linear_call, m, n, k, on.device),
                )  # fmt: skip


def conv_layers(on: Machine, batches: Iterable[int] = BATCHES) -> Iterator[Shape]:
    for s, sizes, row in conv_shapes(batches):
        yield Shape(
            "conv", conv_title(s), sizes, conv_by_formula(on.arch, on.processors, s, row),
            functools.partial(library_conv, s, on.capability, on.device), functools.partial(conv_call, s, on.device),
        )  # fmt: skip


def few_layers(on: Machine, batches: Iterable[int] = FEW_BATCHES) -> Iterator[Shape]:
    for s in network_shapes(batches):
        if s.layout(torch.int8).runs and library.few_channels(s):
            yield Shape(
                "few_channels", conv_title(s), (s.n * s.oh * s.ow, s.o, s.kernel[0] * s.kernel[1] * s.c), None,
                functools.partial(library_few_channels, s, on.capability, on.device),
                functools.partial(conv_call, s, on.device),
            )  # fmt: skip


LAYERS: dict[str, Callable[[Machine], Iterator[Shape]]] = {
    "conv": conv_layers, "gemm": gemm_layers, "few_channels": few_layers,
}  # fmt: skip


def conv_title(s: ConvShape) -> str:
    return f"conv {s.n}x{s.c}x{s.h}x{s.w}, {s.o} of {s.kernel[0]}x{s.kernel[1]}/{s.stride[0]}"


def network_shapes(batches: Iterable[int]) -> Iterator[ConvShape]:
    """The convolutions of the networks, each once."""
    folder = pathlib.Path(bench.__file__).parent / "shapes"
    layers = [layer for name in NETWORKS for layer in json.loads((folder / f"{name}.json").read_text())["layers"]]
    seen = set()
    for batch in batches:
        for layer in layers:
            x = torch.empty(batch, layer["in"], layer["size"], layer["size"], dtype=torch.uint8, device="meta")
            pairs = [[layer[key]] * count for key, count in (("kernel", 2), ("stride", 2), ("padding", 4))]
            s = conv_shape("qconv2d", x, layer["out"], *pairs, [1, 1], layer["groups"])
            if s not in seen:
                seen.add(s)
                yield s


def conv_shapes(batches: Iterable[int]) -> Iterator[tuple[ConvShape, tuple[int, int, int], int]]:
    """The layers that the implicit GEMM runs, each once: shape, M, N, K, and bytes of a pixel's channels."""
    for s in network_shapes(batches):
        at = s.layout(torch.int8)
        if s.groups == 1 and not (s.pointwise or at.runs):
            yield s, (s.n * s.oh * s.ow, s.o, s.kernel[0] * s.kernel[1] * at.row), at.row


def ladder(points: Mapping[int, T]) -> list[tuple[int | None, T]]:
    """Winners by M as a table's rows: neighbours that agree are one, and the last has no largest M."""
    rows: list[tuple[int | None, T]] = []
    for m, winner in sorted(points.items()):
        if rows and rows[-1][1] == winner:
            rows.pop()
        rows.append((m, winner))
    return [*rows[:-1], (None, rows[-1][1])]


def names_ladder(points: Mapping[int, str]) -> list[tuple[int | None, str]]:
    """Likewise of names, where swapped configurations take no residual: the last row is none of them."""
    rows = ladder(points)
    if rows[-1][1].endswith("swapped"):
        last = next((winner for _, winner in sorted(points.items(), reverse=True) if not winner.endswith("swapped")),
                    tables.TRITON)  # fmt: skip
        rows = [*rows[:-1], (max(points), rows[-1][1]), (None, last)]
    return rows


def fastest(times: Mapping[str, float | str]) -> str | None:
    ran = {name: seconds for name, seconds in times.items() if isinstance(seconds, float)}
    return min(ran, key=ran.__getitem__, default=None)


def compile_tile(kind: str, title: str, name: str, on: Machine) -> None:
    """In a process of `warm`: a tile, or a kernel that has no others."""
    shape = next(shape for shape in LAYERS[kind](on) if shape.title == title)
    with kernels_only():
        if name == tables.TRITON:
            without_library(shape.triton())
        else:
            forced(name if name == tables.SHORT_K else tuple(json.loads(name)), shape.triton())


def as_text(value: Any, margin: str = "") -> str:
    """JSON with a line for each row of a table."""
    if isinstance(value, dict) and value:
        inner = (f"{margin}  {json.dumps(key)}: {as_text(item, margin + '  ')}" for key, item in value.items())
        return "{\n" + ",\n".join(inner) + f"\n{margin}}}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + ",\n".join(f"{margin}  {json.dumps(item)}" for item in value) + f"\n{margin}]"
    return json.dumps(value)


def of_triton(name: str) -> bool:
    """Whether it is the name of a tile, or of a kernel that has no others."""
    return name.startswith("[") or name in (tables.SHORT_K, tables.TRITON)


class Times:
    """What was measured on a device: µs by shape and configuration, in a file that grows.

    Attributes:
        found: by title, times in µs by configuration, or why one did not run.
        earlier: titles that were measured with other versions or kernels, and are to be measured again.
    """

    def __init__(self, path: pathlib.Path, state: dict[str, str]) -> None:
        self.path, self.state = path, state
        self.found: dict[str, dict[str, float | str]] = {}
        self.earlier: set[str] = set()
        if path.exists():
            held = json.loads(path.read_text())
            self.found = held["microseconds"]
            same = all(held.get(key) == value for key, value in state.items())
            self.earlier = set(held.get("earlier", [])) if same else set(self.found)

    def left(self, shapes: Iterable[Shape]) -> list[Shape]:
        """Of these, what has not been measured as things are now."""
        return [s for s in shapes if s.title not in self.found or s.title in self.earlier]

    def add(self, title: str, seconds: dict[str, float | str]) -> None:
        words = {name: value if isinstance(value, str) else round(value * 1e6, 2) for name, value in seconds.items()}
        self.found[title] = words
        self.earlier.discard(title)

    def write(self, note: str) -> None:
        held = {"note": note, **self.state, "earlier": sorted(self.earlier), "microseconds": self.found}
        replace_text(self.path, json.dumps(held, indent=1) + "\n")


def replace_text(path: pathlib.Path, text: str) -> None:
    """All of it or nothing: the run may be cut off here, too."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def table_of(before: dict[str, Any], shapes: Iterable[Shape], times: Times) -> dict[str, Any]:
    """The table `before` with the winners of all shapes that have times; what has none stays as it was."""
    names: dict[str, dict[str, dict[int, str]]] = {}
    tiles_of: dict[str, dict[str, dict[int, Tile]]] = {}
    for shape in shapes:
        taken, m = times.found.get(shape.title, {}), shape.sizes[0]
        winner, ours = fastest(taken), fastest({name: t for name, t in taken.items() if name.startswith("[")})
        if winner is not None and not all(of_triton(name) for name in taken):  # with the library
            winners = names.setdefault(shape.kind, {}).setdefault(shape.width, {})
            winners[m] = tables.TRITON if winner.startswith("[") else winner
        if ours is not None:
            tiles_of.setdefault(shape.kind, {}).setdefault(shape.width, {})[m] = tuple(json.loads(ours))
    table = {**before, "triton": dict(before["triton"])}
    for kind, widths in tiles_of.items():
        table["triton"][kind] = table["triton"][kind] | {w: as_lists(ladder(points)) for w, points in widths.items()}
    for kind, by_name in names.items():
        measured = before.get(f"int8_{kind}", {}) if before["device"] else {}  # what was reasoned goes
        table[f"int8_{kind}"] = measured | {w: as_lists(names_ladder(points)) for w, points in by_name.items()}
    return table


def as_lists(rows: list[tuple[int | None, Any]]) -> list[list[Any]]:
    """As JSON has them."""
    return [[m, list(winner) if isinstance(winner, tuple) else winner] for m, winner in rows]


class Tuner:
    """Measures shapes until `seconds` have passed, and keeps the table as it should now be."""

    def __init__(self, name: str, on: Machine, times: Times, rounds: int, seconds: float) -> None:
        self.name, self.on, self.times, self.rounds = name, on, times, rounds
        self.path = tables.FOLDER / f"{name}.json"
        self.before = json.loads(self.path.read_text())
        self.end = time.monotonic() + seconds
        self.every = [shape for layers in LAYERS.values() for shape in layers(on)]
        self.measured: set[str] = set()  # kinds

    def tiles(self, shape: Shape) -> list[Tile]:
        if shape.formula is None:
            return []
        return tiles(shape.formula, self.before["triton"]["candidates"], self.on.processors, *shape.sizes)

    def triton(self, shape: Shape, call: Callable[[], Any]) -> Calls:
        """Every way to run Triton's kernels, by name."""
        if shape.formula is None:
            return {tables.TRITON: functools.partial(without_library, call)}
        return {**by_tile(self.tiles(shape), call), **short_calls(shape.kind, self.on, shape.sizes, call)}

    def tasks(self, shapes: Iterable[Shape]) -> list[Callable[[], None]]:
        """What `warm` is to do before they are measured."""
        return [
            functools.partial(compile_tile, shape.kind, shape.title, name, self.on)
            for shape in shapes
            for name in self.triton(shape, len)
        ]

    def measure(self, shapes: Iterable[Shape], write: bool = True) -> int:
        """How many no time was left for."""
        left = 0
        for shape in shapes:
            if time.monotonic() > self.end:
                left += 1
                continue
            call = shape.triton()
            taken = compare({**shape.library(), **self.triton(shape, call)}, self.rounds, 5)
            winner = fastest(taken)
            if winner is None:
                print(f"{shape.title}: nothing ran: {taken}", flush=True)
                continue
            speed = 2e-12 * math.prod(shape.sizes) / float(taken[winner])
            print(f"{shape.title}: {winner}, {speed:.1f} TOP/s, of {len(taken)}", flush=True)
            self.times.add(shape.title, taken)
            self.measured.add(shape.kind)
            if write:
                self.write()
        return left

    def table(self) -> dict[str, Any]:
        """As what was measured until now makes it."""
        note = f"measured {time.strftime('%Y-%m-%d')} by python -m benchmarks.gpu.tune"
        kept = [kind for kind in PARTS if kind not in self.measured]
        note += f"; {' and '.join(kept)} as before" if kept else ""
        left = len(self.times.left(self.every))
        note += f"; {left} shapes are still to be measured" if left else ""
        found = table_of(self.before, self.every, self.times)
        return {**found, "note": note, **{key: self.times.state[key] for key in ("device", "torch")}}

    def write(self) -> None:
        table = self.table()
        replace_text(self.path, as_text(table) + "\n")
        self.times.write(table["note"])


def kernels() -> str:
    """Of the sources of what is measured: Triton's kernels, and the library's."""
    root = pathlib.Path(tables.__file__).parents[2]
    found = hashlib.sha256()
    for path in sorted(
        [*(root / "pykernels" / "cuda" / "triton").glob("*.py"), *(root / "csrc" / "cuda").rglob("*.*")]
    ):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def times_path(device: str) -> pathlib.Path:
    """Of the file of a device: `NVIDIA H200` has tune-h200.json."""
    words = re.findall(r"[a-z0-9]+", device.lower().removeprefix("nvidia"))
    return FOLDER / f"tune-{'-'.join(words)}.json"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    arguments.add_argument("--seconds", type=float, default=330, help="after which nothing more is measured")
    arguments.add_argument("--rounds", type=int, default=8, help="of which the best counts")
    arguments.add_argument("--again", action="store_true", help="measure everything, whatever has been measured")
    arguments.add_argument("--dry-run", action="store_true", help="print the table and write nothing")
    given = arguments.parse_args()
    require_gpu("tune")
    capability = torch.cuda.get_device_capability()
    name = tables.architecture(capability)
    if name is None:
        raise SystemExit(f"tune: there is no table for compute capability {capability}")
    if not tables.configurations("int8_gemm"):
        print("tune: the CUDA library is not loaded: Triton's tiles alone are measured")
    machine = Machine(capability, torch.cuda.get_device_properties(0).multi_processor_count)
    known = facts()
    state = {**{key: known[key] for key in ("device", "torch", "triton")}, "kernels": kernels()}
    times = Times(times_path(known["device"]), state)
    if given.again:
        times.earlier = set(times.found)
    tuner = Tuner(name, machine, times, given.rounds, given.seconds)
    shapes = times.left(shape for shape in tuner.every if shape.kind in given.only)
    print(f"{len(tuner.every)} shapes, {len(shapes)} to be measured", flush=True)
    warm(tuner.tasks(shapes))
    left = tuner.measure(shapes, not given.dry_run)
    if given.dry_run:
        print(as_text(tuner.table()))
    elif left:
        print(f"no time was left for {left} shapes: run it again, and it goes on")
    else:
        print(f"{tuner.path} and {times.path} are complete")


if __name__ == "__main__":
    main()
