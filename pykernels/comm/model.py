"""What communication costs: one model behind the codec ``auto`` and the command ``pykernels comm plan``.

From the speed of a codec and the cost of a collective it tells how long a bucket takes, and from the buckets a step::

    a bucket, compressed   encode -> all-to-all of the shards -> reduce -> all-gather -> decode
    a bucket in fp32       divide -> ring all-reduce

    exchange = all_to_all.seconds + (W - 1) * shard_bytes * all_to_all.per_byte
    gather   = all_gather.seconds + (W - 1) * shard_bytes * all_gather.per_byte
    fp32     = all_reduce.seconds + 2 * (W - 1) / W * 4 * n * all_reduce.per_byte

Of the hooks that send few numbers: top-k is one all-gather of k positions and values, random-k one all-reduce of k
values, PowerSGD two all-reduces of thin matrices once all buckets are there.

A bucket alone takes the sum of its phases. In a step the buckets overlap as they do in the hooks: encode runs on the
thread of backward; the wire carries one collective at a time, the one that was ready first; reduce and decode have a
thread each, which takes the buckets in order.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from pykernels.comm.layout import Run, lay_out

FP32_BYTES = 4
ENTRY_BYTES = 8  # a position and a value


@dataclass(frozen=True)
class Cost:
    """Of a collective: `seconds` whatever its size, and `per_byte` seconds for each byte that a rank sends."""

    seconds: float
    per_byte: float

    def of(self, sent: float) -> float:
        return self.seconds + sent * self.per_byte


@dataclass(frozen=True)
class Link:
    """What the three collectives of the hooks cost on W ranks."""

    all_to_all: Cost
    all_gather: Cost
    all_reduce: Cost

    @staticmethod
    def between(world: int, bandwidth: float, latency: float, ranks_per_host: int = 1) -> Link:
        """The collectives over a network that gives each host `bandwidth` bytes/s out, and messages `latency` seconds.

        All-to-all sends to everybody at once: one latency. All-gather and all-reduce go round a ring: W - 1 and
        2 * (W - 1). On hosts of several ranks what stays on the host costs nothing: an all-to-all then sends
        (W - ranks_per_host) / (W - 1) of its bytes out for each of the ranks, a ring leaves the host once.

        Raises:
            ValueError: `world` below 2, or not a multiple of `ranks_per_host`; a bandwidth that is not above 0, or a
                latency below it.
        """
        if world < 2:
            raise ValueError(f"pykernels: world must be at least 2, not {world}")
        if ranks_per_host < 1 or world % ranks_per_host:
            raise ValueError(f"pykernels: ranks_per_host must divide world ({world}), {ranks_per_host} does not")
        if bandwidth <= 0:
            raise ValueError(f"pykernels: bandwidth must be above 0, not {bandwidth}")
        if latency < 0:
            raise ValueError(f"pykernels: latency must not be below 0, not {latency}")
        if world == ranks_per_host:
            free = Cost(0.0, 0.0)
            return Link(free, free, free)
        out = ranks_per_host * (world - ranks_per_host) / (world - 1)
        return Link(
            Cost(latency, out / bandwidth),
            Cost((world - 1) * latency, 1 / bandwidth),
            Cost(2 * (world - 1) * latency, 1 / bandwidth),
        )


@dataclass(frozen=True)
class Speed:
    """Of a codec on one machine, seconds a gradient.

    Attributes:
        encode: with error feedback, if the codec has it; of fp32 the division by W.
        reduce: per gradient in the W shards together (n in a bucket of n), encoding the sum included. Of top-k: adding
            up, per gradient that a rank selected. Of PowerSGD: orthonormalizing P, and Q.
        decode: as named.
    """

    encode: float
    reduce: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Times:
    """Seconds of a bucket, by phase. For fp32 `exchange` is the all-reduce, and what follows is 0."""

    encode: float
    exchange: float
    reduce: float = 0.0
    gather: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        """Of the bucket alone, when nothing overlaps."""
        return sum(asdict(self).values())

    @property
    def wire(self) -> float:
        return self.exchange + self.gather


def sent_bytes(codec: str, runs: Sequence[Run], block: int, world: int) -> float:
    """Bytes that a rank sends for a bucket, in both collectives together."""
    if codec == "fp32":
        return 2 * (world - 1) / world * FP32_BYTES * sum(run.numel for run in runs)
    return 2 * (world - 1) * _shard_bytes(codec, tuple(runs), block, world)


@functools.lru_cache(maxsize=4096)
def _shard_bytes(codec: str, runs: tuple[Run, ...], block: int, world: int) -> int:
    return lay_out(runs, codec, block, world, 0).shard_bytes


def predict(codec: str, runs: Iterable[Run], block: int, world: int, link: Link, speed: Speed) -> Times:
    """How long a bucket takes: `runs` are its parameters, `codec` "fp32" or a dense one with records of `block`."""
    runs = tuple(runs)
    n = sum(run.numel for run in runs)
    sent = sent_bytes(codec, runs, block, world)
    if codec == "fp32":
        return Times(n * speed.encode, link.all_reduce.of(sent))
    return Times(
        n * speed.encode,
        link.all_to_all.of(sent / 2),
        n * speed.reduce,
        link.all_gather.of(sent / 2),
        n * speed.decode,
    )


def selected(numel: int, ratio: float) -> int:
    """Gradients that top-k and random-k send of a bucket."""
    return max(1, round(ratio * numel))


def predict_topk(numel: int, ratio: float, world: int, link: Link, speed: Speed) -> Times:
    """How long a bucket of `numel` gradients takes when every rank sends its largest to all."""
    k = selected(numel, ratio)
    exchange = link.all_gather.of((world - 1) * ENTRY_BYTES * k)
    return Times(numel * speed.encode, exchange, decode=numel * speed.decode + world * k * speed.reduce)


def predict_randomk(numel: int, ratio: float, world: int, link: Link, speed: Speed) -> Times:
    """How long a bucket of `numel` gradients takes when all ranks send those at the same random places."""
    exchange = link.all_reduce.of(2 * (world - 1) / world * FP32_BYTES * selected(numel, ratio))
    return Times(numel * speed.encode, exchange, decode=numel * speed.decode)


def thin_numbers(numel: int, rank: int, side: int) -> int:
    """Numbers in the P, or in the Q, of `numel` gradients that lie in square matrices of `side`."""
    return -(-numel * rank // side)


def predict_powersgd(numel: int, rank: int, side: int, world: int, link: Link, speed: Speed) -> Times:
    """How long all `numel` gradients of a model take, in square matrices of `side`, once backward is over."""
    wire = link.all_reduce.of(2 * (world - 1) / world * FP32_BYTES * thin_numbers(numel, rank, side))
    return Times(numel * speed.encode, wire, numel * speed.reduce, wire, numel * speed.decode)


def predict_two_level(
    codec: str, numel: int, block: int, hosts: int, ranks_per_host: int, bandwidth: float, latency: float, speed: Speed
) -> Times:
    """How long a bucket of `numel` gradients takes with ``register(..., ranks_per_host=...)``.

    A host's ranks share its `bandwidth` bytes/s; each sends its part of the bucket to its like on the other hosts. What
    they do among themselves in fp32 is not counted.
    """
    part = -(-numel // ranks_per_host)
    out = ranks_per_host * sent_bytes(codec, (Run("", 0, part, False),), block, hosts) / 2 / bandwidth
    return Times(
        part * speed.encode,
        latency + out,
        part * speed.reduce,
        (hosts - 1) * latency + out,
        numel * speed.decode,
    )


def step_seconds(buckets: Sequence[Times], compute: float = 0.0) -> float:
    """From the begin of backward, which takes `compute` seconds, until the last bucket is averaged.

    Backward fills the buckets evenly, one after another.
    """
    now = 0.0
    ready: list[tuple[float, int, str]] = []  # collectives by when they may begin
    for index, bucket in enumerate(buckets):
        now += compute / len(buckets) + bucket.encode
        ready.append((now, index, "exchange"))
    heapq.heapify(ready)
    wire = reducing = decoding = 0.0
    while ready:
        since, index, kind = heapq.heappop(ready)
        bucket = buckets[index]
        if kind == "exchange":
            wire = max(wire, since) + bucket.exchange
            reducing = max(reducing, wire) + bucket.reduce
            heapq.heappush(ready, (reducing, index, "gather"))
        else:
            wire = max(wire, since) + bucket.gather
            decoding = max(decoding, wire) + bucket.decode
    return max(now, decoding)
