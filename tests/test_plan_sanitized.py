"""Plans (csrc/cpu/plan) hold under sanitizers: tests/cpp/plan_test.cpp, built and run here on files of small networks.

Many threads share plans without a race, and plans whose words, weights and inputs are changed at will, with checksums
that hold, are refused or stay within their memory. For as many cases as one likes, on files and a program that stay:

    python -m tests.test_plan_sanitized FOLDER
    FOLDER/address/plan_test fuzz 0 1000000 FOLDER/*.plan        # the first case, how many; a case is its number
    FOLDER/thread/plan_test threads 10000 FOLDER/*.plan          # calls of each thread
"""

from __future__ import annotations

import functools
import pathlib
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from pykernels.network.plan.format import DTYPES, Program, Record, decode, encode
from pykernels.ops import names
from tests.executables import buildable, built, report

pytestmark = [*buildable, pytest.mark.slow]  # the kernels are built twice, with sanitizers: minutes

SANITIZERS = {
    "address": "-DPYKERNELS_SANITIZE=address,undefined",
    "thread": "-DPYKERNELS_SANITIZE=thread",
}
ISAS = ("scalar", "avx2")  # those that plan_test is built for


class Layers(nn.Module):
    """Products, pools, sums, gates, a concatenation, a table where there are 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point, self.grouped = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 24, 3, 1, 2, dilation=2, groups=2)
        self.head = nn.Linear(56, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(F.pad(x, (1, 0, 2, 1))))
        y = F.hardswish(self.wide(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.point(y) + x)
        z = F.avg_pool2d(F.silu(F.max_pool2d(self.grouped(y), 3, 1, 1)), 2)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2), z], 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Moves(nn.Module):
    """What stands between layers: parts, views and copies."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.relu(self.before(x))
        a, b = y.chunk(2, 1)
        y = torch.cat([b, a + a * b], 1)
        y = F.pad(y, (1, 1, 0, 0))[:, :, ::2, 1:-1]
        t = y.flatten(2).transpose(1, 2)
        return self.after(t), t[:, :1].expand(-1, 3, -1), y.permute(0, 2, 3, 1)


class Images(nn.Module):
    """Images that grow, transposed, by neighbours and between them; what stands alone; normalizations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up = (
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.ConvTranspose2d(8, 12, 3, 2, 1, output_padding=(1, 0), groups=2),
        )
        self.point, self.norm, self.head = nn.Conv2d(20, 8, 1), nn.LayerNorm(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.leaky_relu(self.stem(x), 0.2)
        up = self.up(y)
        near = F.interpolate(y, size=up.shape[2:], mode="nearest")
        y = self.point(F.silu(torch.cat([up, near], 1)))
        y = F.relu(y.flip(2) + F.adaptive_avg_pool2d(y, 1))
        y = self.head(F.interpolate(y, scale_factor=1.5, mode="bilinear"))
        y = F.interpolate(y, scale_factor=(2.0, 1.0), mode="bilinear", align_corners=True)
        tokens = self.norm(near.permute(0, 2, 3, 1))
        return torch.softmax(y, 1), torch.softmax(tokens, -1)


class Attends(nn.Module):
    """Attention with masks of numbers and of truth, and of what came before; two heads share their keys. Before it
    a norm, which writes 8 bits where there are some, behind it a sum of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.query, self.both, self.out = (
            nn.LayerNorm(3),
            nn.Linear(3, 12),
            nn.Linear(3, 12),
            nn.Linear(12, 3),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x.flatten(2).transpose(1, 2)
        tokens = self.norm(residual)
        q = self.query(tokens).unflatten(2, (2, -1)).transpose(1, 2)
        k, v = self.both(tokens).unflatten(2, (2, 1, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        first = x.flatten(2)[:, :1, None]
        y = F.scaled_dot_product_attention(q, k, v, first, enable_gqa=True)
        y = y + F.scaled_dot_product_attention(q, k, v, first > 0, enable_gqa=True)
        y = y + F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2)) + residual


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "layers": (Layers, (3, 17, 14)),
    "moves": (Moves, (3, 12, 5)),
    "images": (Images, (3, 8, 10)),
    "attends": (Attends, (3, 5, 4)),
}


def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """A plan of the steps that few networks have, and its weights: an image is put before the others, channels_last."""
    image = [0, DTYPES[torch.float32], 1, 3, 4, 5]
    records = [Record("constant", [], image), Record("cat", [1, 0], [0]), Record("contiguous", [2], [1])]
    weights = torch.randn(64).view(torch.uint8)
    return encode(Program(weights.numel(), [(DTYPES[torch.float32], 4)], records, [(3, True), (2, False)])), weights


