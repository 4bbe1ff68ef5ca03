"""Pooling over [N, C, H, W] or [C, H, W] tensors: the meaning, the defaults and the argument names of torch's pools.

``x`` is float32, bfloat16, float16, uint8 or int8 for maxima, a float for averages; the ``q`` functions average
affine quantized uint8 or int8 tensors, ``(q - zero_point) * scale``. The output has the layout of ``x``, channels_last
or contiguous (which wins where the strides fit both). Inputs whose channels, or whose columns, lie next to each other
are read in place, slices too; others are copied first. Only N may be 0.

Sizes are an int or a (vertical, horizontal) pair. The float functions are differentiable in ``x``, twice as well. Under
autocast they compute in the dtype they are given. Results are the same bits on every isa. Bad arguments raise
``RuntimeError`` with the argument's name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pykernels.ops._register import fake, with_gradient
from pykernels.ops._sizes import spread

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "avg_pool2d",
    "global_avg_pool2d",
    "max_pool2d",
    "max_pool2d_with_indices",
    "qadaptive_avg_pool2d",
    "qavg_pool2d",
    "qglobal_avg_pool2d",
]

aten = torch.ops.aten


def _adaptive_size(x: torch.Tensor, output_size: int | Sequence[int | None] | None) -> list[int]:
    sizes = [output_size] * 2 if output_size is None or isinstance(output_size, (int, torch.SymInt)) else output_size
    return [x.shape[x.dim() - len(sizes) + d] if size is None else size for d, size in enumerate(sizes)]


def _steps(stride: int | Sequence[int] | None, kernel: list[int]) -> list[int]:
    """The stride: the kernel size for None, and for the empty sequence that stands for None in ATen's calls."""
    return kernel if stride is None else spread(stride) or kernel


def _run(op: Callable[..., Any], x: torch.Tensor, *arguments: object) -> Any:
    """Call `op`; past its gradient's Python layer, which costs 10 us a call, where no gradient can be asked for."""
    needs_gradient = torch.is_grad_enabled() and x.requires_grad
    if torch.compiler.is_compiling() or needs_gradient or torch.autograd.forward_ad._current_level >= 0:
        return op(x, *arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *arguments)


