"""Error feedback: what a lossy codec did not send stays in a residual and is added to the next gradient.

Seide et al., "1-Bit Stochastic Gradient Descent"; Karimireddy et al., "Error Feedback Fixes SignSGD"; the second point,
at the owner of a shard, as in Tang et al., "DoubleSqueeze".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pykernels.comm.layout import Piece, Run


class ErrorFeedback:
    """The residuals of one rank, fp32, kept by parameter so that they survive new buckets and checkpoints.

    The worker residual covers every parameter and lies like the bucket it belongs to. The shard residual covers the
    pieces that this rank averages for all.
    """

    def __init__(self) -> None:
        self._worker: dict[str, torch.Tensor] = {}
        self._shard: dict[str, list[tuple[Piece, torch.Tensor]]] = {}
        self.has_history = False  # shard residuals may differ from zero

    def attach_worker(self, runs: Sequence[Run], numel: int, device: torch.device) -> torch.Tensor:
        """A flat residual for a bucket of `numel` elements that takes over what its parameters have."""
        flat = torch.zeros(numel, device=device)
        for run in runs:
            if run.exempt:
                continue
            mine = flat[run.first : run.first + run.numel]
            if (before := self._worker.get(run.key)) is not None:
                if before.numel() != run.numel:
                    raise ValueError(
                        f"pykernels: the residual of {run.key} has {before.numel()} elements, its gradient {run.numel}"
                    )
                mine.copy_(before)
            self._worker[run.key] = mine
        return flat

    def attach_shard(
        self,
        runs: Sequence[Run],
        pieces: Sequence[Piece],
        numel: int,
        device: torch.device,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        """A flat residual of `numel` elements for the `pieces` of a shard.

        With a `group`, a collective fills it with what the pieces' owners so far have: each element has one owner, so a
        sum over the ranks brings its value along. Without one it is zero.
        """
        flat = torch.zeros(numel, device=device)
        runs = [run for run in runs if not run.exempt]
        if group is not None:
            total = torch.zeros(sum(run.numel for run in runs), device=device)
            begin = {}
            end = 0
            for run in runs:
                begin[run.key] = end
                for piece, values in self._shard.pop(run.key, ()):
                    at = end + piece.offset
                    total[at : at + piece.numel] = values
                end += run.numel
            dist.all_reduce(total, group=group)
            for piece in pieces:
                at = begin[piece.key] + piece.offset
                flat[piece.first : piece.first + piece.numel] = total[at : at + piece.numel]
        for piece in pieces:
            values = flat[piece.first : piece.first + piece.numel]
            self._shard.setdefault(piece.key, []).append((piece, values))
        return flat

    def settle(self, runs: Sequence[Run], gradients: torch.Tensor, world: int) -> None:
        """Add to a bucket's `gradients`, before they are averaged over `world` ranks, what its parameters still have in
        residuals, and keep no residual of them."""
        for run in runs:
            mine = gradients[run.first : run.first + run.numel]
            if (owed := self._worker.pop(run.key, None)) is not None:
                mine.add_(owed)
            for piece, values in self._shard.pop(run.key, ()):
                mine[piece.offset : piece.offset + piece.numel].add_(values, alpha=world)

    def scale(self, factor: float) -> None:
        """Multiply every residual: the loss, and so the gradients, are scaled otherwise from now on."""
        for values in self._worker.values():
            values.mul_(factor)
        for owned in self._shard.values():
            for _, values in owned:
                values.mul_(factor)

    def norms(self) -> dict[str, float]:
        """Euclidean norms of the worker residuals by parameter."""
        return {key: float(values.norm()) for key, values in self._worker.items()}

    def state_dict(self) -> dict[str, Any]:
        """Copies of this rank's residuals."""
        return {
            "worker": {key: values.detach().cpu().clone() for key, values in self._worker.items()},
            "shard": {
                key: [(piece.offset, values.detach().cpu().clone()) for piece, values in owned]
                for key, owned in self._shard.items()
            },
            "history": self.has_history,
        }

    def load(self, worker: Mapping[str, torch.Tensor], shard: Mapping[str, Any], history: bool) -> None:
        """Take over residuals; buckets must attach anew after it."""
        self._worker = {key: values.float().clone() for key, values in worker.items()}
        self._shard = {
            key: [(Piece(key, offset, values.numel(), 0), values.float().clone()) for offset, values in owned]
            for key, owned in shard.items()
        }
        self.has_history = history
