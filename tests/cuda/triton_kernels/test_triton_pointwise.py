"""add, activate and leaky_relu in Triton, interpreted: the CPU's bits, what is refused, their machine code. And what
upsampling and normalizations refuse."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest
import torch
from cubin import accesses, check, compiled
from inputs import BF16, FP16, FP32, LAYOUTS, numbers, same
from launchers import Launchers, refuses_as_the_cpu_does
from torch.utils._python_dispatch import _disable_current_modes

from pykernels.cuda.triton import pointwise as kernels
from pykernels.cuda.triton.arguments import ACTIVATIONS
from pykernels.cuda.triton.planes import TILE
from pykernels.ops import normalize, pointwise, upsample

SHAPE = (2, 19, 5, 16)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_the_cpus(launchers: Launchers, activation: str, dtype: torch.dtype) -> None:
    x, y = numbers(SHAPE, dtype), numbers(SHAPE, dtype)
    got = pointwise.activate(x, activation), pointwise.add(x, y, activation)
    assert launchers.calls == {"activate": 1, "add": 1}
    with _disable_current_modes():
        for a, b in zip(got, (pointwise.activate(x, activation), pointwise.add(x, y, activation)), strict=True):
            same(a, b, like=x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_gates(launchers: Launchers, layout: str) -> None:
    x = LAYOUTS[layout](numbers(SHAPE, FP32))
    calls: list[Callable[[], torch.Tensor]] = [lambda: pointwise.leaky_relu(x, 0.2)]
    if x.dim() == 4:
        gate = numbers((*x.shape[:2], 1, 1), FP32)
        calls.append(lambda: pointwise.add(x, gate, "relu"))
    for call in calls:
        got = call()
        with _disable_current_modes():
            same(got, call(), like=x)
    assert launchers.calls["leaky_relu"] == 1


def test_no_elements(launchers: Launchers) -> None:
    x = torch.empty(2, 0, 3, 3)
    for got in (pointwise.add(x, x), pointwise.activate(x, "silu"), pointwise.leaky_relu(x)):
        assert got.shape == x.shape


X, Q = torch.zeros(1, 8, 3, 3), torch.zeros(1, 8, 3, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be float32, bfloat16 or float16", lambda: pointwise.activate(Q, "relu")),
        ("x must be float32, bfloat16 or float16", lambda: pointwise.leaky_relu(Q)),
        ("activation must be one of none, relu", lambda: pointwise.activate(X, "swish")),
        ("a must be float32, bfloat16 or float16", lambda: pointwise.add(Q, X)),
        ("b must be float32, bfloat16 or float16", lambda: pointwise.add(X, Q)),
        ("b must be float32 as a is, not bfloat16", lambda: pointwise.add(X, X.bfloat16())),
        ("b must have the shape of a", lambda: pointwise.add(X, X[:, :1])),
        ("x must be float32, bfloat16, float16, uint8 or int8", lambda: upsample.interleave(X.long(), 2)),
        ("x must have 4 dimensions", lambda: upsample.upsample_nearest2d(X[0], 2)),
        ("either output_size or scale_factors", lambda: upsample.upsample_bilinear2d(X, 3, 2.0)),
        ("output_size must have 2 numbers, not 3", lambda: upsample.upsample_nearest2d(X, [1, 2, 3])),
        ("the height and width of the result must lie in", lambda: upsample.upsample_bilinear2d(X, 0)),
        ("the height and width of the result must lie in", lambda: upsample.upsample_nearest2d(X, None, 0.1)),
        ("the height and width of x must lie in", lambda: upsample.upsample_bilinear2d(X[:, :, :0], 2)),
        ("stride must be at least 1", lambda: upsample.interleave(X, 0)),
        ("stride must be at most 64", lambda: upsample.interleave(X, 65)),
        ("crop must lie in", lambda: upsample.interleave(X, 2, [0, 0, 0, -1])),
        ("crop takes 7 of 3 times 2", lambda: upsample.interleave(X, 2, [3, 4, 0, 0])),
        ("x must have channels for 9 phases of 1 groups, not 8", lambda: upsample.interleave(X, 3)),
        ("x must be float32, bfloat16 or float16", lambda: normalize.softmax(Q)),
        (r"dim must lie in \[-4, 3\]", lambda: normalize.softmax(X, 4)),
        ("x must have a dimension", lambda: normalize.layer_norm(torch.zeros(()))),
        (r"weight must be float32 of shape \[3\], not float32 \[4\]", lambda: normalize.layer_norm(X, torch.zeros(4))),
    ],
)
def test_bad_arguments_are_named_as_on_the_cpu(launchers: Launchers, message: str, call: Callable[[], object]) -> None:
    refuses_as_the_cpu_does(call, message)


@pytest.mark.parametrize(
    ("constants", "arch"),
    [
        ({"OP": "add", "ACTIVATION": "relu"}, 90),
        ({"OP": "activate", "ACTIVATION": "silu"}, 80),
        ({"OP": "leaky_relu", "ACTIVATION": "none"}, 90),
    ],
    ids=str,
)
def test_machine_code(constants: dict[str, object], arch: int, tmp_path: pathlib.Path) -> None:
    types = {**dict.fromkeys(["a", "b", "out"], "*fp32"), "n": "i64", "slope": "fp32"}
    kernel = compiled(
        kernels._pointwise, arch, types, {"REAL": "fp32", "TILE": TILE, **constants}, kernels.OPTIONS, {"n"}
    )
    check(kernel, tmp_path, 128, activation=str(constants["ACTIVATION"]))
    assert {"ld 16", "st 16"} <= accesses(kernel)
