"""The sizes of a convolution, checked as csrc/cpu/conv/op.cpp does, in its words."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pykernels.cuda.triton.arguments import check_dim, check_pair, is_channels_last
from pykernels.cuda.triton.pack import cuda_layout
from pykernels.cuda.triton.tiles import check
from pykernels.ops.packed import Layout

__all__ = ["ConvShape", "conv_shape", "pixels_of"]


@dataclass(frozen=True)
class ConvShape:
    """n images of c x h x w to n of o x oh x ow; kernel, stride and dilation as (height, width).

    Attributes:
        padding: left, right, top, bottom.
    """

    n: int
    c: int
    h: int
    w: int
    o: int
    oh: int
    ow: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    groups: int

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Of the result."""
        return self.n, self.o, self.oh, self.ow

    @property
    def pointwise(self) -> bool:
        """Whether every pixel of the result is a matrix times the one pixel of the input in its place."""
        return self.kernel == self.stride == (1, 1) and not any(self.padding) and self.groups == 1

    def layout(self, dtype: torch.dtype) -> Layout:
        """Of weights packed for it."""
        return cuda_layout(dtype, self.groups, self.o // self.groups, self.c // self.groups, *self.kernel)


def conv_shape(
    op: str,
    x: torch.Tensor,
    out_channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> ConvShape:
    check_dim(op, "x", x, 4)
    pairs = tuple(kernel), tuple(stride), tuple(padding), tuple(dilation)
    return _conv_shape(op, tuple(x.shape), out_channels, *pairs, groups)


@functools.lru_cache(4096)
def _conv_shape(
    op: str,
    size: tuple[int, ...],
    out_channels: int,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> ConvShape:
    check_pair(op, "kernel_size", kernel, 1)
    check_pair(op, "stride", stride, 1)
    check_pair(op, "dilation", dilation, 1)
    words = f"padding must be (left, right, top, bottom), not {len(padding)} numbers"
    check(len(padding) == 4, op, words)
    for p in padding:
        check(0 <= p < 2**20, op, f"padding must lie in [0, 2^20), not {p}")
    check(groups >= 1, op, f"groups must be at least 1, not {groups}")
    n, c, h, w = size
    check(c % groups == 0, op, f"groups is {groups}, which does not divide the {c} channels of x")
    words = f"groups is {groups}, which does not divide out_channels, {out_channels}"
    check(out_channels > 0 and out_channels % groups == 0, op, words)
    (kh, kw), (dh, dw), (left, right, top, bottom) = kernel, dilation, padding
    room_h, room_w = h + top + bottom - dh * (kh - 1) - 1, w + left + right - dw * (kw - 1) - 1
    check(
        room_h >= 0 and room_w >= 0,
        op,
        f"x of shape {list(size)} with its padding is smaller than kernel_size {kh}x{kw} (dilation {dh}x{dw})",
    )
    sh, sw = stride
    return ConvShape(
        n, c, h, w, out_channels, room_h // sh + 1, room_w // sw + 1, (kh, kw), (sh, sw), (dh, dw),
        (left, right, top, bottom), groups,
    )  # fmt: skip


def pixels_of(t: torch.Tensor) -> torch.Tensor:
    """t [N, C, H, W], channels_last or made so, as [N * H * W, C]."""
    n, c, h, w = t.shape
    dense = t if is_channels_last(t) else t.contiguous(memory_format=torch.channels_last)
    return dense.as_strided((n * h * w, c), (c, 1))
