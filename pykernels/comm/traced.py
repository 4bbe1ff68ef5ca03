"""A dense codec inside a compiled backward pass: DistributedDataParallel with ``optimize_ddp = "python_reducer"``.

There is no bucket then. Compiled autograd traces the hook with one parameter's gradient at a time, so the collectives
are functional ones, which the compiler can order, and what the trace needs is prepared when the hook is registered: a
trace must not make process groups, threads or tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional

from pykernels.comm.feedback import ErrorFeedback
from pykernels.comm.layout import Run, lay_out
from pykernels.ops import compress


@dataclass
class Part:
    """A parameter's one section, exempt or not, in the terms of the ops, and its residuals."""

    codec: str
    block: int
    segments: torch.Tensor
    shard_segments: torch.Tensor
    shard_bytes: int
    worker: torch.Tensor | None
    shard: torch.Tensor | None


def prepare(
    parameters: Mapping[torch.Tensor, Run],
    codec: str,
    block: int,
    group: dist.ProcessGroup,
    feedback: ErrorFeedback | None,
    history: bool,
) -> dict[torch.Tensor, Part]:
    """Lay out every parameter by itself. A collective if there is a `history` to distribute."""
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    parts = {}
    for parameter, run in parameters.items():
        layout = lay_out([run], codec, block, world, rank)
        (section,) = layout.sections
        worker = shard = None
        if feedback is not None and not run.exempt:
            worker = feedback.attach_worker([run], run.numel, parameter.device)
            shard = feedback.attach_shard(
                [run], section.pieces, section.shard_numel, parameter.device, group if history else None
            )
        parts[parameter] = Part(
            section.codec, section.block, section.segments, section.shard_segments, layout.shard_bytes, worker, shard
        )
    return parts


def average(gradient: torch.Tensor, part: Part, group: dist.ProcessGroup, world: int) -> None:
    """Average a gradient over the ranks, in place."""
    source = gradient.contiguous()
    sent = source.new_zeros(world * part.shard_bytes, dtype=torch.uint8)
    compress.compress_encode(source, part.worker, sent, part.segments, part.codec, part.block)
    received = functional.wait_tensor(functional.all_to_all_single(sent, None, None, group))
    reduced = source.new_zeros(part.shard_bytes, dtype=torch.uint8)
    shards = received.view(world, part.shard_bytes)
    compress.compress_reduce(shards, part.shard, reduced, part.shard_segments, part.codec, part.block, 1.0 / world)
    gathered = functional.wait_tensor(functional.all_gather_tensor(reduced, 0, group))
    averaged = torch.empty_like(source)
    compress.compress_decode(gathered.view(1, -1), averaged, part.segments, part.codec, part.block)
    gradient.copy_(averaged)
