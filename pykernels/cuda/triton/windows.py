"""The windows of pools: sizes as torch has them, checked as csrc/cpu/pool/driver.cpp does, in its words."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import check_dim, check_pair
from pykernels.cuda.triton.tiles import check

__all__ = ["GEOMETRY", "Windows", "adaptive", "check_input", "longest", "plain", "window"]

SIDES = ("height", "width")
# Numbers of a kernel's whose value must not choose the machine code.
GEOMETRY = [
    "height", "width", "out_h", "out_w", "reach_h", "reach_w", "stride_h", "stride_w", "padding_h",
    "padding_w",
]  # fmt: skip
Pair = tuple[int, int]
Ints = tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """The windows along both axes: (height, width) each.

    Attributes:
        outputs: how many.
        taps: a bound of how many elements of the plane one has.
        reach: elements from a window's first to its last, no more than the padded plane has.
    """

    outputs: Pair
    taps: Pair
    reach: Pair = (0, 0)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    step: Pair = (1, 1)
    adaptive: bool = False


def check_input(op: str, x: torch.Tensor) -> None:
    check_dim(op, "x", x, 4)
    good = min(x.shape[1:]) > 0
    check(good, op, f"x may be empty in its batch dimension only, not of shape {list(x.shape)}")


def plain(
    op: str,
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Windows:
    pairs = (tuple(pair) for pair in (kernel, stride, padding, dilation))
    return _plain(op, x.shape[2], x.shape[3], *pairs, ceil_mode)


@functools.lru_cache(1024)
def _plain(
    op: str, height: int, width: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, ceil_mode: bool
) -> Windows:
    check_pair(op, "kernel_size", kernel, 1)
    check_pair(op, "stride", stride, 1)
    check_pair(op, "padding", padding, 0)
    check_pair(op, "dilation", dilation, 1)
    for p, k in zip(padding, kernel, strict=True):
        check(p <= k // 2, op, f"padding must be at most half of kernel_size, not {p} for kernel_size {k}")
    axes = [
        _axis(op, size, kernel[d], stride[d], padding[d], dilation[d], ceil_mode, SIDES[d])
        for d, size in enumerate((height, width))
    ]
    outputs, taps, reach = ((down, right) for down, right in zip(*axes, strict=True))
    return Windows(outputs, taps, reach, _pair(stride), _pair(padding), _pair(dilation))


def _pair(numbers: Sequence[int]) -> Pair:
    return int(numbers[0]), int(numbers[1])


def _axis(
    op: str, size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool, side: str
) -> tuple[int, int, int]:
    """(outputs, taps, reach). With ceil_mode a window may overrun the end, but must begin before the padding there."""
    reach = dilation * (kernel - 1) + 1
    room = size + 2 * padding - reach
    outputs = (-1 if room < 0 else room // stride) + 1
    if ceil_mode and room + stride - 1 >= 0:
        outputs = (room + stride - 1) // stride + 1
        if (outputs - 1) * stride >= size + padding:
            outputs -= 1
    words = f"kernel_size {kernel} (dilation {dilation}) does not fit x, whose {side} is {size} and padding {padding}"
    check(outputs > 0, op, words)
    # Only a dilated window that begins in the padding can step over the whole plane.
    for begin in range(-padding, 0, stride) if dilation > 1 else ():
        words = f"padding {padding} and dilation {dilation} leave a window without an element of x, whose {side} is"
        check(begin % dilation < min(begin + reach, size), op, f"{words} {size}")
    return outputs, min(kernel, -(-size // dilation)), min(reach, size + 2 * padding)


def adaptive(op: str, x: torch.Tensor, output: Sequence[int]) -> Windows:
    """Output o of O covers [floor(o * H / O), ceil((o + 1) * H / O))."""
    check_pair(op, "output_size", output, 1)
    taps = [
        size // outputs if size % outputs == 0 else min(size, size // outputs + 2)
        for size, outputs in zip(x.shape[2:], output, strict=True)
    ]
    return Windows(_pair(output), _pair(taps), adaptive=True)


def longest(size: int, windows: Windows, d: int) -> int:
    """Elements of the longest window along axis d, none dilated."""
    outputs = range(windows.outputs[d])
    if windows.adaptive:
        n = windows.outputs[d]
        return max(-(-(o + 1) * size // n) - o * size // n for o in outputs)
    begins = [o * windows.stride[d] - windows.padding[d] for o in outputs]
    return max(min(begin + windows.reach[d], size) - max(begin, 0) for begin in begins)


@triton.jit
def window(o, size, outputs, reach, stride, padding, step, ADAPTIVE: tl.constexpr):
    """Along an axis, output o's first tap in the plane, and where its window ends in the plane."""
    if ADAPTIVE:
        o = o.to(tl.int64)
        begin = o * size // outputs
        end = ((o + 1) * size + outputs - 1) // outputs
        return begin.to(tl.int32), end.to(tl.int32)
    else:
        begin = o * stride - padding
        before = tl.maximum(0 - begin, 0)
        return begin + (before + step - 1) // step * step, tl.minimum(begin + reach, size)
