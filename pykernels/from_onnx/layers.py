"""ONNX's layers: convolutions, products, normalizations and pools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from pykernels.from_onnx.table import Refused, operator

__all__: list[str] = []

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_AVERAGES: dict[int, Any] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MAXIMA = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class _Window(NamedTuple):
    """What convolutions and pools read: strides, dilations and (before, after) of each spatial dimension."""

    strides: list[int]
    dilations: list[int]
    sides: list[tuple[Any, Any]]

    @property
    def even(self) -> bool:
        """Whether both sides of every dimension are padded alike, as torch's layers do."""
        return all(before == after for before, after in self.sides)

    @property
    def padding(self) -> list[Any]:
        return [before for before, _ in self.sides]

    @property
    def flat(self) -> list[Any]:
        """The sides as ``F.pad`` takes them: the last dimension first."""
        return [side for pair in reversed(self.sides) for side in pair]


def _window(
    x: torch.Tensor,
    kernel: Sequence[int],
    auto_pad: str,
    pads: list[int] | None,
    strides: list[int] | None,
    dilations: list[int] | None,
) -> _Window:
    dims = len(kernel)
    if dims not in _CONVS:
        raise Refused(f"{dims} spatial dimensions")
    strides, dilations, pads = strides or [1] * dims, dilations or [1] * dims, pads or [0] * 2 * dims
    if auto_pad in ("NOTSET", "VALID"):
        given = pads if auto_pad == "NOTSET" else [0] * 2 * dims
        return _Window(strides, dilations, list(zip(given[:dims], given[dims:], strict=True)))
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        raise Refused(f"auto_pad {auto_pad}")
    sides = []
    for size, width, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        reach = ((size + stride - 1) // stride - 1) * stride + (width - 1) * dilation + 1 - size
        total = torch.sym_max(reach, 0)
        less = total // 2
        sides.append((less, total - less) if auto_pad == "SAME_UPPER" else (total - less, less))
    return _Window(strides, dilations, sides)


@operator("Conv")
def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> torch.Tensor:
    window = _window(x, weight.shape[2:], auto_pad, pads, strides, dilations)
    layer = _CONVS[len(window.sides)]
    if window.even:
        return layer(x, weight, bias, window.strides, window.padding, window.dilations, group)
    return layer(F.pad(x, window.flat), weight, bias, window.strides, 0, window.dilations, group)


@operator("ConvTranspose")
def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> torch.Tensor:
    kernel = list(weight.shape[2:])
    dims = len(kernel)
    extra = output_padding or [0] * dims
    if output_shape is None and auto_pad in ("NOTSET", "VALID"):
        window = _window(x, kernel, auto_pad, pads, strides, dilations)
    else:  # what the kernel reaches beyond the wanted size is cut: of auto_pad alone the input's times the stride
        window = _window(x, kernel, "VALID", None, strides, dilations)
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, window.dilations, strict=True)]
        if output_shape is None:
            cut = [r - s for r, s in zip(reach, window.strides, strict=True)]
        else:
            places = zip(x.shape[2:], window.strides, extra, reach, output_shape[-dims:], strict=True)
            cut = [s * (size - 1) + more + r - wanted for size, s, more, r, wanted in places]
        if not all(isinstance(total, int) and total >= 0 for total in cut):
            raise Refused("an output beyond the kernel's reach, or of a free size")
        small = [(total // 2, total - total // 2) for total in cut]
        window = window._replace(sides=small if auto_pad == "SAME_UPPER" else [pair[::-1] for pair in small])
    layer = _TRANSPOSED[dims]
    if window.even:
        return layer(x, weight, bias, window.strides, window.padding, extra, group, window.dilations)
    least = [min(pair) for pair in window.sides]
    y = layer(x, weight, bias, window.strides, least, extra, group, window.dilations)
    for axis, (low, (before, after)) in enumerate(zip(least, window.sides, strict=True), 2):
        y = y[(slice(None),) * axis + (slice(before - low, low - after or None),)]
    return y


@operator("Gemm")
def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> torch.Tensor:
    a, weight = a.t() if transA else a, b if transB else b.t()
    weight = weight if alpha == 1 else weight * alpha
    if c is not None and beta != 1:
        c = c * beta
    if c is None or (c.dim() in (1, 2) and c.shape[-1] == weight.shape[0] and (c.dim() == 1 or c.shape[0] == 1)):
        return F.linear(a, weight, None if c is None else c.reshape(-1))
    return F.linear(a, weight) + c


@operator("MatMul")
def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A matrix on the right is the weight of a linear layer, whatever there is on the left."""
    return F.linear(a, b.t()) if b.dim() == 2 else torch.matmul(a, b)


@operator("Einsum")
def einsum(*operands: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation, *operands)


@operator("Attention")
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 1,
) -> torch.Tensor:
    """Of heads [N, H, T, D], or of rows [N, T, H * D]."""
    if softcap or (is_causal and mask is not None):
        raise Refused("softcap, or a mask beside is_causal")
    rows = query.dim() == 3
    if rows:
        heads = (q_num_heads, kv_num_heads, kv_num_heads)
        query, key, value = (
            x.reshape(x.shape[0], x.shape[1], count or 1, -1).transpose(1, 2)
            for x, count in zip((query, key, value), heads, strict=True)
        )
    shared = query.shape[1] != key.shape[1]
    y = F.scaled_dot_product_attention(query, key, value, mask, 0.0, bool(is_causal), scale=scale, enable_gqa=shared)
    return y.transpose(1, 2).flatten(2) if rows else y


@operator("BatchNormalization")
def batch_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> torch.Tensor:
    if training_mode:
        raise Refused("training_mode")
    return F.batch_norm(x, mean, variance, scale, bias, False, 0.0, epsilon)


@operator("InstanceNormalization")
def instance_normalization(
    x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, *, epsilon: float = 1e-5
) -> torch.Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@operator("GroupNormalization")
def group_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    num_groups: int,
    stash_type: int = 1,
) -> torch.Tensor:
    """Of opset 21; that of 18, with a scale a group, is withdrawn."""
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@operator("LayerNormalization")
def layer_normalization(
    x: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    sizes = list(x.shape[axis:])
    if list(scale.shape) == sizes and (bias is None or bias.shape == scale.shape):
        return F.layer_norm(x, sizes, scale, bias, epsilon)
    y = F.layer_norm(x, sizes, eps=epsilon) * scale
    return y if bias is None else y + bias


@operator("RMSNormalization")
def rms_normalization(
    x: torch.Tensor, scale: torch.Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> torch.Tensor:
    sizes = list(x.shape[axis:])
    if list(scale.shape) == sizes:
        return F.rms_norm(x, sizes, scale, epsilon)
    return F.rms_norm(x, sizes, eps=epsilon) * scale


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: torch.Tensor, *, axes: list[int] | None = None) -> torch.Tensor:
    axes = [0, 2, 3] if axes is None else axes
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("LpNormalization")
def lp_normalization(x: torch.Tensor, *, axis: int = -1, p: int = 2) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x, p, axis, keepdim=True)


@operator("LRN")
def local_response_normalization(
    x: torch.Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> torch.Tensor:
    if size % 2 == 0:
        raise Refused("an even size, whose middle torch has elsewhere")
    return F.local_response_norm(x, size, alpha, beta, bias)


@operator("MaxPool")
def max_pool(
    x: torch.Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
) -> torch.Tensor:
    window = _window(x, kernel_shape, auto_pad, pads, strides, dilations)
    pool = _MAXIMA[len(kernel_shape)]
    # torch pads by half of the kernel at most
    if window.even and all(2 * side <= width for side, width in zip(window.padding, kernel_shape, strict=True)):
        return pool(x, kernel_shape, window.strides, window.padding, window.dilations, bool(ceil_mode))
    least = float("-inf") if x.is_floating_point() else torch.iinfo(x.dtype).min
    padded = F.pad(x, window.flat, value=least)
    return pool(padded, kernel_shape, window.strides, 0, window.dilations, bool(ceil_mode))


@operator("AveragePool")
def average_pool(
    x: torch.Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> torch.Tensor:
    window = _window(x, kernel_shape, auto_pad, pads, strides, dilations)
    if any(step != 1 for step in window.dilations):
        raise Refused("dilations")
    pool = _AVERAGES[len(kernel_shape)]
    if window.even and all(2 * side <= width for side, width in zip(window.padding, kernel_shape, strict=True)):
        included = bool(count_include_pad)
        return pool(x, kernel_shape, window.strides, window.padding, bool(ceil_mode), included)
    if ceil_mode:
        raise Refused("ceil_mode with padding of one side")
    y = pool(F.pad(x, window.flat), kernel_shape, window.strides)
    if count_include_pad:
        return y
    there = F.pad(torch.ones_like(x[:1, :1]), window.flat)
    return y / pool(there, kernel_shape, window.strides)


@operator("GlobalAveragePool")
def global_average_pool(x: torch.Tensor) -> torch.Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: torch.Tensor) -> torch.Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)
