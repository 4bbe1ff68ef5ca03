"""The first steps of a plan run image by image: which can, which do, and that no bit of an answer depends on it."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from pykernels.network.plan.format import DTYPES, Program, Record, encode
from pykernels.network.plan.planned import PlanRow
from pykernels.ops.plan import describe_plan

set_by_image = torch.ops.pykernels._set_by_image
GAINING, ALL = -1, 2**13  # where bytes are saved; all steps that can


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, before = torch.get_num_threads(), set_by_image(ALL)
    yield
    torch.set_num_threads(threads)
    set_by_image(before)


class Blocks(nn.Module):
    """A residual, squeeze and excitation, a concatenation whose parts are written in place, a pool and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.point, self.left, self.right = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 24, 3, 1, 1)
        self.last, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = F.hardswish(self.wide(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.point(y) + x)
        y = torch.cat([F.relu(self.left(y)), F.relu(self.right(y))], 1)
        z = self.last(y)
        return self.head(F.adaptive_avg_pool2d(F.silu(z), 1).flatten(1))


@functools.cache
def blocks(precision: str) -> pk.Optimized:
    torch.manual_seed(0)
    return optimized(Blocks(), torch.randn(2, 3, 17, 20), precision=precision)


def optimized(model: nn.Module, *inputs: torch.Tensor, precision: str = "fp32") -> pk.Optimized:
    fast = pk.optimize(model.eval(), inputs, precision, [inputs] if precision == "int8" else None)
    assert fast.planned is not None and len(fast.planned.labels) == 1
    return fast


def rows(fast: pk.Optimized, *inputs: torch.Tensor) -> list[PlanRow]:
    """Those that run image by image, which come first."""
    found = fast.plan(inputs).rows
    count = sum(row.by_image for row in found)
    assert all(row.by_image for row in found[:count])
    return found[:count]


@torch.no_grad()
def same(fast: pk.Optimized, *inputs: torch.Tensor) -> None:
    """The answers are those of the graph of ops, and of the plan that runs no image by itself."""
    before = set_by_image(0)
    together = fast(*inputs)
    set_by_image(before)
    answer = fast(*inputs)
    assert torch.equal(answer, together) and answer.stride() == together.stride()
    assert torch.equal(answer, fast.program(*inputs)[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_any_number_of_first_steps_keeps_the_bits(precision: str, isa: str) -> None:
    fast, x = blocks(precision), torch.randn(5, 3, 17, 20)
    lengths = set()
    for steps in range(1, 40):
        set_by_image(steps)
        lengths.add(len(rows(fast, x)))
        same(fast, x)
    # Where a residual, a gate or parts of a concatenation are read across a cut, there is none; but elsewhere.
    assert len(lengths) > 4 and max(lengths) == len(fast.plan((x,)).rows)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_any_batch_on_any_number_of_threads(precision: str) -> None:
    fast = blocks(precision)
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        for batch in (2, 3, 4, 8, 16):
            x = torch.randn(batch, 3, 17, 20)
            for steps in (4, ALL):
                set_by_image(steps)
                assert {row.tasks for row in rows(fast, x)} == {batch}
                same(fast, x)
                same(fast, x.to(memory_format=torch.channels_last))


def test_images_that_lie_apart_in_memory() -> None:
    fast = blocks("fp32")
    for x in (
        torch.randn(8, 3, 20, 20)[::2],
        torch.randn(4, 3, 40, 41)[:, :, ::2, 1:21],
        torch.randn(4, 6, 20, 20)[:, 1:4],
        torch.randn(4, 20, 20, 3).permute(0, 3, 1, 2),
        torch.randn(1, 3, 20, 20).expand(4, 3, 20, 20),
        torch.randn(3, 20, 20, 4).permute(3, 0, 1, 2),
    ):
        assert rows(fast, x)
        same(fast, x)


def test_one_image_and_none_run_as_ever() -> None:
    for batch in (0, 1):
        x = torch.randn(batch, 3, 17, 20)
        assert not rows(blocks("fp32"), x)
        same(blocks("fp32"), x)


Mix = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Mixed(nn.Module):
    """Something behind a convolution; `eight` is a constant [8]."""

    eight: torch.Tensor

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.before, self.mix = nn.Conv2d(8, 8, 3, padding=1), mix
        self.register_buffer("eight", torch.linspace(0, 1, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(F.relu(self.before(x)), self.eight) * 2.0


# Of [8, 8, 8, 8], so that sizes tell nothing.
MIXES: dict[str, Mix] = {
    "reshape": lambda y, eight: F.adaptive_avg_pool2d(y, 1).reshape(4, 16).softmax(1),
    "reshape and back": lambda y, eight: y.reshape(4, 16, 8, 8).softmax(1).reshape(8, 8, 8, 8),
    "permute": lambda y, eight: y.permute(1, 0, 2, 3).softmax(1),
    "softmax": lambda y, eight: y.softmax(0),
    "cat": lambda y, eight: torch.cat([y, y], 0),
    "slice": lambda y, eight: y[2:5],
    "reshape to any": lambda y, eight: y.reshape(-1, 4, 8, 8).softmax(1),
    "a number an image": lambda y, eight: y * eight.view(8, 1, 1, 1),
    "roll": lambda y, eight: torch.cat([y[1:], y[:1]], 0),
}
APART: dict[str, Mix] = {
    "reshape": lambda y, eight: y.reshape(y.shape[0], 4, 16, 8).softmax(1),
    "permute": lambda y, eight: y.permute(0, 3, 1, 2).softmax(1),
    "transpose": lambda y, eight: y.flatten(2).transpose(1, 2).softmax(-1),
    "softmax": lambda y, eight: y.softmax(3),
    "cat": lambda y, eight: torch.cat([y, y[:, :, 1:5]], 2),
    "slice": lambda y, eight: y[:, 2:5],
    "one number a channel": lambda y, eight: y * eight.view(8, 1, 1),
    "pad": lambda y, eight: F.pad(y, (1, 2, 0, 1)),
    "upsample": lambda y, eight: F.interpolate(y, scale_factor=2.0, mode="bilinear"),
    "norm": lambda y, eight: F.layer_norm(y, (8,)),
    "an attention": lambda y, eight: y * F.adaptive_avg_pool2d(y, 1),
}


@pytest.mark.parametrize("mix", MIXES)
def test_what_mixes_images_stays_together(mix: str) -> None:
    x = torch.randn(8, 8, 8, 8)
    fast = optimized(Mixed(MIXES[mix]), x)
    found = rows(fast, x)
    assert found and len(found) < len(fast.plan((x,)).rows)
    same(fast, x)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("apart", APART)
def test_what_keeps_images_apart_runs_by_image(apart: str, precision: str) -> None:
    x = torch.randn(8, 8, 8, 8)
    fast = optimized(Mixed(APART[apart]), x, precision=precision)
    assert len(rows(fast, x)) == len(fast.plan((x,)).rows)
    same(fast, x)


@pytest.mark.parametrize("kind", ["add", "mul"])
def test_images_along_another_dimension_of_an_operand_stay_together(kind: str) -> None:
    records = [Record("slice", [0], [1, 0, 1, 1]), Record("reshape", [1], [-1]), Record(kind, [0, 2])]
    plan = encode(Program(0, [(DTYPES[torch.float32], 2)], records, [(3, False)]))
    x, weights = torch.randn(8, 8), torch.empty(0, dtype=torch.uint8)
    assert not any(row["by_image"] for row in describe_plan(plan, weights, [x])["drivers"])
    (answer,) = torch.ops.pykernels.run_plan(plan, weights, [x], [], [], [], [])
    assert torch.equal(answer, getattr(torch, kind)(x, x[:, 0]))


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Linear(6, 8)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.relu(self.first(x)) + self.second(y)[:, :, None, None]

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = F.relu(self.stem(x))
            return self.left(y), self.right(y)

    x, y = torch.randn(4, 3, 9, 9), torch.randn(4, 6)
    two = optimized(Two(), x, y)
    assert len(rows(two, x, y)) == len(two.plan((x, y)).rows)
    same(two, x, y)
    assert not rows(two, x, y[:1])  # one for all images
    same(two, x, y[:1])

    branches = optimized(Branches(), x)  # ends in two values, so that the stem alone has one
    assert 0 < len(rows(branches, x)) < len(branches.plan((x,)).rows)
    with torch.no_grad():
        assert all(map(torch.equal, branches(x), branches.program(x)))


def test_what_moves_fewer_bytes_is_chosen() -> None:
    wide = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1, groups=16))
    heavy = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256))
    set_by_image(GAINING)
    large, vectors = torch.randn(8, 3, 160, 160), torch.randn(8, 256)
    images, products = optimized(wide, large), optimized(heavy, vectors)
    torch.set_num_threads(2)
    assert len(rows(images, large)) == len(images.plan((large,)).rows)
    same(images, large)
    assert not rows(products, vectors)  # the weights are more than the activations
    assert not rows(images, large[:3])  # one thread would wait half of the time
    assert not rows(images, large[:1])
    assert not rows(images, large[:, :, :16, :16])  # they stay in the cache together
    torch.set_num_threads(1)
    assert rows(images, large[:3])


def test_python_threads_and_changing_sizes() -> None:
    fast = blocks("fp32")
    inputs = [torch.randn(n, 3, 17, 16 + n) for n in range(1, 7)]
    set_by_image(0)
    with torch.no_grad():
        expected = [fast(x) for x in inputs]
    set_by_image(ALL)
    wrong: list[int] = []

    def run(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(60):
            i = order.randrange(len(inputs))
            if not torch.equal(fast(inputs[i]), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_the_report_tells_the_rows_of_all_images(restored: None) -> None:
    fast, x = blocks("fp32"), torch.randn(6, 3, 17, 20)
    torch.set_num_threads(2)
    set_by_image(0)
    together = fast.plan((x,))
    set_by_image(ALL)
    apart = fast.plan((x,), rounds=5)
    assert [row.step for row in apart.rows] == [row.step for row in together.rows]
    assert [row.operations for row in apart.rows] == [row.operations for row in together.rows]
    assert [row.shape for row in apart.rows] == [row.shape for row in together.rows]
    for mine, other in zip(apart.rows, together.rows, strict=True):
        assert mine.bytes >= other.bytes and mine.tasks == 6  # weights are read for each image
    assert 0 < apart.arena_bytes < together.arena_bytes
    assert all(row.seconds is not None and row.seconds > 0 for row in apart.rows if row.operations > 10**5)
    assert apart.seconds is not None and apart.call_seconds is not None
    assert "6 images" in str(apart) and "images" not in str(together)


def test_the_choice_is_the_processs() -> None:
    code = "import torch, pykernels; print(torch.ops.pykernels._set_by_image(3))"
    for value, expected in (("0", "0"), ("", "-1")):
        environment = os.environ | {"PYKERNELS_BY_IMAGE": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == expected, done.stderr
    with pytest.raises(RuntimeError, match="_set_by_image: steps must be at least -1, not -2"):
        set_by_image(-2)
