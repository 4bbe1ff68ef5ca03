"""How long pipelines and tensor-parallel layers take on a link: what ``pykernels comm plan-...`` computes.

A pipeline is simulated: every stage goes through its forward and backward chunks in the schedule's order, each as
soon as the stage is free and the chunk's input is there; what it sends leaves one message after another at the link's
rate, and goes on while the stage computes. Encoding and decoding take the stage's own time::

    a hop   encode (sender) -> latency + bytes / rate -> decode (receiver)

A tensor-parallel layer waits for its sums, so that these add up: of two ranks encode -> one exchange of all -> decode;
of more what :mod:`pykernels.comm.wire` does, two exchanges and a second encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from pykernels.comm.layout import Run, lay_out, lay_out_tensor
from pykernels.comm.model import FP32_BYTES, Link, Speed, Times, predict

SCHEDULES = ("gpipe", "1f1b")
ROW = 1024  # elements of the last dimension, where nobody says how many


@dataclass(frozen=True)
class Hop:
    """Seconds of a message between neighbouring stages: the sender's, the link's, until it arrives, the receiver's."""

    encode: float
    wire: float
    latency: float
    decode: float


def chunk_order(schedule: str, stages: int, chunks: int, stage: int) -> list[tuple[str, int]]:
    """What a stage computes, in torch's order: ("forward" or "backward", chunk).

    Raises:
        ValueError: an unknown schedule; 1f1b with fewer chunks than stages, which torch refuses.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"pykernels: schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}")
    forward, backward = ([(way, chunk) for chunk in range(chunks)] for way in ("forward", "backward"))
    if schedule == "gpipe":
        return forward + backward
    if chunks < stages:
        raise ValueError(f"pykernels: chunks: 1f1b needs at least as many as stages ({stages}), not {chunks}")
    ahead = stages - stage
    order = forward[:ahead]
    for done, later in zip(backward, forward[ahead:], strict=False):
        order += [done, later]
    return order + backward[chunks - ahead :]


def pipeline_seconds(schedule: str, stages: int, chunks: int, forward: float, backward: float, hop: Hop) -> float:
    """A step of `chunks` microbatches, of which each takes `forward` and `backward` seconds on each stage.

    Raises:
        ValueError: as :func:`chunk_order` does.
    """
    orders = [chunk_order(schedule, stages, chunks, stage) for stage in range(stages)]
    seconds = {"forward": forward, "backward": backward}
    done, free = [0] * stages, [0.0] * stages  # actions behind each stage, and since when it is idle
    leaves, enters = [0.0] * stages, [0.0] * stages  # when the link of a stage is free, out and in
    arrived: dict[tuple[str, int, int], float] = {}  # by way, stage and chunk

    def neighbour(way: str, stage: int) -> int:
        return stage + 1 if way == "forward" else stage - 1

    def begin(stage: int) -> float | None:
        """When the next chunk can begin; None if its input is not under way yet."""
        way, chunk = orders[stage][done[stage]]
        if stage == (0 if way == "forward" else stages - 1):
            return free[stage]
        there = arrived.get((way, stage, chunk))
        return None if there is None else max(free[stage], there)

    while waiting := [stage for stage in range(stages) if done[stage] < len(orders[stage])]:
        at, stage = min((at, stage) for stage in waiting if (at := begin(stage)) is not None)
        way, chunk = orders[stage][done[stage]]
        receives = (way, stage, chunk) in arrived
        to = neighbour(way, stage)
        sends = 0 <= to < stages
        free[stage] = at + hop.decode * receives + seconds[way] + hop.encode * sends
        done[stage] += 1
        if sends:
            end = max(free[stage], leaves[stage], enters[to]) + hop.wire
            leaves[stage] = enters[to] = end
            arrived[way, to, chunk] = end + hop.latency
    return max(*free, *leaves)


@lru_cache(maxsize=256)
def message_bytes(codec: str, numel: int, block: int) -> int:
    """Of `numel` activations, in rows of ``ROW`` where they fill them."""
    if codec == "fp32":
        return FP32_BYTES * numel
    rows = (numel // ROW, ROW) if numel % ROW == 0 and numel else (numel,)
    return lay_out_tensor(rows, codec, block).payload_bytes


def predict_hop(codec: str, numel: int, block: int, bandwidth: float, latency: float, speed: Speed) -> Hop:
    """A message of `numel` activations; fp32 is neither encoded nor decoded."""
    wire = message_bytes(codec, numel, block) / bandwidth
    if codec == "fp32":
        return Hop(0.0, wire, latency, 0.0)
    return Hop(numel * speed.encode, wire, latency, numel * speed.decode)


def predict_sum(codec: str, numel: int, block: int, world: int, link: Link, speed: Speed) -> tuple[Times, float]:
    """One all-reduce of `numel` activations between `world` ranks, as ``comm.all_reduce`` does it; bytes of a rank."""
    if world == 2 and codec != "fp32":
        sent = message_bytes(codec, numel, block)
        exchange = link.all_gather.of(sent)
        return Times(numel * speed.encode, exchange, decode=2 * numel * speed.decode), sent
    runs = (Run("", 0, numel, False),)
    times = predict(codec, runs, block, world, link, speed)
    if codec == "fp32":
        return Times(0.0, times.exchange), 2 * (world - 1) / world * FP32_BYTES * numel
    return times, 2 * (world - 1) * lay_out(runs, codec, block, world, 0).shard_bytes
