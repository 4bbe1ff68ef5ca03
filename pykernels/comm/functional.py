"""Collectives that return what they compute, compressed: differentiable, and one op each for a compiler.

Every rank decodes the same bytes, its own as well, so what all ranks get is equal to the bit. An all-reduce of two
ranks is one exchange: both send all they have and both add up. Of more ranks it is that of
:mod:`pykernels.comm.wire`, two exchanges and two encodings. Backward, an all-gather is a reduce-scatter, a
reduce-scatter an all-gather, an all-to-all and an all-reduce are themselves, through the same codec.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _resolve_process_group
from torch.distributed._functional_collectives import _resolve_group_name

from pykernels.comm import collectives
from pykernels.comm.lanes import walk
from pykernels.comm.layout import FLOATS, Layout, Run, check_block, lay_out, lay_out_tensor
from pykernels.comm.stats import Meter
from pykernels.comm.wire import Exchange, Wire
from pykernels.ops.compress import CODECS

LEAST = 8192  # elements: what is smaller takes its time to be sent off, not to be sent


@lru_cache(maxsize=256)
def _parts(shape: tuple[int, ...], codec: str, block: int, world: int) -> Layout:
    return lay_out_tensor(shape, codec, block, world)


@lru_cache(maxsize=256)
def _shards(numel: int, codec: str, block: int, world: int, rank: int) -> Layout:
    return lay_out([Run("x", 0, numel, False)], codec, block, world, rank)


def _ranks(name: str) -> dist.ProcessGroup:
    """Ops take a group by its name."""
    unchecked: Any = name
    return _resolve_process_group(unchecked)


def _bytes(like: torch.Tensor, size: int) -> torch.Tensor:
    return like.new_zeros(size, dtype=torch.uint8)


def _plain(x: torch.Tensor, codec: str, least: int, world: int) -> bool:
    return codec == "fp32" or x.dtype not in FLOATS or x.numel() < max(1, least) or world == 1


def _share(x: torch.Tensor, world: int) -> tuple[int, ...]:
    """The shape of a rank's part of `x`."""
    if not x.dim() or x.shape[0] % world:
        size = x.shape[0] if x.dim() else "no"
        raise ValueError(f"pykernels: x: {size} elements along `dim` are not as many for each of {world} ranks")
    return (x.shape[0] // world, *x.shape[1:])


def _op(name: str) -> Callable[[Callable[..., torch.Tensor]], Any]:
    return torch.library.custom_op(f"pykernels_comm::{name}", mutates_args=())


@_op("all_reduce")
def _all_reduce(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    ranks = _ranks(group)
    world = ranks.size()
    x = x.contiguous()
    out = torch.empty_like(x)
    if _plain(x, codec, least, world):
        collectives.all_reduce(out.copy_(x), ranks).wait()
    elif world == 2:
        wire = Wire(_parts(tuple(x.shape), codec, block, world), codec)
        sent, received = _bytes(x, wire.layout.shard_bytes), _bytes(x, wire.layout.payload_bytes)
        wire.encode(x, sent, shard=True)
        collectives.all_gather(received, sent, ranks).wait()
        wire.decode_shards(received, [out], 1.0)
    else:
        wire = Wire(_shards(x.numel(), codec, block, world, ranks.rank()), codec)
        exchange, meter = Exchange(wire, x.device), Meter()
        walk(exchange.all_reduce(x, (ranks, ranks), meter, factor=1.0), meter)
        wire.decode(exchange.payload, out)
    return out


@_op("all_gather")
def _all_gather(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    ranks = _ranks(group)
    world = ranks.size()
    x = x.contiguous()
    out = x.new_empty(world * x.shape[0], *x.shape[1:])
    if _plain(x, codec, least, world):
        collectives.all_gather(out, x, ranks).wait()
        return out
    wire = Wire(_parts(tuple(x.shape), codec, block, world), codec)
    sent, received = _bytes(x, wire.layout.shard_bytes), _bytes(x, wire.layout.payload_bytes)
    wire.encode(x, sent, shard=True)
    collectives.all_gather(received, sent, ranks).wait()
    wire.decode(received, out)
    return out


@_op("reduce_scatter")
def _reduce_scatter(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    ranks = _ranks(group)
    world = ranks.size()
    x = x.contiguous()
    out = x.new_empty(_share(x, world))
    if _plain(x, codec, least, world):
        collectives.reduce_scatter(out, x, ranks).wait()
        return out
    exchange, meter = Exchange(Wire(_parts(tuple(out.shape), codec, block, world), codec), x.device), Meter()
    walk(exchange.reduce_scatter(x, [out], 1.0, ranks, meter), meter)
    return out


@_op("all_to_all")
def _all_to_all(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    ranks = _ranks(group)
    world = ranks.size()
    x = x.contiguous()
    part = _share(x, world)
    out = torch.empty_like(x)
    if _plain(x, codec, least, world):
        collectives.all_to_all(out, x, ranks).wait()
        return out
    wire = Wire(_parts(part, codec, block, world), codec)
    sent, received = (_bytes(x, wire.layout.payload_bytes) for _ in range(2))
    wire.encode(x, sent)
    collectives.all_to_all(received, sent, ranks).wait()
    wire.decode(received, out)
    return out


@_all_reduce.register_fake
@_all_to_all.register_fake
def _(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_all_gather.register_fake
def _(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    return x.new_empty(_ranks(group).size() * x.shape[0], *x.shape[1:])


@_reduce_scatter.register_fake
def _(x: torch.Tensor, codec: str, block: int, least: int, group: str) -> torch.Tensor:
    return x.new_empty(_share(x, _ranks(group).size()))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.rest = inputs[1:]


def _adjoint(op: Any) -> Callable[..., Any]:
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return op(gradient, *ctx.rest), None, None, None, None

    return backward


for _forward, _backward in (
    (_all_reduce, _all_reduce),
    (_all_to_all, _all_to_all),
    (_all_gather, _reduce_scatter),
    (_reduce_scatter, _all_gather),
):
    _forward.register_autograd(_adjoint(_backward), setup_context=_remember)


def check(codec: str, block: int) -> None:
    """Refuse a codec that there is not, and a block out of range, by name."""
    if codec not in CODECS:
        raise ValueError(f"pykernels: codec must be one of {', '.join(CODECS)}, not {codec!r}")
    check_block(block)


def _call(op: Any, x: torch.Tensor, dim: int, codec: str, group: Any, block: int, least: int) -> torch.Tensor:
    check(codec, block)
    name = group if isinstance(group, str) else _resolve_group_name(group if group is not None else dist.group.WORLD)
    out: torch.Tensor = op(x.movedim(dim, 0) if dim else x, codec, block, least, name)
    return out.movedim(0, dim) if dim else out


def all_reduce(
    x: torch.Tensor, codec: str = "int8", group: Any = None, *, block: int = 256, least: int = LEAST
) -> torch.Tensor:
    """The sum of all ranks' `x`, the same bits on each.

    Args:
        x: of the same shape and dtype on every rank; fp32, bf16 and fp16 are compressed, others are sent as they are.
        codec: a name in ``pykernels.ops.compress.CODECS``; "fp32" compresses nothing.
        group: a process group, its name, or a device mesh of one dimension; the default group if None.
        block: elements that share a scale, at most; a multiple of 32.
        least: elements of `x` below which nothing is compressed.

    Raises:
        ValueError: an unknown codec, a block out of range.
    """
    return _call(_all_reduce, x, 0, codec, group, block, least)


def all_gather(
    x: torch.Tensor, codec: str = "int8", group: Any = None, *, dim: int = 0, block: int = 256, least: int = LEAST
) -> torch.Tensor:
    """The ranks' `x`, one after another along `dim`, the same bits on each; arguments as of :func:`all_reduce`.

    Raises:
        ValueError: `x` has no dimension.
    """
    if not x.dim():
        raise ValueError("pykernels: x: a tensor without dimensions cannot be gathered along one")
    return _call(_all_gather, x, dim, codec, group, block, least)


def reduce_scatter(
    x: torch.Tensor, codec: str = "int8", group: Any = None, *, dim: int = 0, block: int = 256, least: int = LEAST
) -> torch.Tensor:
    """This rank's part, along `dim`, of the sum of all ranks' `x`; arguments as of :func:`all_reduce`.

    Raises:
        ValueError: the ranks do not divide `dim`.
    """
    return _call(_reduce_scatter, x, dim, codec, group, block, least)


def all_to_all(
    x: torch.Tensor, codec: str = "int8", group: Any = None, *, dim: int = 0, block: int = 256, least: int = LEAST
) -> torch.Tensor:
    """Part r of `x` along `dim` goes to rank r, part r of the answer came from rank r; arguments as of
    :func:`all_reduce`.

    Raises:
        ValueError: the ranks do not divide `dim`.
    """
    return _call(_all_to_all, x, dim, codec, group, block, least)
