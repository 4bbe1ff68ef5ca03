"""The facts that the cost model is fed with: how fast codecs are here, and what the collectives cost between ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from pykernels.comm.collectives import all_gather, all_reduce, all_to_all
from pykernels.comm.layout import Run, lay_out
from pykernels.comm.model import ENTRY_BYTES, Cost, Link, Speed, selected
from pykernels.comm.powersgd import orthonormalize
from pykernels.ops import compress, sparse

NUMEL = 1 << 20  # gradients that a codec is timed on
MOST_RANKS = 8  # whose shards are summed: more cost the same a gradient, and would make shards too small to time
LEAST_PART, MOST_BYTES = 1 << 14, 1 << 23  # bytes for each rank, and in all, that collectives are timed with


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _samples(device: torch.device, call: Callable[[], object], seconds: float) -> list[float]:
    """Of about `seconds`, three calls at least, after one that does not count."""
    _seconds(device, call)
    samples: list[float] = []
    while len(samples) < 3 or sum(samples) < seconds:
        samples.append(_seconds(device, call))
    return samples


def codec_speed(
    codec: str,
    block: int,
    world: int,
    error_feedback: bool,
    device: torch.device | None = None,
    seconds: float = 0.01,
    numel: int = NUMEL,
    of: Callable[[list[float]], float] = min,
) -> Speed:
    """Time `codec` with the number of threads that torch has now, each phase for about `seconds`.

    `of` the samples: their least is what the codec needs, their mean what it takes among the processes that run now.
    """
    device = device or torch.device("cpu")
    x = torch.randn(numel, device=device)
    if codec == "fp32":
        return Speed(of(_samples(device, lambda: x.mul_(1.0), seconds)) / numel)
    ranks = min(world, MOST_RANKS)
    layout = lay_out([Run("x", 0, numel, False)], codec, block, ranks, 0)
    (section,) = layout.sections
    residual = torch.zeros(numel, device=device) if error_feedback else None
    shard = torch.zeros(section.shard_numel, device=device) if error_feedback else None
    payload = torch.zeros(layout.payload_bytes, dtype=torch.uint8, device=device)
    reduced = torch.zeros(layout.shard_bytes, dtype=torch.uint8, device=device)

    def encode() -> None:
        compress.compress_encode(x, residual, payload, section.segments, codec, block)

    def reduce() -> None:
        shards = payload.view(ranks, -1)
        compress.compress_reduce(shards, shard, reduced, section.shard_segments, codec, block, 1.0 / ranks)

    def decode() -> None:
        compress.compress_decode(payload.view(1, -1), x, section.segments, codec, block)

    return Speed(*(of(_samples(device, phase, seconds)) / numel for phase in (encode, reduce, decode)))


def topk_speed(ratio: float, world: int, seconds: float = 0.01, numel: int = NUMEL) -> Speed:
    """Time selecting `ratio` of the gradients on a CPU, with error feedback, and adding up what ranks selected."""
    k, ranks = selected(numel, ratio), min(world, MOST_RANKS)
    x, residual = torch.randn(numel), torch.zeros(numel)
    payload = torch.zeros(ENTRY_BYTES * k, dtype=torch.uint8)
    segments = torch.tensor([[0, numel, 0]])

    def encode() -> None:
        sparse.sparse_encode(x, residual, None, payload, segments, k)

    encoding = min(_samples(x.device, encode, seconds))
    payloads = payload.expand(ranks, -1).contiguous()
    adding = min(_samples(x.device, lambda: sparse.sparse_decode(payloads, x, k, 1.0 / ranks), seconds))
    clearing = min(_samples(x.device, lambda: x.zero_(), seconds))
    return Speed(encoding / numel, adding / (ranks * k), clearing / numel)


def randomk_speed(ratio: float, seconds: float = 0.01, numel: int = NUMEL) -> Speed:
    """Time taking and spreading gradients at random places on a CPU, with error feedback."""
    k = selected(numel, ratio)
    x, residual, values = torch.randn(numel), torch.zeros(numel), torch.zeros(k)
    segments = torch.tensor([[0, numel, 0]])

    def encode() -> None:
        sparse.randomk_encode(x, residual, values, segments, k, 0)

    def decode() -> None:
        sparse.randomk_decode(values, x, segments, k, 0)

    phases = [min(_samples(x.device, phase, seconds)) / numel for phase in (encode, decode)]
    return Speed(phases[0], decode=phases[1])


def powersgd_speed(rank: int, side: int, seconds: float = 0.01, matrices: int = 4) -> Speed:
    """Time the products of a few square matrices of `side` on a CPU: M Q; P, orthonormal, and M^T P; P Q^T and what is
    left of M."""
    ms = [torch.randn(side, side) for _ in range(matrices)]
    qs = [torch.randn(side, rank) for _ in range(matrices)]
    ps = [m @ q for m, q in zip(ms, qs, strict=True)]

    def encode() -> None:
        for m, q in zip(ms, qs, strict=True):
            m @ q

    def reduce() -> None:
        orthonormalize(ps)
        for m, p in zip(ms, ps, strict=True):
            m.t() @ p

    def decode() -> None:
        for m, p, q in zip(ms, ps, qs, strict=True):
            m - p @ q.t()

    numel = matrices * side * side
    return Speed(*(min(_samples(ms[0].device, phase, seconds)) / numel for phase in (encode, reduce, decode)))


def slowest(values: list[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """The largest of each value over the ranks, the same on all of them. Collective."""
    agreed = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=group)
    return [float(value) for value in agreed.tolist()]


def link_cost(group: dist.ProcessGroup, device: torch.device | None = None, seconds: float = 0.03) -> Link:
    """Time the collectives between the ranks of `group`, small and large: one of the large takes about `seconds`.

    Collective; every rank gets the same answer, that of the slowest.
    """
    device = device or torch.device("cpu")
    world = dist.get_world_size(group)

    def timed(kind: str, part: int) -> float:
        """Seconds of one collective in which a rank sends `part` bytes to each other one, as the slowest saw it."""
        whole = torch.zeros(part * world, dtype=torch.uint8, device=device)
        other = torch.zeros_like(whole)
        call = {
            "all_to_all": lambda: all_to_all(other, whole, group).wait(),
            "all_gather": lambda: all_gather(other, whole[:part], group).wait(),
            "all_reduce": lambda: all_reduce(whole.view(torch.float32), group).wait(),
        }[kind]
        slowest([0.0], group, device)  # begin together
        return slowest([_seconds(device, call)], group, device)[0]

    part = LEAST_PART
    while timed("all_to_all", part) < seconds and 4 * part * world <= MOST_BYTES:
        part *= 4  # shaped links let a burst pass: only what takes long tells the rate
    kinds = ("all_to_all", "all_gather", "all_reduce")
    large = {kind: min(timed(kind, part) for _ in range(2)) for kind in kinds}  # at once: the burst is used up
    costs = {}
    for kind in kinds:
        latency = min(timed(kind, 64) for _ in range(4))
        sent = (2 if kind == "all_reduce" else 1) * (world - 1) * part
        costs[kind] = Cost(latency, max(large[kind] - latency, 0.0) / sent)
    return Link(**costs)
