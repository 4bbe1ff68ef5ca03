"""Two-level averaging: full precision inside a host, a dense codec between hosts.

With L ranks a host and H hosts, rank (h, l) first averages, in fp32, the l-th part of its host's buckets; then the H
ranks of equal l average that part through the codec, as :mod:`pykernels.comm.dense` does among all ranks; then the
ranks of a host give each other the bytes that came from between the hosts, and decode. What crosses between hosts is
1/L of what the dense hook sends, from each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.collectives import all_gather, new_group
from pykernels.comm.dense import DENSE, DenseState
from pykernels.comm.feedback import ErrorFeedback
from pykernels.comm.lanes import Way
from pykernels.comm.layout import Layout, Piece, Run, Section, lay_out
from pykernels.comm.wire import Exchange, Wire


@dataclass
class Levels:
    """What a bucket keeps from step to step.

    Attributes:
        inner: the bucket among the ranks of a host, all of it in fp32.
        outer: this rank's part of it among the hosts.
        whole: all that the ranks of the host got: where it goes in the bucket.
        part: fp32, this rank's part; parts: the same by section of `inner`.
        gathered: what the ranks of the host got, as bytes.
    """

    inner: Exchange
    outer: Exchange
    whole: Wire
    part: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    gathered: torch.Tensor


class TwoLevelState(DenseState):
    """State of the two-level hook; the arguments of :class:`DenseState`, without ``checksum``, and

    Args:
        codec: between hosts: int8, int4, int2, onebit, fp8, bf16 or fp16.
        ranks_per_host: of consecutive ranks, as torchrun numbers them; it divides the number of ranks.

    Raises:
        ValueError: `ranks_per_host` does not divide the number of ranks (when the ranks connect).
    """

    lanes = 4
    codec = "int8"

    def __init__(self, *args: Any, codec: str = "int8", ranks_per_host: int, **kwargs: Any) -> None:
        if codec not in DENSE:
            raise ValueError(f"pykernels: codec must be one of {', '.join(DENSE)}, not {codec!r}")
        self.codec = codec  # type: ignore[misc]  # of this state rather than of its class
        self.default_feedback, self.default_block = DENSE[codec].default_feedback, DENSE[codec].default_block
        super().__init__(*args, **kwargs)
        if self.checksum:
            raise ValueError("pykernels: checksum: not with ranks_per_host")
        self.ranks_per_host = ranks_per_host
        self.part_feedback = ErrorFeedback()

    def _connect(self) -> None:
        size = self.ranks_per_host
        if size < 1 or self.world % size:
            raise ValueError(f"pykernels: ranks_per_host must divide the number of ranks, {self.world}, not {size}")
        self.hosts = self.world // size
        self.host, self.place = divmod(self.rank, size)
        ranks = dist.get_process_group_ranks(self.group)
        mates, peers = ranks[self.host * size : (self.host + 1) * size], ranks[self.place :: size]
        self._inner, self._inner_gather = (new_group(mates, self.group) for _ in range(2))
        self._outer = new_group(peers, self.group), new_group(peers, self.group)

    def rescale(self, factor: float) -> None:
        super().rescale(factor)
        self.part_feedback.scale(factor)

    def extra_state(self) -> dict[str, Any]:
        return {"part": self.part_feedback.state_dict()["shard"], "ranks_per_host": self.ranks_per_host}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        same = state["world"] == self.world and state["ranks_per_host"] == self.ranks_per_host
        self.part_feedback.load({}, state["part"] if same else {}, False)

    def options(self) -> str:
        return f"{super().options()}, ranks_per_host {self.ranks_per_host}"

    def new_slot(self, bucket: GradBucket, runs: list[Run]) -> Levels:
        device = bucket.buffer().device
        history = self._agree_on(f"bucket {bucket.index()}", runs, device)
        inners = [lay_out(runs, "fp32", self.block, self.ranks_per_host, place) for place in range(self.ranks_per_host)]
        inner = inners[self.place]
        outer = self._outer_layout(_parts(inner, runs))
        # The same records once more, for each rank of the host, at their places in the bucket: what is decoded.
        everywhere = [self._outer_layout(_parts(part, runs, in_bucket=True)) for part in inners]
        stride = max(layout.payload_bytes for layout in everywhere)
        numels = [section.shard_numel for section in inner.sections]
        worker: torch.Tensor | None = None
        shards: list[torch.Tensor | None] = [None] * len(outer.sections)
        if self.error_feedback:
            pieces = [piece for piece, exempt in _pieces(inner, runs) if not exempt]
            worker = self.part_feedback.attach_shard(
                runs, pieces, sum(numels), device, self._inner if history else None
            )
            shards = [
                self.feedback.attach_shard(
                    runs, _named(section), section.shard_numel, device, self.group if history else None
                )
                if section.codec == self.codec
                else None
                for section in outer.sections
            ]
        part = torch.zeros(sum(numels), device=device)
        return Levels(
            Exchange(Wire(inner, "fp32"), device),
            Exchange(self._over(outer, f"bucket {bucket.index()}", worker, shards), device, stride),
            Wire(_together(everywhere, stride), self.codec),
            part,
            part.split(numels),
            torch.zeros(self.ranks_per_host * stride, dtype=torch.uint8, device=device),
        )

    def _outer_layout(self, parts: Sequence[Run]) -> Layout:
        return lay_out(parts, self.codec, self.block, self.hosts, self.host)

    def way(self, index: int, buffer: torch.Tensor, slot: Any) -> Way:
        levels: Levels = slot
        inner, outer = levels.inner, levels.outer
        crossing = 2 * (self.hosts - 1) * outer.wire.layout.shard_bytes
        self._meter.sent(2 * (self.world - 1) / self.world * buffer.nbytes, crossing)
        factor = 1.0 / self.ranks_per_host
        yield from inner.reduce_scatter(
            buffer, levels.parts, factor, self._inner, self._meter, ("host", "host", "host")
        )
        yield from outer.all_reduce(levels.part, self._outer, self._meter, partial(self._draw, index))
        yield "host", all_gather(levels.gathered, outer.sent, self._inner_gather)
        with self._meter.timed("decode"):
            levels.whole.decode(levels.gathered, buffer)


def _together(layouts: Sequence[Layout], stride: int) -> Layout:
    """The records of several messages, `stride` bytes apart, as one."""
    tables: dict[tuple[str, int], list[torch.Tensor]] = {}
    for place, layout in enumerate(layouts):
        for section in layout.sections:
            shift = torch.tensor([0, 0, place * stride])
            tables.setdefault((section.codec, section.block), []).append(section.segments + shift)
    nothing = torch.empty(0, 3, dtype=torch.int64)
    sections = tuple(
        Section(codec, block, torch.cat(parts), nothing, 0, ()) for (codec, block), parts in tables.items()
    )
    return Layout(sections, max(layout.numel for layout in layouts), len(layouts), stride)


def _pieces(inner: Layout, runs: Sequence[Run]) -> list[tuple[Piece, bool]]:
    """What this rank holds of a host's bucket: where it lies in its part, and whether it is exempt."""
    exempt = {run.key: run.exempt for run in runs}
    found, begin = [], 0
    for section in inner.sections:
        for piece in section.pieces:
            found.append((Piece(piece.key, piece.offset, piece.numel, begin + piece.first), exempt[piece.key]))
        begin += section.shard_numel
    return found


def _parts(inner: Layout, runs: Sequence[Run], in_bucket: bool = False) -> list[Run]:
    """The pieces as runs of a bucket of their own, or at their places in the whole bucket."""
    places = {run.key: run.first for run in runs}
    found = []
    for piece, exempt in _pieces(inner, runs):
        first = places[piece.key] + piece.offset if in_bucket else piece.first
        found.append(Run(f"{piece.key}@{piece.offset}", first, piece.numel, exempt))
    return found


def _named(section: Section) -> list[Piece]:
    """The pieces of pieces, as pieces of parameters."""
    found = []
    for piece in section.pieces:
        key, offset = piece.key.rsplit("@", 1)
        found.append(Piece(key, int(offset) + piece.offset, piece.numel, piece.first))
    return found