def _batched(x: torch.Tensor, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return pool(x.unsqueeze(0)).squeeze(0) if x.dim() == 3 else pool(x)


def _batched_pair(
    x: torch.Tensor, pool: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() != 3:
        return pool(x)
    y, indices = pool(x.unsqueeze(0))
    return y.squeeze(0), indices.squeeze(0)


def max_pool2d(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """The maximum of every window; NaN if there is one in it. ``stride`` defaults to ``kernel_size``.

    Padding is never the maximum. Quantized tensors keep their scale and zero point. The gradient finds the indices
    again: when training, :func:`max_pool2d_with_indices` saves that pass.
    """
    kernel = spread(kernel_size)
    arguments = kernel, _steps(stride, kernel), spread(padding), spread(dilation), ceil_mode
    return _batched(x, lambda x: _run(torch.ops.pykernels.max_pool2d, x, *arguments))


def max_pool2d_with_indices(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`max_pool2d` and where each maximum stands in its plane: int64 ``row * W + column``, the first of equals.

    What ``torch.nn.functional.max_unpool2d`` takes. A plane must have fewer than 2^31 elements.
    """
    kernel = spread(kernel_size)
    arguments = kernel, _steps(stride, kernel), spread(padding), spread(dilation), ceil_mode
    return _batched_pair(x, lambda x: _run(torch.ops.pykernels.max_pool2d_with_indices, x, *arguments))


def adaptive_max_pool2d(x: torch.Tensor, output_size: int | Sequence[int | None] | None) -> torch.Tensor:
    """The maximum of each of ``output_size`` nearly equal windows; None keeps the input's size in that direction.

    Output ``o`` of ``O`` covers ``[floor(o * H / O), ceil((o + 1) * H / O))``.
    """
    size = _adaptive_size(x, output_size)
    return _batched(x, lambda x: _run(torch.ops.pykernels.adaptive_max_pool2d, x, size))


def adaptive_max_pool2d_with_indices(
    x: torch.Tensor, output_size: int | Sequence[int | None] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`adaptive_max_pool2d` and the indices of :func:`max_pool2d_with_indices`."""
    size = _adaptive_size(x, output_size)
    return _batched_pair(x, lambda x: _run(torch.ops.pykernels.adaptive_max_pool2d_with_indices, x, size))


def avg_pool2d(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """The average of every window, summed in fp32. ``stride`` defaults to ``kernel_size``.

    The divisor is the number of elements of the window, with padding (``count_include_pad``) or without, or
    ``divisor_override``.
    """
    kernel = spread(kernel_size)
    arguments = kernel, _steps(stride, kernel), spread(padding), ceil_mode, count_include_pad, divisor_override
    return _batched(x, lambda x: _run(torch.ops.pykernels.avg_pool2d, x, *arguments))


def adaptive_avg_pool2d(x: torch.Tensor, output_size: int | Sequence[int | None] | None) -> torch.Tensor:
    """The average of each of the windows of :func:`adaptive_max_pool2d`, summed in fp32."""
    size = _adaptive_size(x, output_size)
    return _batched(x, lambda x: _run(torch.ops.pykernels.adaptive_avg_pool2d, x, size))


def global_avg_pool2d(x: torch.Tensor) -> torch.Tensor:
    """The average of every plane: [N, C, 1, 1] (or [C, 1, 1])."""
    return adaptive_avg_pool2d(x, 1)


def qavg_pool2d(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    x_scale: float,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """:func:`avg_pool2d` of affine quantized bytes, the sum exact in 32 bits; padding counts as the real number 0.

    ``float(sum of (q - x_zero_point)) * (x_scale / divisor)`` in a float ``out_dtype``, or quantized to
    uint8 or int8 with ``out_scale`` (given then, and only then) and ``out_zero_point``. A window has fewer than 2^23
    elements.
    """
    kernel = spread(kernel_size)
    window = kernel, _steps(stride, kernel), spread(padding), ceil_mode, count_include_pad, divisor_override
    affine = x_scale, x_zero_point, out_scale, out_zero_point, out_dtype
    return _batched(x, lambda x: _run(torch.ops.pykernels.qavg_pool2d, x, *window, *affine))


def qadaptive_avg_pool2d(
    x: torch.Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    x_scale: float,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """:func:`adaptive_avg_pool2d` of affine quantized bytes, with the arithmetic of :func:`qavg_pool2d`."""
    size = _adaptive_size(x, output_size)
    affine = x_scale, x_zero_point, out_scale, out_zero_point, out_dtype
    return _batched(x, lambda x: _run(torch.ops.pykernels.qadaptive_avg_pool2d, x, size, *affine))


def qglobal_avg_pool2d(
    x: torch.Tensor,
    *,
    x_scale: float,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The average of every plane of affine quantized bytes: :func:`qadaptive_avg_pool2d` to one element."""
    return qadaptive_avg_pool2d(
        x,
        1,
        x_scale=x_scale,
        x_zero_point=x_zero_point,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
    )


# ---- shapes: outputs keep the layout of their input ----


def _pooled(x: torch.Tensor, size: list[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    # csrc/cpu/pool/driver.cpp decides alike: contiguous wins where the strides of a tensor fit both layouts.
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.empty(
        (x.shape[0], x.shape[1], size[0], size[1]),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _pool_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Outputs along one axis. With ceil_mode a window may overrun the end but not begin there: the minimum."""
    room = size + 2 * padding - dilation * (kernel_size - 1) - 1
    if ceil_mode:
        out = torch.sym_min((room + stride - 1) // stride + 1, (size + padding + stride - 1) // stride)
    else:
        out = room // stride + 1
    torch._check(out > 0, lambda: f"pykernels: kernel_size {kernel_size} does not fit x, of size {size}")
    return out


def _pool_sizes(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> list[int]:
    torch._check(x.dim() == 4, lambda: f"pykernels: x must have 4 dimensions, not shape {list(x.shape)}")
    return [_pool_size(x.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d], ceil_mode) for d in (0, 1)]


@fake("max_pool2d")
def _(
    x: torch.Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> torch.Tensor:
    return _pooled(x, _pool_sizes(x, kernel_size, stride, padding, dilation, ceil_mode))


@fake("max_pool2d_with_indices")
def _(
    x: torch.Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = _pool_sizes(x, kernel_size, stride, padding, dilation, ceil_mode)
    return _pooled(x, sizes), _pooled(x, sizes, torch.int64)


@fake("avg_pool2d", "qavg_pool2d")
def _(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    return _pooled(x, _pool_sizes(x, kernel_size, stride, padding, [1, 1], ceil_mode), out_dtype)


@fake("adaptive_max_pool2d", "adaptive_avg_pool2d", "qadaptive_avg_pool2d")
def _(x: torch.Tensor, output_size: list[int], out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return _pooled(x, output_size, out_dtype)


@fake("adaptive_max_pool2d_with_indices")
def _(x: torch.Tensor, output_size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return _pooled(x, output_size), _pooled(x, output_size, torch.int64)


# ---- gradients; the ops on bytes have none ----
# The ops that return no indices save none: their gradient finds them again, at the cost of one more forward pass.


def _setup_pool(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.x_arguments = inputs[1:]
    if isinstance(output, tuple):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
    else:
        ctx.save_for_backward(inputs[0])


def _max_pool_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    arguments = ctx.x_arguments
    indices = rest[0] if rest else torch.ops.pykernels.max_pool2d_with_indices(x.detach(), *arguments)[1]
    return aten.max_pool2d_with_indices_backward(grad, x, *arguments, indices), *[None] * len(arguments)


def _adaptive_max_pool_backward(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    indices = rest[0] if rest else torch.ops.pykernels.adaptive_max_pool2d_with_indices(x.detach(), *ctx.x_arguments)[1]
    return aten.adaptive_max_pool2d_backward(grad, x, indices), None


def _avg_pool_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    (x,) = ctx.saved_tensors
    kernel_size, stride, padding, ceil_mode, count_include_pad, *divisor = ctx.x_arguments
    grad_x = aten.avg_pool2d_backward(
        grad, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor[0] if divisor else None
    )
    return grad_x, *[None] * len(ctx.x_arguments)


def _adaptive_avg_pool_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    return aten._adaptive_avg_pool2d_backward(grad, ctx.saved_tensors[0]), None


with_gradient("max_pool2d", _max_pool_backward, _setup_pool)
with_gradient("max_pool2d_with_indices", _max_pool_backward, _setup_pool)
with_gradient("adaptive_max_pool2d", _adaptive_max_pool_backward, _setup_pool)
with_gradient("adaptive_max_pool2d_with_indices", _adaptive_max_pool_backward, _setup_pool)
with_gradient("avg_pool2d", _avg_pool_backward, _setup_pool)
with_gradient("adaptive_avg_pool2d", _adaptive_avg_pool_backward, _setup_pool)
