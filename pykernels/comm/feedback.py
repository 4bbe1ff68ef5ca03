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


def check_residuals(state: Mapping[str, Any], sizes: Mapping[str, int] | None) -> None:
    """Raise unless `state` has what :meth:`ErrorFeedback.state_dict` gives of parameters of these `sizes` (None: any).

    Raises:
        ValueError: it has not; values are not finite, of another size, or lie elsewhere; an unknown parameter.
    """
    try:
        kept: list[tuple[str, int | None, Any]] = [(name, None, values) for name, values in state["worker"].items()]
        kept += [(name, int(first), values) for name, owned in state["shard"].items() for first, values in owned]
    except (AttributeError, TypeError, ValueError):
        raise ValueError("pykernels: state_dict: worker or shard is not what state_dict gave: it is damaged") from None
    for name, first, values in kept:
        if not isinstance(values, torch.Tensor) or not values.is_floating_point() or not values.isfinite().all():
            raise ValueError(f"pykernels: state_dict: the residual of {name} is no tensor of finite floats")
        if sizes is None:
            continue
        size, numel = sizes.get(name), values.numel()
        if size is None or (numel != size if first is None else not 0 <= first <= size - numel):
            where = "" if first is None else f" from {first}"
            raise ValueError(
                f"pykernels: state_dict: {name} has {numel} elements{where}, in the model "
                f"{'there is no such parameter' if size is None else size}"
            )


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
