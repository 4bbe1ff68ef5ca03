"""The *_pack ops on CUDA devices: torch operations, run once a layer. The layout stands in pykernels/ops/packed.py.

Packing waits for the device (scales are looked at, as on the CPU); the ops that read packed weights never do.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pykernels.cuda.triton.arguments import check_device, check_dim, check_real_dtype, check_scale, name
from pykernels.cuda.triton.tiles import check
from pykernels.ops.packed import Layout

__all__ = [
    "Packed",
    "check_groups",
    "checked_packed",
    "conv2d_pack",
    "cuda_layout",
    "int8_linear_pack",
    "linear_pack",
    "qconv2d_pack",
]

# Products of u8 and s8 summed in s32 cannot overflow below this many.
MAX_REDUCTION = 2**31 // (255 * 128) - 1


@dataclass(frozen=True)
class Packed:
    """Packed weights of a known layout, as views of their parts.

    Attributes:
        layout: where they lie.
        weight: of the layout's dtype, flat; sums: int32 [O]; scales, biases: float32 [O].
    """

    layout: Layout
    weight: torch.Tensor
    sums: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor

    @property
    def rows(self) -> torch.Tensor:
        """The weights as [O, kh * kw * K padded], or [O, kh * kw K padded] of runs; not of depthwise ones."""
        at = self.layout
        o, row = at.groups * at.n, at.rows * at.row
        return self.weight[: o * row].view(o, row)


@functools.lru_cache(4096)
def cuda_layout(dtype: torch.dtype, groups: int, n: int, k: int, kh: int = 1, kw: int = 1) -> Layout:
    """Of weights packed on a CUDA device; made once, since every call of an op asks for it."""
    return Layout(True, dtype, groups, n, k, kh, kw)


def _views(packed: torch.Tensor, layout: Layout) -> Packed:
    size = 4 * layout.groups * layout.n

    def part(begin: int, size: int, dtype: torch.dtype) -> torch.Tensor:
        return packed[begin : begin + size].view(dtype)

    return Packed(
        layout,
        part(layout.weights_at, layout.weight_bytes, layout.dtype),
        part(layout.sums_at, size, torch.int32),
        part(layout.scales_at, size, torch.float32),
        part(layout.biases_at, size, torch.float32),
    )


def checked_packed(op: str, packed: torch.Tensor, x: torch.Tensor, layout: Layout) -> Packed:
    """The parts of the argument `packed`, which the other arguments say is of this layout.

    Only its size is looked at: its header lies in the device's memory.
    """
    check_device(op, "packed", packed, x)
    good = packed.dtype == torch.uint8 and packed.dim() == 1 and packed.is_contiguous()
    check(good, op, "packed must be the contiguous 1-D uint8 tensor that the *_pack op returned")
    check(
        packed.numel() % 64 == 16,
        op,
        f"packed is refused: it was packed on the CPU, or is truncated: pack the weights on {x.device}",
    )
    check(
        packed.numel() == layout.size,
        op,
        f"packed is refused: it has {packed.numel()} bytes, but {name(layout.dtype)} weights of {layout.groups} groups "
        f"of {layout.n} output and {layout.k} input channels, kernel {layout.kh}x{layout.kw}, have {layout.size}",
    )
    check(packed.data_ptr() % 16 == 0, op, "packed must begin at a multiple of 16 bytes")
    return _views(packed, layout)


def _checked_bias(op: str, bias: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor | None:
    if bias is None:
        return None
    check_device(op, "bias", bias, weight)
    check_real_dtype(op, "bias", bias.dtype)
    good = bias.shape == weight.shape[:1]
    check(good, op, f"bias must have shape [{weight.shape[0]}], not {list(bias.shape)}")
    return bias.float()


def _checked_scale(op: str, weight_scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    check_device(op, "weight_scale", weight_scale, weight)
    check(weight_scale.dtype == torch.float32, op, f"weight_scale must be float32, not {name(weight_scale.dtype)}")
    good = weight_scale.shape == weight.shape[:1]
    check(good, op, f"weight_scale must have shape [{weight.shape[0]}], not {list(weight_scale.shape)}")
    good_ones = (weight_scale > 0) & weight_scale.isfinite() & (1 / weight_scale).isfinite() & (1 / weight_scale > 0)
    for bad in weight_scale[~good_ones][:1].tolist():
        check_scale(op, "weight_scale", bad)
    return weight_scale


def _pack(
    op: str, weight: torch.Tensor, scale: torch.Tensor | None, bias: torch.Tensor | None, groups: int
) -> torch.Tensor:
    o, k, kh, kw = (*weight.shape, 1, 1)[:4]
    layout = cuda_layout(weight.dtype, groups, o // groups, k, kh, kw)
    if scale is not None:
        check(
            k * kh * kw <= MAX_REDUCTION,
            op,
            f"weight sums more than {MAX_REDUCTION} products to one output, which s32 cannot hold",
        )
    packed = torch.zeros(layout.size, dtype=torch.uint8, device=weight.device)
    packed[: layout.weights_at] = torch.tensor(list(layout.header(bias is not None)), dtype=torch.uint8)
    parts = _views(packed, layout)
    taps, row = kh * kw, layout.row
    dense = weight.reshape(o, k, taps)
    if layout.depthwise and scale is not None:
        quads = F.pad(dense.view(o, kh, kw), (0, -kw % 4)).view(o, kh, -1, 4).permute(1, 2, 0, 3)
        parts.weight[: layout.rows * row].view(kh, -1, row // 4, 4)[:, :, :o] = quads
    elif layout.runs:
        runs = dense.transpose(1, 2).reshape(o, kh, kw * k)
        parts.rows.view(o, kh, row)[..., : kw * k] = runs
    else:
        parts.rows.view(o, taps, row)[..., :k] = dense.transpose(1, 2)
    parts.scales.fill_(1.0) if scale is None else parts.scales.copy_(scale)
    if scale is not None:
        parts.sums.copy_(dense.sum((1, 2), dtype=torch.int32))
    parts.biases.fill_(-0.0) if bias is None else parts.biases.copy_(bias)
    return packed


def _check_weight(op: str, weight: torch.Tensor, int8: bool, dim: int, groups: int) -> None:
    if int8:
        check(weight.dtype == torch.int8, op, f"weight must be int8, not {name(weight.dtype)}")
    else:
        check_real_dtype(op, "weight", weight.dtype)
    check_dim(op, "weight", weight, dim)
    if dim == 4:
        check(weight.numel() > 0, op, f"weight must not be empty, but has shape {list(weight.shape)}")
    check_groups(op, weight, groups)


def check_groups(op: str, weight: torch.Tensor, groups: int) -> None:
    o = weight.shape[0]
    good = groups >= 1 and o % groups == 0
    check(good, op, f"groups is {groups}, which does not divide the {o} output channels of weight")


def linear_pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `pykernels.ops.linear.linear_pack`."""
    op = "linear_pack"
    _check_weight(op, weight, False, 2, 1)
    return _pack(op, weight, None, _checked_bias(op, bias, weight), 1)


def int8_linear_pack(
    weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `pykernels.ops.linear.int8_linear_pack`."""
    op = "int8_linear_pack"
    _check_weight(op, weight, True, 2, 1)
    scale = _checked_scale(op, weight_scale, weight)
    return _pack(op, weight, scale, _checked_bias(op, bias, weight), 1)


def conv2d_pack(weight: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1) -> torch.Tensor:
    """See `pykernels.ops.conv.conv2d_pack`."""
    op = "conv2d_pack"
    _check_weight(op, weight, False, 4, groups)
    return _pack(op, weight, None, _checked_bias(op, bias, weight), groups)


def qconv2d_pack(
    weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor:
    """See `pykernels.ops.conv.qconv2d_pack`."""
    op = "qconv2d_pack"
    _check_weight(op, weight, True, 4, groups)
    scale = _checked_scale(op, weight_scale, weight)
    return _pack(op, weight, scale, _checked_bias(op, bias, weight), groups)
