"""The all-gather of ``fully_shard`` (FSDP2) through a codec: weights travel compressed, shards stay exact.

Every rank decodes the same bytes, those of its own shard, too, so that all compute with weights that are equal to the
bit; the optimizer goes on with its exact shard. Eight and sixteen bits are sent anew each time. Of four bits that would
be too coarse: there the difference to what was decoded last is sent, so that what was lost comes with the next
message. For that each rank keeps what it decoded, in the dtype of the weights: as much as the unsharded model. The
first message is exact, and the backward pass takes what the forward pass has gathered, without any message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from pykernels.comm.collectives import agree, all_gather
from pykernels.comm.layout import FLOATS, Run, check_block, lay_out_rows
from pykernels.comm.stats import Meter, Stats
from pykernels.comm.wire import Wire

__all__ = ["CODECS", "AllGather", "Gathers"]

DIFFERENCES = ("int4",)  # codecs of which differences are sent
CODECS = ("int8", "fp8", "bf16", "fp16", *DIFFERENCES)


class AllGather:
    """What ``FSDPModule.set_custom_all_gather`` takes (torch's ``AllGather`` interface).

    Args:
        group: FSDP2's parameter group.
        runs: where its parameters lie in a rank's row.
        codec, block: of the records.
        meter: of bytes and times.
    """

    def __init__(self, group: Any, runs: list[Run], codec: str, block: int, meter: Meter) -> None:
        self._group, self._runs, self._codec, self._block, self._meter = group, runs, codec, block, meter
        self._wire: Wire | None = None
        self._last: torch.Tensor | None = None  # what all ranks have decoded, [ranks * row]

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor from the ordinary allocator."""
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        """Gather in the order of the current stream; FSDP2 has put its own there. On a CPU it waits for the wire."""
        world, rows = group.size(), output_tensor.view(group.size(), -1)
        if world == 1:  # the input is a part of the output
            return
        if self._wire is None:
            layout = lay_out_rows(self._runs, self._codec, self._block, world)
            self._wire = Wire(layout, self._codec, "weights")
        layout = self._wire.layout
        if rows.shape[1] * world != layout.numel or output_tensor.dtype not in FLOATS:
            raise RuntimeError(
                f"pykernels: the weights of {self._runs[0].key} are gathered as {rows.shape[1]} elements of "
                f"{output_tensor.dtype} a rank, registered were {layout.numel // world}: register the model again "
                "after its parameters have changed"
            )
        differences = self._codec in DIFFERENCES
        if differences and self._last is not None and self._backward():
            output_tensor.copy_(self._last)
            self._count(world, output_tensor, 0)
            return
        source = input_tensor
        if differences:
            if self._last is None or self._last.dtype != output_tensor.dtype:
                self._exactly(output_tensor, input_tensor, group)
                return
            source = input_tensor - self._last.view_as(rows)[group.rank()]
        with self._meter.timed("encode"):
            sent = source.new_zeros(layout.shard_bytes, dtype=torch.uint8)
            self._wire.encode(source, sent, shard=True)
        received = sent.new_empty(layout.payload_bytes)
        with self._meter.timed("gather"):
            all_gather(received, sent, group).wait()
        with self._meter.timed("decode"):
            self._wire.decode(received, output_tensor)
            if differences:
                assert self._last is not None
                self._last += output_tensor
                output_tensor.copy_(self._last)
        self._count(world, output_tensor, sent.numel())

    def _exactly(self, output: torch.Tensor, source: torch.Tensor, group: dist.ProcessGroup) -> None:
        with self._meter.timed("gather"):
            all_gather(output, source.clone(), group).wait()
        self._last = output.clone()
        self._count(group.size(), output, source.nbytes)

    def _count(self, world: int, output: torch.Tensor, sent: int) -> None:
        self._meter.sent((world - 1) * output.nbytes / world, (world - 1) * sent)

    def _backward(self) -> bool:
        return str(self._group._training_state.name) == "PRE_BACKWARD"

    def forget(self) -> None:
        """Send the next message exactly."""
        self._last = None


class Gathers:
    """The compressed all-gathers of a model."""

    def __init__(self, model: FSDPModule, groups: Sequence[tuple[FSDPModule, Any, list[Run]]], codec: str, block: int):
        """
        Args:
            model: whose modules' all-gathers are replaced. Collective.
            groups: of each parameter group its module, FSDP2's object, and where all of its parameters lie in a row.
            codec: one of `CODECS`.
            block: elements that share a scale.

        Raises:
            RuntimeError: this torch cannot replace an all-gather, or ranks differ.
            ValueError: an unknown codec, or a group that it does not fit.
        """
        if codec not in CODECS:
            raise ValueError(f"pykernels: gather must be one of {', '.join(CODECS)}, not {codec!r}")
        check_block(block, "gather_block")
        if not hasattr(model, "set_custom_all_gather"):
            raise RuntimeError(
                f"pykernels: torch {torch.__version__} cannot replace the all-gather of fully_shard "
                "(FSDPModule.set_custom_all_gather): use a newer torch"
            )
        for _, group, runs in groups:
            _check(group, runs)
        mine = [codec, block, *((run.key, run.numel, run.exempt) for _, _, runs in groups for run in runs)]
        for shards in dict.fromkeys(group.mesh_info.shard_process_group for _, group, _ in groups):
            agree(shards, "the gathering of weights", mine, None, "All ranks must build the same model and options")
        self._meter = Meter()
        self._all = []
        for module, group, runs in groups:
            gather = AllGather(group, runs, codec, block, self._meter)
            taken: Any = gather  # has the interface of a private class of torch
            module.set_custom_all_gather(taken)
            self._all.append(gather)

    def stats(self) -> Stats:
        """Bytes of the gathered weights, in `gradient_bytes` those of an uncompressed ring, and times by phase."""
        return self._meter.snapshot()

    def forget(self) -> None:
        """The next messages are exact; every rank calls it. For weights that were changed other than by training."""
        for gather in self._all:
            gather.forget()


def _check(group: Any, runs: Sequence[Run]) -> None:
    """Raise where a group's weights cannot be gathered as one tensor of floats in one place."""
    name = runs[0].key
    policy = group.mp_policy.param_dtype
    dtypes = {policy or parameter.sharded_param.dtype for parameter in group.fsdp_params}
    if len(dtypes) > 1 or not dtypes <= set(FLOATS):
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ValueError(f"pykernels: gather: the group of {name} has weights in {found}, not in one dtype of floats")
    if any(hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather") for parameter in group.fsdp_params):
        raise ValueError(f"pykernels: gather: {name} is a tensor that makes its own message (fsdp_pre_all_gather)")
    if group.post_forward_mesh_info not in (None, group.mesh_info):
        raise ValueError(
            f"pykernels: gather: {name} is sharded otherwise after the forward pass: reshard_after_forward must be "
            "True or False, not a number"
        )
