"""The collectives that hooks launch, all asynchronous, on flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # the same
_all_to_all: Any = dist.all_to_all_single


def all_to_all(output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Part r of `source` goes to rank r, part r of `output` comes from rank r; all parts are equally long."""
    work: dist.Work = _all_to_all(output, source, group=group, async_op=True)
    return work


def all_gather(output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`output` becomes the sources of all ranks, one after another."""
    work: dist.Work = _gather(output, source, group=group, async_op=True)
    return work


def reduce_scatter(output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`output` becomes this rank's part of the sum of all ranks' `source`; all parts are equally long."""
    work: dist.Work = _reduce_scatter(output, source, group=group, async_op=True)
    return work


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    """`tensor` becomes the sum over the ranks."""
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    return work


def new_group(ranks: list[int], like: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of `ranks` (of the world) with the timeout of `like`; only they take part in making it."""
    options: Any = like._get_backend(like._device_types[0]).options
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=options._timeout, use_local_synchronization=True)
    return group


class Disagreement(RuntimeError):
    """Ranks were set up differently."""


def agree(group: dist.ProcessGroup, what: str, mine: Sequence[object], say: Any, advice: str) -> list[Any]:
    """What each rank says. Raises Disagreement on every rank, by name and with `advice`, if `mine` differs on one.

    Collective and slow: for beginnings only.
    """
    answers: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(answers, (list(mine), say), group=group)
    first = answers[0][0]
    for rank, (theirs, _) in enumerate(answers):
        for place in range(max(len(theirs), len(first))):
            one = first[place] if place < len(first) else "nothing"
            other = theirs[place] if place < len(theirs) else "nothing"
            if one != other:
                raise Disagreement(
                    f"pykernels: {what} differs between ranks: rank 0 has {one}, rank {rank} has {other}. {advice}"
                )
    return [said for _, said in answers]
