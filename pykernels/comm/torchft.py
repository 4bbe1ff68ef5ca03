"""Training that goes on while replicas come and go, with torchft (extra ``torchft``): its manager, our codecs.

::

    manager = torchft.Manager(pg=torchft.ProcessGroupGloo(timeout=...), min_replica_size=2, ...)
    model = comm.torchft.DistributedDataParallel(manager, net, "int8")      # in place of torchft's
    optimizer = torchft.Optimizer(manager, torch.optim.SGD(net.parameters(), 0.1))

The manager forms a quorum of the replicas that are alive at each step, joins them by a process group, sends what
recovers to those that join, and decides whether a step counts. The state here reads ranks and group anew with each
quorum, averages over those that take part, reports what fails to the manager, and takes residuals back to where they
were before a step that was not committed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torchft
from torch import nn
from torch._C._distributed_c10d import GradBucket
from torch.nn import parallel
from torchft.process_group import ProcessGroupDummy

from pykernels.comm.collectives import Disagreement
from pykernels.comm.dense import DENSE, DenseState
from pykernels.comm.lanes import Averaged, walk
from pykernels.comm.register import Handle
from pykernels.comm.state import NamedParameters, hook
from pykernels.comm.wire import Exchange

KEY = "pykernels.comm"  # under which the manager knows what it must tell us


class QuorumState(DenseState):
    """State of a dense codec's hook among the replicas of a quorum; the arguments of :class:`DenseState`, and

    Args:
        manager: torchft's.
        codec: int8, int4, int2, onebit, fp8, bf16 or fp16.
    """

    codec = "int8"

    def __init__(self, manager: torchft.Manager, codec: str, named_parameters: NamedParameters, **options: Any) -> None:
        if codec not in DENSE:
            raise ValueError(f"pykernels: codec must be one of {', '.join(DENSE)}, not {codec!r}")
        if not isinstance(manager._pg, torchft.ProcessGroupGloo):
            raise TypeError(f"pykernels: manager must have a ProcessGroupGloo, not a {type(manager._pg).__name__}")
        kind = DENSE[codec]
        self.codec = codec  # type: ignore[misc]  # of this state rather than of its class
        self.default_block, self.default_feedback = kind.default_block, kind.default_feedback
        super().__init__(ProcessGroupDummy(0, 1), named_parameters, **options)
        self.manager = manager
        # the manager's step that was trained last, until it is known what came of it
        self._undecided: int | None = None
        self._copies: dict[int, list[torch.Tensor]] = {}  # by bucket: residuals as they were before the step
        self._changed: dict[int, list[torch.Tensor]] = {}  # by bucket: the residuals that it has changed
        manager.register_state_dict_fn(KEY, self._heal, dict)

    def _connect(self) -> None:
        self.gather_group = self.group  # everything runs on backward's thread, in one order

    def __call__(self, bucket: GradBucket) -> Averaged:
        """Average a bucket over the replicas that take part. What fails is reported to the manager, as torchft does."""
        buffer = bucket.buffer()
        if bucket.index() == 0:
            self._begin()
        if self.manager.errored() is None:
            try:
                self._exchange(bucket)
            except Disagreement:  # would come again with each step
                raise
            except Exception as error:  # of any kind: the next quorum is formed without whoever is to blame
                self.manager.report_error(error)
        future: Averaged = torch.futures.Future()
        future.set_result(buffer)
        return future

    def _begin(self) -> None:
        self.manager.wait_quorum()
        self.settle()
        self._undecided = self.manager.current_step()
        if self.manager.errored() is None and self.manager._pg.parent is not self._process_group:
            self._process_group = self.manager._pg.parent
            for name in ("group", "world", "rank"):
                vars(self).pop(name, None)
            self._connected = False
            self.connect()
            self.forget_buckets()  # all replicas do: shards go to other ranks, what their residuals hold goes along
        self._begin_step()

    def _exchange(self, bucket: GradBucket) -> None:
        buffer, index, takes_part = bucket.buffer(), bucket.index(), self.manager.is_participating()
        if not takes_part:
            buffer.zero_()
        if self.world == 1:
            return
        exchange: Exchange = self.slot(bucket)
        wire = exchange.wire
        residuals = [residual for residual in (wire.worker, *wire.shards) if residual is not None]
        if wire.worker is not None and not takes_part:
            wire.worker.zero_()
        copies = self._copies.setdefault(index, [torch.empty_like(residual) for residual in residuals])
        for copy, residual in zip(copies, residuals, strict=True):
            copy.copy_(residual)
        self._changed[index] = residuals
        self.factor = 1.0 / self.manager.num_participants()
        walk(self.way(index, buffer, exchange), self._meter)

    def settle(self) -> None:
        """Take residuals back to before the last step if the manager did not commit it."""
        if self._undecided is not None and self.manager.current_step() == self._undecided:
            for index, residuals in self._changed.items():
                for copy, residual in zip(self._copies[index], residuals, strict=True):
                    residual.copy_(copy)
        self._changed.clear()
        self._undecided = None

    def _heal(self, state: object) -> None:
        """Called by the manager when this replica takes over another's model: its residuals belong to the old one."""
        self.feedback.scale(0.0)
        self._changed.clear()

    def forget_buckets(self) -> None:
        super().forget_buckets()
        self._copies.clear()
        self._changed.clear()

    def state_dict(self) -> dict[str, Any]:
        """What this replica must keep, after the optimizer's step. See :meth:`CommState.state_dict`."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`CommState.load_state_dict`. Before the first quorum; what belonged to shards begins at zero."""
        super().load_state_dict(state)
        self._undecided = None


class DistributedDataParallel(parallel.DistributedDataParallel):
    """``torchft.DistributedDataParallel`` whose gradients are compressed.

    As with torchft's own, backward waits for the exchange, buckets are never rebuilt, and buffers stay each replica's.

    Attributes:
        handle: statistics, and residuals for a checkpoint of this replica's own.

    Args:
        manager: of a ``torchft.ProcessGroupGloo``, whose timeout says how long a lost replica is waited for. All
            replicas compress alike.
        module: on the CPU.
        codec: int8, int4, int2, onebit, fp8, bf16 or fp16.
        bucket_cap_mb: of gradients that travel together, in MiB.
        options: of the codec's state, e.g. ``error_feedback=False``; see :class:`pykernels.comm.DenseState`.

    Raises:
        ValueError: another codec; parameters that are not on the CPU; an option out of range.
        TypeError: another kind of process group; an option the codec does not have.
    """

    def __init__(
        self,
        manager: torchft.Manager,
        module: nn.Module,
        codec: str = "int8",
        *,
        bucket_cap_mb: float = 25.0,
        **options: Any,
    ) -> None:
        if any(parameter.device.type != "cpu" for parameter in module.parameters()):
            raise ValueError("pykernels: module must be on the CPU")
        state = QuorumState(manager, codec, module.named_parameters(), **options)
        # The group takes what DistributedDataParallel sends when it is made; unused parameters are looked for because
        # buckets then stay as they are, which those of a replica that joins could not follow.
        super().__init__(
            module, process_group=ProcessGroupDummy(0, 1), bucket_cap_mb=bucket_cap_mb, find_unused_parameters=True
        )
        self.register_comm_hook(state, hook)
        self.handle = Handle(state)


__all__ = ["DistributedDataParallel", "QuorumState"]
