"""Packed weights as bytes: where things lie in what the `*_pack` ops return, on the CPU and on CUDA devices.

On the CPU the layout is that of csrc/common/packed.h. On a CUDA device, in one uint8 tensor as well::

    header   128 bytes: the CPU's struct, with a kind of its own
    weights  dot        [groups][N][kh * kw][K], K zero-padded to a multiple of 16 bytes
             runs       [N][kh][kw * K], each run zero-padded to a power of two: int8 of one group, where that is less
             depthwise  int8: [kh][ceil(kw / 4)][C][4 of kw], zero-padded, C to a multiple of 16; floats: [C][kh * kw]
    sums     s32  [groups * N]: of the weights of an output channel (0 for floats)
    scales   fp32 [groups * N]: of the weights (1 for floats)
    biases   fp32 [groups * N] (-0 without a bias: x + -0 is x, whatever x)

Every part begins at a multiple of 64 bytes. The size is 16 more than such a multiple, which no CPU packing's is: an op
on a CUDA device looks at sizes alone, for to read a header there would be to wait for the device. Up to 15 times 64
bytes are left at the end, a number that depends on the sizes of the weights, so that others of about as many elements
(another K that is padded to the same, a kernel on its side) have another size as well.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

import torch

from pykernels.ops import names

__all__ = ["Layout", "depthwise", "packed_bytes", "repack", "unpack"]

MAGIC = b"PKPACK01"
VERSION = 1
HEADER = struct.Struct("<8s4i12qQ")
DOT, DEPTHWISE, CUDA_DOT, CUDA_DEPTHWISE = range(4)
MAX_RUN = 128  # bytes
ELEMENTS = tuple(getattr(torch, dtype) for dtype in names.ELEMENTS.values())  # a header says which by its number


def depthwise(groups: int, n: int, k: int) -> bool:
    """Whether weights of `n` output and `k` input channels a group are packed as depthwise ones."""
    return k == 1 and n == 1 and groups > 1


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def _run(n: int) -> int:
    """The bytes that a run of n takes: a power of two, at least 16."""
    return max(16, 1 << max(0, n - 1).bit_length())


@dataclass(frozen=True)
class Layout:
    """Where the parts of packed weights lie: bytes from the tensor's first.

    Attributes:
        cuda: packed on a CUDA device.
        dtype: of the weights.
        groups, n, k: groups, output channels and input channels of a group; of depthwise weights k = n = 1.
        kh, kw: kernel size; 1, 1 for a linear layer.
    """

    cuda: bool
    dtype: torch.dtype
    groups: int
    n: int
    k: int
    kh: int = 1
    kw: int = 1

    @cached_property
    def depthwise(self) -> bool:
        return depthwise(self.groups, self.n, self.k)

    @cached_property
    def runs(self) -> bool:
        """CUDA: whether the weights of a kernel row are padded together, and not each tap's: those of few channels."""
        run = _run(self.kw * self.k)
        return self.dtype == torch.int8 and self.groups == 1 and run < 16 * self.kw and run <= MAX_RUN

    @cached_property
    def rows(self) -> int:
        """CUDA: what of a channel is padded by itself: kernel rows, taps, or fours of taps (depthwise int8)."""
        if self.depthwise and not self.dtype.is_floating_point:
            return self.kh * ((self.kw + 3) // 4)
        return self.kh if self.runs else self.kh * self.kw

    @cached_property
    def row(self) -> int:
        """CUDA: elements from one of `rows` to the next."""
        if self.runs:
            return _run(self.kw * self.k)
        if self.depthwise:
            return 1 if self.dtype.is_floating_point else 4 * _round_up(self.groups, 16)
        unit = 16 // self.dtype.itemsize
        return max(unit, _round_up(self.k, unit))

    @cached_property
    def words(self) -> int:
        """CPU: 4-byte words of an output channel."""
        taps, each = self.kh * self.kw, 4 // self.dtype.itemsize
        return (taps + each - 1) // each if self.depthwise else taps * ((self.k + each - 1) // each)

    @cached_property
    def channels(self) -> int:
        """Sums, scales and biases that there is room for."""
        if self.cuda or self.depthwise:
            return _round_up(self.groups * self.n, 16)
        return self.groups * _round_up(self.n, 16)

    @cached_property
    def weights_at(self) -> int:
        return HEADER.size

    @cached_property
    def weight_bytes(self) -> int:
        if not self.cuda:
            return self.channels * self.words * 4
        each = 1 if self.depthwise and not self.dtype.is_floating_point else self.groups * self.n
        return _round_up(each * self.rows * self.row * self.dtype.itemsize, 64)

    @cached_property
    def sums_at(self) -> int:
        return self.weights_at + self.weight_bytes + (0 if self.cuda else 8 * self.channels)

    @cached_property
    def scales_at(self) -> int:
        return self.weights_at + self.weight_bytes + (4 * self.channels if self.cuda else 0)

    @cached_property
    def biases_at(self) -> int:
        return self.scales_at + 4 * self.channels

    @cached_property
    def size(self) -> int:
        end = self.weights_at + self.weight_bytes + 12 * self.channels
        if not self.cuda:
            return end
        return end + 16 + 64 * ((self.k + 3 * self.kh + 7 * self.kw + 5 * self.groups + 11 * self.n) % 16)

    def header(self, has_bias: bool) -> bytes:
        """The 128 bytes of the header."""
        # Depthwise weights are, to the kernels, one group with as many output channels.
        groups, n = (1, self.groups) if self.depthwise else (self.groups, self.n)
        facts = HEADER.pack(
            MAGIC,
            VERSION,
            (2 if self.cuda else 0) + (1 if self.depthwise else 0),
            ELEMENTS.index(self.dtype),
            has_bias,
            *(groups, n, self.k, self.kh, self.kw),
            *(self.scales_at, self.biases_at, self.sums_at, self.size, 0, 0, 0),
            0,
        )
        return facts[:-8] + _hash(facts[:-8]).to_bytes(8, "little")


def _hash(facts: bytes) -> int:
    """FNV-1a"""
    h = 1469598103934665603
    for byte in facts:
        h = (h ^ byte) * 1099511628211 % 2**64
    return h


def packed_bytes(weight: torch.Tensor, groups: int = 1) -> int:
    """The size of what is packed of `weight`, [O, K] or [O, K, kh, kw], on the device that it is on."""
    n, k, kh, kw = (*weight.shape, 1, 1)[:4]
    return Layout(weight.device.type == "cuda", weight.dtype, groups, n // groups, k, kh, kw).size


def read(packed: torch.Tensor) -> tuple[Layout, bool]:
    """The layout of `packed`, on any device (a CUDA device is waited for), and whether there is a bias.

    Raises:
        ValueError: it is no packed tensor, or a damaged one.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER.size:
        raise ValueError("packed must be the 1-D uint8 tensor that a *_pack op returned")
    raw = bytes(packed[: HEADER.size].tolist())
    magic, version, kind, element, has_bias, groups, n, k, kh, kw, *_, size, _, _, _, found = HEADER.unpack(raw)
    if magic != MAGIC or found != _hash(raw[:-8]):
        raise ValueError("packed was not made by a *_pack op, or its header is damaged")
    if version != VERSION or kind > CUDA_DEPTHWISE or size != packed.numel():
        raise ValueError("packed is truncated, or of another version of pykernels: pack the weights again")
    if kind in (DEPTHWISE, CUDA_DEPTHWISE):
        groups, n = n, 1
    return Layout(kind >= CUDA_DOT, ELEMENTS[element], groups, n, k, kh, kw), bool(has_bias)


def unpack(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
    """What `packed` was made of: weight [O, K, kh, kw] in its dtype, weight_scale [O] of int8, bias [O], groups.

    Either layout is read on any device. A linear layer's weight has kh = kw = 1.

    Raises:
        ValueError: it is no packed tensor, or a damaged one.
    """
    at, has_bias = read(packed)
    taps, o = at.kh * at.kw, at.groups * at.n
    raw = packed[at.weights_at : at.weights_at + at.weight_bytes].view(at.dtype)
    if at.cuda and at.depthwise and not at.dtype.is_floating_point:
        quads = raw[: at.rows * at.row].view(at.kh, -1, at.row // 4, 4).permute(2, 0, 1, 3)
        weight = quads.reshape(at.row // 4, at.kh, -1)[:o, :, : at.kw]
    elif at.cuda and at.runs:
        runs = raw[: o * at.kh * at.row].view(o, at.kh, at.row)[..., : at.kw * at.k]
        weight = runs.reshape(o, taps, at.k).transpose(1, 2)
    elif at.cuda:
        weight = raw[: o * taps * at.row].view(o, taps, at.row)[..., : at.k].transpose(1, 2)
    else:  # [panels][taps][words of a tap][16 channels][elements of a word]
        columns = raw.view(-1, 16, 4 // at.dtype.itemsize)
        if at.depthwise:
            columns = columns.view(at.channels // 16, at.words, 16, -1).transpose(1, 2)
            weight = columns.reshape(at.channels, -1)[:o, :taps]
        else:
            columns = columns.view(at.groups, -1, taps, at.words // taps, 16, 4 // at.dtype.itemsize)
            weight = columns.permute(0, 1, 4, 3, 5, 2).reshape(at.groups, at.channels // at.groups, -1, taps)
            weight = weight[:, : at.n, : at.k]
    weight = weight.reshape(o, at.k, at.kh, at.kw).contiguous()

    def numbers(begin: int) -> torch.Tensor:
        found = packed[begin : begin + 4 * at.channels].view(torch.float32)
        per_group = at.cuda or at.depthwise
        return (found[:o] if per_group else found.view(at.groups, -1)[:, : at.n].reshape(-1)).clone()

    scale = None if at.dtype.is_floating_point else numbers(at.scales_at)
    return weight, scale, numbers(at.biases_at) if has_bias else None, at.groups


def repack(packed: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`packed`, made on another kind of device, packed again for `device`: the same weights, scales and bias.

    Raises:
        ValueError: it is no packed tensor, or a damaged one.
    """
    device = torch.device(device)
    at, _ = read(packed)
    if at.cuda == (device.type == "cuda"):
        return packed.to(device)
    weight, scale, bias, groups = (t.to(device) if isinstance(t, torch.Tensor) else t for t in unpack(packed))
    ops = torch.ops.pykernels
    out: torch.Tensor = (
        ops.conv2d_pack(weight, bias, groups) if scale is None else ops.qconv2d_pack(weight, scale, bias, groups)
    )
    return out
