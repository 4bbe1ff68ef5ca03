"""Convolutions of CUDA tensors: int8 as an implicit GEMM here, floats by cuDNN and an epilogue.

The rows of the GEMM are the pixels of the result, its depth the taps times the channels of a group: a row of A is
gathered from the input as the tile is loaded, never stored. Inputs are channels_last; each group's channels are
zero-padded to a multiple of 16 where they are not one, so that all loads have 16 bytes; few channels of one group are
few_channels.py's. Beyond the border stands the zero point. Otherwise as gemm.py; 1x1 convolutions without stride and
padding are calls of it. Where the CUDA library is loaded and its table says so, its kernels run instead (library.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from pykernels.cuda import tables
from pykernels.cuda.triton import library, tiles
from pykernels.cuda.triton.arguments import (
    BYTES,
    as_bits,
    ceil_div,
    check_activation,
    check_byte_dtype,
    check_device,
    check_dim,
    check_real_dtype,
    check_scale,
    check_zero_point,
    is_channels_last,
    name,
)
from pykernels.cuda.triton.conv_shape import ConvShape, conv_shape, pixels_of
from pykernels.cuda.triton.depthwise import depthwise
from pykernels.cuda.triton.few_channels import conv_few_channels
from pykernels.cuda.triton.floats import check_residual, check_residual_shape, finish_floats
from pykernels.cuda.triton.gemm import (
    GROUP,
    NUMBERS,
    Config,
    Epilogue,
    add_parts,
    by_formula,
    gemm,
    machine,
    measured,
    place_tile,
    rows16,
    store_tile,
)
from pykernels.cuda.triton.linear import check_out
from pykernels.cuda.triton.pack import Packed, check_groups, checked_packed
from pykernels.cuda.triton.tiles import check
from pykernels.ops.dtypes import ANY_WORDS, REALS

__all__ = ["conv2d", "conv_bn_act", "qconv2d"]

SIZES = ["H", "W", "OH", "OW", "KW", "SH", "SW", "DH", "DW", "TOP", "LEFT", "GROUPS"]


@triton.jit
def _gather(
    x, w, image, iy, ix, there, begin, end, ROW, PIXEL, H, W, KW, DH, DW, K, fill,
    FLIP: tl.constexpr, FILL: tl.constexpr, WHOLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """s32 [BM, BN]: products over [begin, end) of K = taps * ROW. `w` [1, BN] points at the rows of weights.

    Row i of A begins at pixel (iy[i], ix[i]) of `image`, pointers [BM]. WHOLE: a tile's depth is within one tap.
    """
    acc = tl.zeros((iy.shape[0], BN), tl.int32)
    j = tl.arange(0, BK)
    for first in range(begin, end, BK):
        if WHOLE:
            tap = first // ROW
            dy = tap // KW * DH
            dx = tap % KW * DW
            y = iy + dy
            z = ix + dx
            mask = (there & (y >= 0) & (y < H) & (z >= 0) & (z < W))[:, None]
            at = (y * W + z).to(tl.int64) * PIXEL + (first - tap * ROW)
            a = tl.load(image[:, None] + at[:, None] + j[None, :], mask=mask, other=0)
            b = tl.load(w + (first + j)[:, None])
        else:
            k = first + j
            tap = k // ROW
            y = iy[:, None] + (tap // KW * DH)[None, :]
            z = ix[:, None] + (tap % KW * DW)[None, :]
            mask = there[:, None] & (y >= 0) & (y < H) & (z >= 0) & (z < W) & (k < K)[None, :]
            at = (y * W + z).to(tl.int64) * PIXEL + (k % ROW)[None, :]
            a = tl.load(image[:, None] + at, mask=mask, other=0)
            b = tl.load(w + k[:, None], mask=(k < K)[:, None], other=0)
        if FLIP:
            a = (a ^ 0x80).to(tl.int8, bitcast=True)
        if FILL:
            a = tl.where(mask, a, fill)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    return acc


@triton.jit(do_not_specialize=[*NUMBERS, *SIZES])
def _conv(
    x, w, out, residual, sums, scales, biases, row_scale, row_zero_point, M, N, K, ROW, PIXEL, OC, H, W, OH, OW, KW, SH,
    SW, DH, DW, TOP, LEFT, GROUPS, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
    FLIP: tl.constexpr, FILL: tl.constexpr, WHOLE: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    AFTER: tl.constexpr, OUT: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x: [images][H][W][PIXEL = GROUPS * ROW]; w: [GROUPS * N][K = taps * ROW]; M = images * OH * OW; OC = GROUPS * N.

    FILL: the zero point is not what a masked load, 0, is taken for.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    depth = tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    each = tiles_m * tiles_n
    for work in range(tl.program_id(0), each * SPLIT * GROUPS, tl.num_programs(0)):
        part = work % SPLIT
        group = work // SPLIT // each
        tile_m, tile_n = place_tile(work // SPLIT % each, tiles_m, tiles_n, GROUP)
        m = tile_m * BM + tl.arange(0, BM)
        line = m // OW
        image = x + (line // OH).to(tl.int64) * H * W * PIXEL + group * ROW
        column = tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1)
        rows = w + (group * N + column).to(tl.int64)[None, :] * K
        begin = part * depth
        acc = _gather(
            x, rows, image, line % OH * SH - TOP, m % OW * SW - LEFT, m < M, begin, tl.minimum(begin + depth, K),
            ROW, PIXEL, H, W, KW, DH, DW, K, tl.cast(x_zero_point, tl.int8), FLIP, FILL, WHOLE, BN, BK,
        )  # fmt: skip
        store_tile(
            acc, m, tile_n * BN, part, group * N, M, N, OC, out, residual, sums, scales, biases, row_scale,
            row_zero_point, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
            ACTIVATION, RESIDUAL, AFTER, OUT, SPLIT,
        )  # fmt: skip


# ---- launchers ----


def _grouped(x: torch.Tensor, s: ConvShape, row: int) -> torch.Tensor:
    """x as pixels of groups * row bytes, at a multiple of 16 bytes: itself where it is that."""
    pixels, each = pixels_of(x), s.c // s.groups
    if each == row:
        return pixels if pixels.data_ptr() % 16 == 0 else pixels.clone()
    padded = pixels.new_zeros((pixels.shape[0], s.groups, row))
    padded[..., :each] = pixels.view(-1, s.groups, each)
    return padded


def _columns(x: torch.Tensor, run: int, s: ConvShape, zero_point: int) -> tuple[torch.Tensor, ConvShape]:
    """The same convolution with kernels of one column: its `run` channels are the KW * C numbers of a kernel row.

    For dilated kernels of few channels, whose runs are not neighbours in memory: here they are copied.
    """
    (kh, kw), (sh, sw), (dh, dw), (left, right, top, bottom) = s.kernel, s.stride, s.dilation, s.padding
    wide = F.pad(pixels_of(x).view(s.n, s.h, s.w, s.c), (0, 0, left, right), value=zero_point)
    taps = wide.unfold(2, dw * (kw - 1) + 1, sw)[..., ::dw].transpose(3, 4).flatten(3)
    columns = F.pad(taps, (0, run - kw * s.c)).permute(0, 3, 1, 2)
    shape = replace(s, c=run, w=s.ow, kernel=(kh, 1), stride=(sh, 1), dilation=(dh, 1), padding=(0, 0, top, bottom))
    return columns, shape


def conv_config(arch: int, processors: int, s: ConvShape, row: int) -> Config:
    """As for a GEMM: measured, for one group, or by formula."""
    found = None
    if s.groups == 1:
        found = tables.tile("conv", s.n * s.oh * s.ow, s.o, s.kernel[0] * s.kernel[1] * row, arch)
    return conv_by_formula(arch, processors, s, row) if found is None else measured(found)


@functools.lru_cache(4096)
def conv_by_formula(arch: int, processors: int, s: ConvShape, row: int) -> Config:
    """As for a GEMM, but no deeper than the channels of a tap, unless these are few.

    Beside the addresses of its tiles a program of 8 warps leaves no registers for a second one.
    """
    n, k = s.o // s.groups, s.kernel[0] * s.kernel[1] * row
    found = by_formula(arch, processors, s.n * s.oh * s.ow, n, k, s.groups)
    deep = min(found.bk, 128 if row % 128 == 0 else 64)
    return replace(found, bk=deep, resident=1 if found.warps == 8 else found.resident)


def _implicit_gemm(x: torch.Tensor, weights: Packed, s: ConvShape, out: torch.Tensor, epilogue: Epilogue) -> None:
    row, m = weights.layout.row, s.n * s.oh * s.ow
    if m == 0:
        return
    pixels = _grouped(x, s, row)
    arch, processors = machine(x.device)
    c = conv_config(arch, processors, s, row)
    flip, n, (left, _, top, _) = x.dtype == torch.uint8, s.o // s.groups, s.padding
    arguments = epilogue.arguments(out, flip)
    count = ceil_div(m, c.bm) * ceil_div(n, c.bn) * c.split * s.groups
    parts = torch.empty((c.split, m, s.o), dtype=torch.int32, device=x.device) if c.split > 1 else None
    (kh, kw), (sh, sw), (dh, dw) = s.kernel, s.stride, s.dilation
    with tiles.on(x.device):
        _conv[(min(count, processors * c.resident),)](
            pixels, weights.rows, as_bits(out) if parts is None else parts, M=m, N=n, K=kh * kw * row, ROW=row,
            PIXEL=s.groups * row, OC=s.o, H=s.h, W=s.w, OH=s.oh, OW=s.ow, KW=kw, SH=sh, SW=sw, DH=dh, DW=dw, TOP=top,
            LEFT=left, GROUPS=s.groups, FLIP=flip, FILL=epilogue.x_zero_point != 0 and any(s.padding),
            WHOLE=row % c.bk == 0, SPLIT=c.split, GROUP=GROUP, BM=c.bm, BN=c.bn, BK=c.bk, **arguments, **c.options,
        )  # fmt: skip
        if parts is not None:
            add_parts(parts, out, arguments)


def qconv2d(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_scale: float,
    x_zero_point: int,
    out_scale: float | None,
    out_zero_point: int,
    out_dtype: torch.dtype,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    residual_order: str = "before",
) -> torch.Tensor:
    """See `pykernels.ops.conv.qconv2d`."""
    op = "qconv2d"
    check_byte_dtype(op, "x", x.dtype)
    s = conv_shape(op, x, out_channels, kernel_size, stride, padding, dilation, groups)
    weights = checked_packed(op, packed, x, s.layout(torch.int8))
    check_scale(op, "x_scale", x_scale)
    check_zero_point(op, "x_zero_point", x_zero_point, x.dtype)
    check_activation(op, activation)
    check_out(op, out_dtype, out_scale, out_zero_point)
    check_residual_shape(op, residual, x, s.out, residual_order)
    if residual is not None:
        good = residual.dtype in (*BYTES, *REALS)
        words = f"residual must be {ANY_WORDS}, not {name(residual.dtype)}"
        check(good, op, words)
        if residual.dtype in BYTES:
            check_scale(op, "residual_scale", residual_scale)
            check_zero_point(op, "residual_zero_point", residual_zero_point, residual.dtype)
    out = torch.empty(s.out, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)
    epilogue = Epilogue(
        weights=weights,
        activation=activation,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        residual=None if residual is None else pixels_of(residual),
        residual_scale=residual_scale,
        residual_zero_point=residual_zero_point,
        after=residual_order == "after",
        out_scale=1.0 if out_scale is None else out_scale,
        out_zero_point=out_zero_point,
    )
    if weights.layout.depthwise:
        depthwise(x, weights, s, out, epilogue)
    elif s.pointwise:
        gemm(rows16(pixels_of(x)), weights.rows, out, epilogue)
    elif weights.layout.runs and s.dilation[1] == 1:
        dense = x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)
        if not library.int8_few_channels(dense, s, out, epilogue, machine(x.device)[0]):
            conv_few_channels(dense, weights, s, out, epilogue)
    elif weights.layout.runs:
        columns, s = _columns(x, weights.layout.row, s, x_zero_point)
        _implicit_gemm(columns, weights, s, out, epilogue)
    else:
        dense = x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)
        if not library.int8_conv(dense, s, out, epilogue, machine(x.device)[0]):
            _implicit_gemm(dense, weights, s, out, epilogue)
    return out


def _float_weight(weights: Packed) -> torch.Tensor:
    """[OC, K, kh, kw], strided as channels_last but for what pads K."""
    at = weights.layout
    if at.depthwise:
        return weights.weight[: at.groups * at.kh * at.kw].view(at.groups, 1, at.kh, at.kw)
    return weights.rows.view(-1, at.kh, at.kw, at.row)[..., : at.k].permute(0, 3, 1, 2)


def _cudnn_finishes(x: torch.Tensor, s: ConvShape) -> bool:
    """Whether cuDNN has this convolution with an epilogue of its own."""
    return x.device.type == "cuda" and torch.backends.cudnn.is_acceptable(x) and s.groups == 1 and s.n > 0


def _float_conv(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    biases: torch.Tensor,
    s: ConvShape,
    activation: str,
    residual: torch.Tensor | None,
    residual_order: str,
) -> torch.Tensor:
    """cuDNN's convolution; with relu, and a residual before it, in one pass, otherwise with one of ours behind it."""
    check_activation(op, activation)
    after = check_residual(op, residual, x, s.out, residual_order)
    x = x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)
    left, right, top, bottom = s.padding
    if left != right or top != bottom:
        x = F.pad(x, s.padding)
        left = top = 0
    how = (s.stride, (top, left), s.dilation, s.groups)
    if activation == "relu" and _cudnn_finishes(x, s) and not (after and residual is not None):
        bias = biases.to(x.dtype)
        if residual is None:
            return _channels_last(torch.cudnn_convolution_relu(x, weight, bias, *how))
        if residual.dtype == x.dtype:
            return _channels_last(torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *how))
    y = _channels_last(torch.conv2d(x, weight, None, *how))
    finish_floats(pixels_of(y), biases, activation, None if residual is None else pixels_of(residual), after)
    return y


