"""Upsampling and interleaved phases: the oracle's bits on every isa, and torch's answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from int8 import codes

from pykernels import reference
from pykernels.ops import upsample
from pykernels.ops.dtypes import REALS

NHWC = torch.channels_last
BYTES = (torch.uint8, torch.int8)
SHAPES = [(2, 3, 5, 7), (1, 37, 4, 6), (2, 1, 9, 1), (1, 16, 1, 1)]
# size, scale factors
WANTED = [
    ([10, 14], []),
    ([5, 7], []),
    ([13, 4], []),
    ([1, 1], []),
    ([], [2.0, 2.0]),
    ([], [1.7, 0.6]),
    ([], [4.0, 3.0]),
]


def image(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return codes(shape, dtype, 1) if dtype in BYTES else torch.randn(shape).to(dtype)


def same(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    last = x.is_contiguous(memory_format=NHWC) and not x.is_contiguous()
    assert got.is_contiguous(memory_format=NHWC if last else torch.contiguous_format)


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    return [x, x.contiguous(memory_format=NHWC), x.transpose(2, 3).contiguous().transpose(2, 3)]


@pytest.mark.parametrize("dtype", [*REALS, *BYTES], ids=str)
@pytest.mark.parametrize(("size", "factors"), WANTED)
def test_upsampling_is_the_oracle(isa: str, size: list[int], factors: list[float], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        if factors and min(int(shape[2] * factors[0]), int(shape[3] * factors[1])) < 1:
            continue
        for x in layouts(image(shape, dtype)):
            wanted = {"size": size or None, "scale_factor": factors or None}
            same(upsample.upsample_nearest2d(x, **wanted), reference.upsample_nearest2d(x, size, factors), x)
            for align in (False, True):
                got = upsample.upsample_bilinear2d(x, **wanted, align_corners=align)
                same(got, reference.upsample_bilinear2d(x, size, align, factors), x)


@pytest.mark.parametrize(("size", "factors"), WANTED)
def test_upsampling_is_torchs(size: list[int], factors: list[float]) -> None:
    x = torch.randn(2, 5, 5, 7)
    wanted = {"size": size or None, "scale_factor": tuple(factors) or None}
    torch.testing.assert_close(upsample.upsample_nearest2d(x, **wanted), F.interpolate(x, **wanted), rtol=0, atol=0)
    for align in (False, True):
        got = upsample.upsample_bilinear2d(x, **wanted, align_corners=align)
        torch.testing.assert_close(got, F.interpolate(x, **wanted, mode="bilinear", align_corners=align))


def test_bytes_between_two_of_one_scale_have_that_scale(isa: str) -> None:
    q = codes((1, 8, 6, 6), torch.uint8, 1)
    real = reference.dequantize(q, 0.05, 100)
    expected = F.interpolate(real, scale_factor=2, mode="bilinear")
    got = reference.dequantize(upsample.upsample_bilinear2d(q, scale_factor=2), 0.05, 100)
    assert (got - expected).abs().max() <= 0.0251


@pytest.mark.parametrize("dtype", [*REALS, *BYTES], ids=str)
@pytest.mark.parametrize(
    ("stride", "crop", "groups"),
    [
        ([2, 2], [0] * 4, 1),
        ([2, 2], [1, 1, 1, 1], 1),
        ([3, 2], [1, 0, 2, 3], 2),
        ([1, 1], [0] * 4, 3),
        ([2, 1], [0, 3, 4, 0], 6),
    ],
)
def test_interleaving_is_the_oracle(stride: list[int], crop: list[int], groups: int, dtype: torch.dtype) -> None:
    x = image((2, 12 * stride[0] * stride[1], 5, 4), dtype)
    for laid in layouts(x):
        same(upsample.interleave(laid, stride, crop, groups), reference.interleave(x, stride, crop, groups), laid)


def test_no_images() -> None:
    x = torch.empty(0, 8, 3, 3)
    assert upsample.upsample_nearest2d(x, 6).shape == (0, 8, 6, 6)
    assert upsample.upsample_bilinear2d(x, 6).shape == (0, 8, 6, 6)
    assert upsample.interleave(x, 2).shape == (0, 2, 6, 6)


X = torch.zeros(1, 8, 3, 3)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("x must be float32, bfloat16, float16, uint8 or int8, not int64", lambda: upsample.interleave(X.long(), 2)),
        ("x must have 4 dimensions", lambda: upsample.upsample_nearest2d(X[0], 2)),
        ("either output_size or scale_factors", lambda: upsample.upsample_nearest2d(X)),
        ("either output_size or scale_factors", lambda: upsample.upsample_bilinear2d(X, 3, 2.0)),
        ("output_size must have 2 numbers, not 3", lambda: upsample.upsample_nearest2d(X, [1, 2, 3])),
        ("scale_factors must have 2 numbers, not 3", lambda: upsample.upsample_nearest2d(X, None, [1.0, 2.0, 3.0])),
        ("the height and width of the result must lie in", lambda: upsample.upsample_bilinear2d(X, 0)),
        ("the height and width of the result must lie in", lambda: upsample.upsample_bilinear2d(X, None, 0.1)),
        ("the height and width of the result must lie in", lambda: upsample.upsample_bilinear2d(X, None, torch.nan)),
        ("the height and width of x must lie in", lambda: upsample.upsample_bilinear2d(X[:, :, :0], 2)),
        ("stride must be at least 1", lambda: upsample.interleave(X, 0)),
        ("stride must be at most 64", lambda: upsample.interleave(X, 65)),
        ("crop must have 4 numbers", lambda: upsample.interleave(X, 2, [1, 1])),
        ("crop must lie in", lambda: upsample.interleave(X, 2, [0, 0, 0, -1])),
        ("crop takes 7 of 3 times 2", lambda: upsample.interleave(X, 2, [3, 4, 0, 0])),
        ("x must have channels for 9 phases of 1 groups, not 8", lambda: upsample.interleave(X, 3)),
        ("x must have channels for 4 phases of 3 groups, not 8", lambda: upsample.interleave(X, 2, groups=3)),
    ],
)
def test_bad_arguments_are_named(message: str, call) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