class Calls(torch.fx.Interpreter):
    """Runs a network and keeps what its plans were called with, and their answers."""

    def __init__(self, program: torch.fx.GraphModule) -> None:
        super().__init__(program)
        self.seen: list[Seen] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        answer = super().call_function(target, args, kwargs)
        if target is torch.ops.pykernels.run_plan.default:
            self.seen.append((args[0], args[1], args[2], answer))
        return answer


def memory(t: torch.Tensor) -> bytes:
    """The bytes from a tensor's first element to its last."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return bytes(t.as_strided((elements,), (1,)).view(torch.uint8).tolist()) if t.numel() else b""


def packed(*parts: int | bytes) -> bytes:
    """Words, and bytes padded to whole words."""
    return b"".join(p + b"\0" * (-len(p) % 8) if isinstance(p, bytes) else struct.pack("<q", p) for p in parts)


def call(inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> bytes:
    """One call, as plan_test reads it."""
    parts: list[int | bytes] = [len(inputs)]
    for t in inputs:
        parts += [DTYPES[t.dtype], t.dim(), *t.shape, *t.stride(), len(memory(t)), memory(t)]
    parts.append(len(outputs))
    for t in outputs:
        parts += [len(memory(t)), memory(t)]
    return packed(*parts)


Seen = tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]  # plan, weights, inputs, outputs


def calls_by_hand() -> list[list[Seen]]:
    plan, weights = by_hand()
    inputs = [[torch.randn(n, 3, 4, 5)] for n in (1, 2, 0)]
    run = torch.ops.pykernels.run_plan
    return [[(plan, weights, x, run(plan, weights, x, [], [], [], [])) for x in inputs]]


def calls_of(fast: pk.Optimized, batches: list[torch.Tensor]) -> list[list[Seen]]:
    """Of each plan of a network."""
    assert fast.planned is not None
    calls = Calls(fast.planned.program)
    for batch in batches:
        calls.run(batch)
    return [[seen for seen in calls.seen if seen[0] is plan] for plan in {id(s[0]): s[0] for s in calls.seen}.values()]


@torch.no_grad()
def write(folder: pathlib.Path) -> tuple[list[str], set[str]]:
    """Files of the networks' plans in each precision, for each isa here; the kinds of steps that stand in them."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[], list[list[Seen]]]] = {"hand": calls_by_hand}
    for name, (build, size) in NETWORKS.items():
        for precision in ("fp32", "bf16", "int8"):
            x = torch.randn(2, *size)
            fast = pk.optimize(build().eval(), (x,), precision, [(x,)] if precision == "int8" else None)
            batches = [x, x[:1], torch.randn(3, *size).to(memory_format=torch.channels_last), x[:0]]
            makers[f"{name}-{precision}"] = functools.partial(calls_of, fast, batches)
    files, kinds = [], set()
    for isa in ISAS:
        before = torch.ops.pykernels._set_isa(isa)
        for name, calls in makers.items():
            for number, seen in enumerate(calls()):
                plan, weights = seen[0][:2]
                head = packed(names.ISAS.index(isa), plan.numel(), weights.numel(), len(seen))
                file = folder / f"{name}-{number}-{isa}.plan"
                file.write_bytes(head + packed(memory(plan), memory(weights)) + b"".join(call(*s[2:]) for s in seen))
                files.append(str(file))
                kinds |= {record.kind for record in decode(plan).records}
        torch.ops.pykernels._set_isa(before)
    return files, kinds


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    written, kinds = write(tmp_path_factory.mktemp("plans"))
    assert kinds == set(names.PLAN_STEPS)
    return written


def test_threads_that_come_at_once_or_late_or_never_share_plans(files: list[str], tmp_path: pathlib.Path) -> None:
    (told,) = report("plan_test", tmp_path, SANITIZERS["thread"], arguments=["threads", "100", *files])
    calls = re.fullmatch(r"(\d+) calls, 0 differences", told)
    assert calls is not None and int(calls[1]) % 800 == 0 and int(calls[1]) >= 800 * len(files) // len(ISAS), told


def test_changed_plans_weights_and_inputs_are_refused_or_harmless(files: list[str], tmp_path: pathlib.Path) -> None:
    (told,) = report("plan_test", tmp_path, SANITIZERS["address"], arguments=["fuzz", "0", "20000", *files])
    counts = {outcome: int(count) for count, outcome in re.findall(r"(\d+) ([^,]+)", told)}
    assert counts["cases"] == 20000 and counts["runs"] > 1000 and counts["refused"] > 1000, told


if __name__ == "__main__":
    here = pathlib.Path(sys.argv[1]).resolve()
    here.mkdir(exist_ok=True)
    write(here)
    for sanitizer, option in SANITIZERS.items():
        built("plan_test", here / sanitizer, option)
