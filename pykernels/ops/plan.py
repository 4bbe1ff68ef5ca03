"""A plan: a network, or a part of one, as one call on the CPU. `pykernels.network.plan.emit` makes plans."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from pykernels.ops._register import fake
from pykernels.ops.names import DTYPES

__all__ = ["describe_plan", "profile_plan", "run_plan"]

_DTYPES = tuple(getattr(torch, dtype) for dtype in DTYPES.values())


def run_plan(
    plan: torch.Tensor,
    weights: torch.Tensor,
    inputs: Sequence[torch.Tensor],
    out_sizes: Sequence[int],
    out_dims: Sequence[int],
    out_dtypes: Sequence[int],
    out_channels_last: Sequence[int],
) -> list[torch.Tensor]:
    """Run a plan on all threads of torch's. It is made ready for the shapes and strides of the inputs at its first call
    with them; the 16 kinds used last are kept. Several threads may run one plan at once.

    Args:
        plan: 1-D uint8, see csrc/cpu/plan/format.h.
        weights: 1-D uint8: packed weights and constants, to which the plan points.
        inputs: of the dtypes and numbers of dimensions that the plan was made for, with any strides.
        out_sizes, out_dims, out_dtypes, out_channels_last: sizes of all outputs, one after another; of each the number
            of dimensions, the place of the dtype in `pykernels.ops.names.DTYPES`, and whether it is channels_last. They
            are for shape functions; the plan itself does without.

    Returns:
        The outputs, dense.

    Raises:
        RuntimeError: plan or weights are damaged or do not fit each other, or inputs do not fit the plan.
    """
    return list(torch.ops.pykernels.run_plan(plan, weights, inputs, out_sizes, out_dims, out_dtypes, out_channels_last))


def describe_plan(plan: torch.Tensor, weights: torch.Tensor, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What a plan does with these inputs.

    Returns:
        isa, threads; arena_bytes, least_arena_bytes (what lies between the steps, and what no placement could do
        without), memory_bytes (all that a call holds); values: the shapes of inputs and steps; drivers, in order:
        kernel, step, dtype (of what it reads), tasks, bytes (read and written), operations (multiplications and
        additions of products), by_image (it is one of those that each image goes through on one thread before the next;
        tasks are then images, bytes and operations those of all).
    """
    found: dict[str, Any] = json.loads(torch.ops.pykernels._describe_plan(plan, weights, inputs))
    return found


def profile_plan(
    plan: torch.Tensor, weights: torch.Tensor, inputs: Sequence[torch.Tensor], rounds: int = 100
) -> torch.Tensor:
    """How long each driver took until its last task was done: [rounds, drivers] int64, nanoseconds. Drivers that run
    image by image have the time until the last image was done, divided as threads spent it."""
    times: torch.Tensor = torch.ops.pykernels._profile_plan(plan, weights, inputs, rounds)
    return times


@fake("run_plan")
def _(
    plan: torch.Tensor,
    out_sizes: Sequence[Any],
    out_dims: Sequence[int],
    out_dtypes: Sequence[int],
    out_channels_last: Sequence[int],
) -> list[torch.Tensor]:
    outputs, at = [], 0
    for dims, dtype, last in zip(out_dims, out_dtypes, out_channels_last, strict=True):
        layout = torch.channels_last if last else torch.contiguous_format
        sizes = list(out_sizes[at : at + dims])
        outputs.append(torch.empty(sizes, dtype=_DTYPES[dtype], device=plan.device, memory_format=layout))
        at += dims
    return outputs
