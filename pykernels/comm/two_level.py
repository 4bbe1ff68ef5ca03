"""Two-level averaging: full precision inside a host, a dense codec between hosts.

With L ranks a host and H hosts, rank (h, l) first averages, in fp32, the l-th part of its host's buckets; then the H
ranks of equal l average that part through the codec, as :mod:`pykernels.comm.dense` does among all ranks; then the
ranks of a host give each other the bytes that came from between the hosts, and decode. What crosses between hosts is
1/L of what the dense hook sends, from each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.collectives import all_gather, all_to_all, new_group
from pykernels.comm.dense import DenseState
from pykernels.comm.feedback import ErrorFeedback
from pykernels.comm.lanes import Step
from pykernels.comm.layout import Layout, Piece, Run, Section, lay_out
from pykernels.ops import compress


@dataclass
class Levels:
    """What a bucket keeps from step to step.

    Attributes:
        inner: the bucket among the ranks of a host, all of it in fp32.
        outer: this rank's part of it among the hosts.
        decode: codec, block and segments of all that the ranks of the host got: where it goes in the bucket.
        part, worker: fp32, this rank's part and its residual.
        shards: by section of `outer`, the residual of what this rank averages for all.
    """

    runs: list[Run]
    inner: Layout
    outer: Layout
    decode: list[tuple[str, int, torch.Tensor]]
    part: torch.Tensor
    worker: torch.Tensor | None
    shards: list[torch.Tensor | None]
    inner_sent: torch.Tensor
    inner_received: torch.Tensor
    outer_sent: torch.Tensor
    outer_received: torch.Tensor
    reduced: torch.Tensor
    gathered: torch.Tensor


class TwoLevelState(DenseState):
    """State of the two-level hook; the arguments of :class:`DenseState`, without ``checksum``, and

    Args:
        codec: between hosts: int8, int4, int2, onebit, fp8, bf16 or fp16.
        ranks_per_host: of consecutive ranks, as torchrun numbers them; it divides the number of ranks.

    Raises:
        ValueError: `ranks_per_host` does not divide the number of ranks.
    """

    lanes = 4
    codec = "int8"

    def __init__(self, *args: Any, codec: str = "int8", ranks_per_host: int, **kwargs: Any) -> None:
        self.codec = codec  # type: ignore[misc]  # of this state rather than of its class
        self.default_feedback = codec not in ("bf16", "fp16")
        if codec == "onebit":
            self.default_block = 1024
        super().__init__(*args, **kwargs)
        if self.checksum:
            raise ValueError("pykernels: checksum: not with ranks_per_host")
        if ranks_per_host < 1 or self.world % ranks_per_host:
            raise ValueError(
                f"pykernels: ranks_per_host must divide the number of ranks, {self.world}, not {ranks_per_host}"
            )
        self.ranks_per_host = ranks_per_host
        self.hosts = self.world // ranks_per_host
        self.host, self.place = divmod(self.rank, ranks_per_host)
        ranks = dist.get_process_group_ranks(self.group)
        mates = ranks[self.host * ranks_per_host : (self.host + 1) * ranks_per_host]
        peers = ranks[self.place :: ranks_per_host]
        self._inner, self._inner_gather = (new_group(mates, self.group) for _ in range(2))
        self._outer, self._outer_gather = (new_group(peers, self.group) for _ in range(2))
        self.part_feedback = ErrorFeedback()
        self._levels: dict[int, Levels] = {}

    def forget_buckets(self) -> None:
        self._levels.clear()

    def rescale(self, factor: float) -> None:
        super().rescale(factor)
        self.part_feedback.scale(factor)

    def extra_state(self) -> dict[str, Any]:
        return {"part": self.part_feedback.state_dict()["shard"], "ranks_per_host": self.ranks_per_host}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        same = state["world"] == self.world and state["ranks_per_host"] == self.ranks_per_host
        self.part_feedback.load({}, state["part"] if same else {}, False)

    def _bucket_levels(self, bucket: GradBucket) -> Levels:
        runs = self.runs(bucket)
        levels = self._levels.get(bucket.index())
        if levels is None or levels.runs != runs:
            levels = self._levels[bucket.index()] = self._new_levels(bucket, runs)
        return levels

    def _new_levels(self, bucket: GradBucket, runs: list[Run]) -> Levels:
        options = f"{self.codec}, block {self.block}, ranks_per_host {self.ranks_per_host}"
        history = self.agree(
            f"bucket {bucket.index()}",
            [options, *((run.key, run.numel, run.exempt) for run in runs)],
            vote=self.feedback.has_history,
        )
        device = bucket.buffer().device
        inners = [lay_out(runs, "fp32", self.block, self.ranks_per_host, place) for place in range(self.ranks_per_host)]
        inner = inners[self.place]
        outer = self._outer_layout(_parts(inner, runs))
        # The same records once more, for each rank of the host, at their places in the bucket: what is decoded.
        everywhere = [self._outer_layout(_parts(part, runs, in_bucket=True)) for part in inners]
        stride = max(layout.payload_bytes for layout in everywhere)
        tables: dict[tuple[str, int], list[torch.Tensor]] = {}
        for place, layout in enumerate(everywhere):
            for section in layout.sections:
                shift = torch.tensor([0, 0, place * stride])
                tables.setdefault((section.codec, section.block), []).append(section.segments + shift)
        worker: torch.Tensor | None = None
        shards: list[torch.Tensor | None] = [None] * len(outer.sections)
        numel = sum(section.shard_numel for section in inner.sections)
        if self.error_feedback:
            pieces = [piece for piece, exempt in _pieces(inner, runs) if not exempt]
            worker = self.part_feedback.attach_shard(runs, pieces, numel, device, self._inner if history else None)
            shards = [
                self.feedback.attach_shard(
                    runs, _named(section), section.shard_numel, device, self.group if history else None
                )
                if section.codec == self.codec
                else None
                for section in outer.sections
            ]

        def zeros(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.uint8, device=device)

        return Levels(
            runs,
            inner,
            outer,
            [(codec, block, torch.cat(parts)) for (codec, block), parts in tables.items()],
            torch.zeros(numel, device=device),
            worker,
            shards,
            zeros(inner.payload_bytes),
            zeros(inner.payload_bytes),
            zeros(stride),
            zeros(outer.payload_bytes),
            zeros(outer.shard_bytes),
            zeros(self.ranks_per_host * stride),
        )

    def _outer_layout(self, parts: Sequence[Run]) -> Layout:
        return lay_out(parts, self.codec, self.block, self.hosts, self.host)

    def average(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        buffer, index = bucket.buffer(), bucket.index()
        levels = self._bucket_levels(bucket)
        inner, outer = levels.inner, levels.outer
        crossing = 2 * (self.hosts - 1)
        self._meter.sent(2 * (self.world - 1) / self.world * buffer.nbytes, crossing * outer.shard_bytes)

        def scatter() -> Step:
            with self._meter.timed("host"):
                for section in inner.sections:
                    compress.compress_encode(
                        buffer, None, levels.inner_sent, section.segments, section.codec, section.block
                    )
            work = all_to_all(levels.inner_received, levels.inner_sent, self._inner)
            return lambda: encode(work)

        def encode(work: dist.Work) -> Step:
            with self._meter.timed("host"):
                work.wait()
                received = levels.inner_received.view(self.ranks_per_host, inner.shard_bytes)
                begin = 0
                for section in inner.sections:
                    compress.compress_decode(
                        received,
                        levels.part[begin : begin + section.shard_numel],
                        section.shard_segments,
                        section.codec,
                        section.block,
                        1.0 / self.ranks_per_host,
                    )
                    begin += section.shard_numel
            sent = levels.outer_sent[: outer.payload_bytes]
            with self._meter.timed("encode"):
                for section in outer.sections:
                    mine = section.codec == self.codec
                    compress.compress_encode(
                        levels.part,
                        levels.worker if mine else None,
                        sent,
                        section.segments,
                        section.codec,
                        section.block,
                        stochastic=mine and self.stochastic,
                        seed=self._draw(index, 0) if self.stochastic else 0,
                    )
            following = all_to_all(levels.outer_received, sent, self._outer)
            return lambda: reduce(following)

        def reduce(work: dist.Work) -> Step:
            with self._meter.timed("exchange"):
                work.wait()
            with self._meter.timed("reduce"):
                received = levels.outer_received.view(self.hosts, outer.shard_bytes)
                for section, residual in zip(outer.sections, levels.shards, strict=True):
                    mine = section.codec == self.codec
                    compress.compress_reduce(
                        received,
                        residual,
                        levels.reduced,
                        section.shard_segments,
                        section.codec,
                        section.block,
                        1.0 / self.hosts,
                        stochastic=mine and self.stochastic,
                        seed=self._draw(index, 1) if self.stochastic else 0,
                    )
            following = all_gather(levels.outer_sent[: outer.payload_bytes], levels.reduced, self._outer_gather)
            return lambda: share(following)

        def share(work: dist.Work) -> Step:
            with self._meter.timed("gather"):
                work.wait()
            following = all_gather(levels.gathered, levels.outer_sent, self._inner_gather)
            return lambda: decode(following)

        def decode(work: dist.Work) -> None:
            with self._meter.timed("host"):
                work.wait()
            with self._meter.timed("decode"):
                for codec, block, segments in levels.decode:
                    compress.compress_decode(levels.gathered[None], buffer, segments, codec, block)

        with self._lanes.side_stream(buffer.device):
            return self._lanes.run(buffer, scatter)


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
