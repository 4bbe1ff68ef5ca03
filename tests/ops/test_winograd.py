"""3x3 convolutions by Winograd's tiles: as close to the exact answer as they are said to be, where they are allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pykernels as pk

ops = torch.ops.pykernels

# Of the largest output, by the side of a tile: docs/performance.md.
BOUND = {2: 4e-6, 4: 3e-5}
# Channels, outputs, height, width, padding (left, right, top, bottom), side of a tile.
LAYERS = {
    "whole tiles of 4": (64, 48, 16, 20, (1, 1, 1, 1), 4),
    "broken tiles of 4": (48, 64, 15, 21, (1, 1, 1, 1), 4),
    "tiles of 2": (128, 128, 14, 13, (1, 1, 1, 1), 2),
    "no padding": (64, 64, 18, 22, (0, 0, 0, 0), 4),
    "asymmetric padding": (64, 64, 14, 15, (2, 0, 5, 1), 4),
    "odd outputs": (64, 75, 16, 16, (1, 1, 1, 1), 4),
    "many channels": (512, 64, 16, 16, (1, 1, 1, 1), 4),
}
Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]]


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    before = ops._set_winograd(True)
    yield
    ops._set_winograd(before)


def layer(name: str, images: int = 2) -> Layer:
    c, o, h, w, padding, _ = LAYERS[name]
    return torch.randn(images, c, h, w).relu(), torch.randn(o, c, 3, 3), torch.randn(o), padding


def run(made: Layer, activation: str = "none", *residual: object, direct: bool = False) -> torch.Tensor:
    x, w, b, padding = made
    before = ops._set_winograd(not direct)
    try:
        packed = ops.conv2d_pack(w, b, 1)
        return ops.conv2d(x, packed, w.shape[0], [3, 3], [1, 1], list(padding), [1, 1], 1, activation, *residual)
    finally:
        ops._set_winograd(before)


def exact(made: Layer) -> torch.Tensor:
    x, w, b, padding = made
    return F.conv2d(F.pad(x.double(), padding), w.double(), b.double())


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", LAYERS)
def test_the_error_is_within_its_bound(isa: str, name: str) -> None:
    made = layer(name)
    expected, y, direct = exact(made), run(made), run(made, direct=True)
    assert not torch.equal(y, direct), "this layer does not run by Winograd's tiles"
    assert error(y, expected) < BOUND[LAYERS[name][-1]]
    assert error(direct, expected) < 3e-6
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("activation", ["none", "relu6", "silu"])
def test_epilogues(isa: str, activation: str, order: str) -> None:
    made = layer("broken tiles of 4")
    expected = exact(made)
    residual = torch.randn_like(expected, dtype=torch.float32) * 20
    act = {"none": lambda f: f, "relu6": F.relu6, "silu": F.silu}[activation]
    y = run(made, activation, residual, order)
    expected = act(expected + residual) if order == "before" else act(expected) + residual
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=2e-3, check_stride=False)


@pytest.mark.parametrize("name", LAYERS)
def test_neither_threads_nor_the_batch_change_a_bit(name: str) -> None:
    x, w, b, padding = made = layer(name, images=3)
    expected, threads = run(made), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(run(made), expected)
            assert torch.equal(run((x[1:2], w, b, padding)), expected[1:2])
    finally:
        torch.set_num_threads(threads)


def test_a_plan_answers_as_the_graph_of_ops_does() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 96, 3, padding=1)).eval()
    x = torch.randn(2, 64, 17, 16)
    optimized = pk.optimize(model, (x,))
    answers = []
    for wanted in (True, False):
        ops._set_winograd(wanted)
        with torch.no_grad():
            answers.append(optimized(x))
            assert torch.equal(optimized.program(x)[0], answers[-1])
    assert not torch.equal(*answers)


def test_weights_that_change_in_place_are_noticed() -> None:
    x, w, b, _ = layer("whole tiles of 4")
    packed, other = ops.conv2d_pack(w, b, 1), ops.conv2d_pack(-w, b, 1)
    y = []
    for source in (packed.clone(), other):
        packed.copy_(source)
        y.append(ops.conv2d(x, packed, len(b), [3, 3], [1, 1], [1] * 4, [1, 1], 1))
    assert torch.equal(y[1], ops.conv2d(x, other, len(b), [3, 3], [1, 1], [1] * 4, [1, 1], 1))
    assert not torch.equal(y[0], y[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_among_the_tiles_that_read_it(isa: str, value: float) -> None:
    x, w, b, padding = layer("whole tiles of 4", images=1)
    expected = run((x, w, b, padding))
    x[0, 5, 8, 10] = value
    y = run((x, w, b, padding))
    assert not y[:, :, 7:10, 9:12].isfinite().any()
    outside = torch.ones(16, 20, dtype=torch.bool)
    outside[4:12, 8:12] = False  # two tiles' patches hold row 8, one tile's column 10
    assert torch.equal(y[..., outside], expected[..., outside])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_fp32_runs_so(dtype: torch.dtype) -> None:
    x, w, b, padding = layer("whole tiles of 4")
    made = x.to(dtype), w.to(dtype), b, padding
    assert torch.equal(run(made), run(made, direct=True))


@pytest.mark.parametrize(
    ("channels", "size", "rest"),
    [
        (64, 7, {}),
        (16, 32, {}),
        (40, 32, {}),
        (64, 32, {"stride": 2}),
        (64, 32, {"dilation": 2}),
        (64, 32, {"groups": 2}),
    ],
)
def test_other_convolutions_do_not(channels: int, size: int, rest: dict[str, int]) -> None:
    x, conv = torch.randn(1, channels, size, size), nn.Conv2d(channels, 64, 3, padding=1, **rest)
    packed = ops.conv2d_pack(conv.weight.detach(), None, conv.groups)
    answers = []
    for wanted in (True, False):
        ops._set_winograd(wanted)
        answers.append(
            ops.conv2d(x, packed, 64, [3, 3], list(conv.stride), [1] * 4, list(conv.dilation), conv.groups)  # type: ignore[arg-type]
        )
    assert torch.equal(*answers)


def test_the_environment_turns_it_off() -> None:
    code = "import torch, pykernels; print(torch.ops.pykernels._set_winograd(True))"
    for value, expected in (("0", "False"), ("1", "True"), ("", "True")):
        environment = os.environ | {"PYKERNELS_WINOGRAD": value}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == expected, done.stderr
