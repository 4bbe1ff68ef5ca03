"""What ranks keep each for themselves, in checkpoints of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Keeper(Protocol):
    """What has a state of its own on each rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class PerRank:
    """A handle as ``torch.distributed.checkpoint`` takes it: every rank's state under a name of its own.

    ::

        state = {"model": model.state_dict(), "comm": comm.PerRank(handle)}
        saved = dcp.async_save(state, checkpoint_id=folder, process_group=another)
        dcp.load(state, checkpoint_id=folder)

    DCP takes what has one name on several ranks for the same thing, and stores it once; and it wants to know names and
    sizes of what it loads before. Residuals have the same names everywhere and differ, and are not there until a first
    step. So a rank's state is one string of bytes, ``rank-3``.

    Args:
        handle: of :func:`pykernels.comm.register`, or :class:`pykernels.comm.DiLoCo`.
        group: whose ranks count; the default group if None.
    """

    def __init__(self, handle: Keeper, group: dist.ProcessGroup | None = None) -> None:
        self.handle, self.group = handle, group

    def _name(self) -> str:
        return f"rank-{dist.get_rank(self.group)}"

    def state_dict(self) -> dict[str, bytes]:
        """This rank's state, copied."""
        file = io.BytesIO()
        torch.save(self.handle.state_dict(), file)
        return {self._name(): file.getvalue()}

    def load_state_dict(self, state: Mapping[str, bytes]) -> None:
        """Go on where ``state_dict`` was taken; what a handle refuses, it refuses here.

        Raises:
            ValueError: there is nothing of this rank, or it is damaged.
        """
        kept = state.get(self._name())
        if kept is None:
            raise ValueError(
                f"pykernels: the checkpoint has nothing of {self._name()}, only {', '.join(state) or 'none'}"
            )
        try:
            loaded = torch.load(io.BytesIO(kept), weights_only=True)
        except Exception as error:  # of any kind, by what is damaged
            raise ValueError(f"pykernels: {self._name()} of the checkpoint is damaged: {error}") from error
        self.handle.load_state_dict(loaded)