def _channels_last(y: torch.Tensor) -> torch.Tensor:
    """With the strides that the shape function gives, those of sizes of 1 too."""
    _, c, h, w = y.shape
    if y.stride() == (h * w * c, 1, w * c, c):
        return y
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def conv2d(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """See `pykernels.ops.conv.conv2d`; `torch.backends.cudnn.allow_tf32` holds."""
    op = "conv2d"
    check_real_dtype(op, "x", x.dtype)
    s = conv_shape(op, x, out_channels, kernel_size, stride, padding, dilation, groups)
    weights = checked_packed(op, packed, x, s.layout(x.dtype))
    return _float_conv(op, x, _float_weight(weights), weights.biases, s, activation, residual, residual_order)


def _channel_vector(op: str, argument: str, t: torch.Tensor, x: torch.Tensor, channels: int) -> torch.Tensor:
    check_device(op, argument, t, x)
    check_real_dtype(op, argument, t.dtype)
    check(t.shape == (channels,), op, f"{argument} must have shape [{channels}], not {list(t.shape)}")
    return t.float()


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "relu",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """See `pykernels.ops.conv.conv_bn_relu`."""
    op = "conv_bn_act"
    check_real_dtype(op, "x", x.dtype)
    check_device(op, "weight", weight, x)
    words = f"weight must have x's dtype {name(x.dtype)}, not {name(weight.dtype)}"
    check(weight.dtype == x.dtype, op, words)
    check(eps >= 0, op, f"eps must not be negative, but is {eps}")
    check_dim(op, "weight", weight, 4)
    o = weight.shape[0]
    check_groups(op, weight, groups)
    s = conv_shape(op, x, o, weight.shape[2:], stride, padding, dilation, groups)
    words = f"x has {s.c} channels, but weight is for {groups * weight.shape[1]}"
    check(weight.shape[1] * groups == s.c, op, words)
    scale = torch.rsqrt(_channel_vector(op, "running_var", running_var, x, o) + eps)
    if gamma is not None:
        scale = scale * _channel_vector(op, "gamma", gamma, x, o)
    shift = -_channel_vector(op, "running_mean", running_mean, x, o)
    if bias is not None:
        shift = shift + _channel_vector(op, "bias", bias, x, o)
    shift = shift * scale
    if beta is not None:
        shift = shift + _channel_vector(op, "beta", beta, x, o)
    folded = (weight.float() * scale.view(-1, 1, 1, 1)).to(x.dtype, memory_format=torch.channels_last)
    return _float_conv(op, x, folded, shift, s, activation, residual, residual_order)
