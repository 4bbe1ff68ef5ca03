"""Local SGD and DiLoCo: ranks train by themselves and average every so many steps.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models"; with plain averaging in place of
the outer optimizer it is local SGD (Stich, "Local SGD Converges Fast and Communicates Little") and federated averaging
(McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data").

After `every` steps a rank has moved from the last common parameters by the *outer gradient*, common - mine. It is
averaged over the ranks through a codec with error feedback, and an outer optimizer applies the average to the common
parameters, alike on every rank, which then are everyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from pykernels.comm.bucket import FlatBucket
from pykernels.comm.register import HOOKS
from pykernels.comm.state import Exempt, one_dimensional
from pykernels.comm.stats import Stats

OuterOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
FORMAT = 1  # of state_dict


def nesterov(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The outer optimizer of DiLoCo: SGD with a learning rate of 0.7 and a Nesterov momentum of 0.9."""
    return torch.optim.SGD(parameters, lr=0.7, momentum=0.9, nesterov=True)


def plain_average(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The outer optimizer of local SGD: the common parameters become the average of everyone's."""
    return torch.optim.SGD(parameters, lr=1.0)


class DiLoCo:
    """Keeps a model together over ranks that exchange every `every` steps. Not for a model wrapped in DDP or FSDP.

    ::

        outer = comm.DiLoCo(model, every=500, codec="int4")
        for x, y in batches:
            inner.zero_grad()
            loss(model(x), y).backward()
            inner.step()
            outer.step(samples=len(x))

    Every rank constructs it at the same point, and needs the same number of exchanges. The model's parameters and
    buffers become those of rank 0. Parameters that require a gradient are averaged through the codec, floating-point
    buffers (the statistics of batch norms) as fp32; other buffers, and the inner optimizer, stay each rank's own.

    A rank without data for a round takes part with no samples: ``outer.synchronize()`` in place of its steps. A rank
    that is lost makes the exchange raise on the others, after the process group's timeout at the latest, and leaves
    everything there as it was before the exchange. The others save ``state_dict``, make a process group without it and
    go on; see :meth:`load_state_dict`.

    Args:
        model: all of it on one device.
        every: steps between exchanges, the same on every rank.
        codec: one of ``HOOKS``, not "auto".
        outer_optimizer: makes the optimizer of the common parameters, which are fp32; :func:`nesterov` or
            :func:`plain_average`, or another that treats equal gradients equally on all ranks.
        process_group: the ranks; the default group if None.
        bucket_cap_mb: of fp32 outer gradients that travel together, in MiB: one bucket is encoded while another is on
            the wire.
        exempt: ``exempt(name, parameter)`` says what travels as fp32; parameters of one dimension unless given.
        options: of the codec's state, e.g. ``error_feedback=False``.

    Raises:
        TypeError: the model is wrapped in DDP or FSDP; an option the codec does not have.
        ValueError: `every` below 1, an unknown codec, no parameter that requires a gradient, parameters on several
            devices, an option out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        codec: str = "int8",
        *,
        outer_optimizer: OuterOptimizer = nesterov,
        process_group: dist.ProcessGroup | None = None,
        bucket_cap_mb: float = 25.0,
        exempt: Exempt = one_dimensional,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"pykernels: every must be at least 1, not {every}")
        if isinstance(model, DistributedDataParallel | FSDPModule):
            raise TypeError(f"pykernels: model must be a plain module, not {type(model).__name__}: give it unwrapped")
        codecs = [name for name in HOOKS if name != "auto"]  # which chooses for the buckets of DDP
        if codec not in codecs:
            raise ValueError(f"pykernels: codec must be one of {', '.join(codecs)}, not {codec!r}")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise ValueError("pykernels: model has no parameter that requires a gradient")
        buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point()}
        self._tensors: dict[str, torch.Tensor] = {**trained, **buffers}
        if len(devices := {tensor.device for tensor in self._tensors.values()}) > 1:
            raise ValueError(f"pykernels: model must be on one device, not on {', '.join(map(str, devices))}")

        def exempted(name: str, tensor: torch.Tensor) -> bool:
            return name in buffers or exempt(name, tensor)

        named: Any = self._tensors.items()
        self.state = HOOKS[codec](process_group, named, exempt=exempted, **options)
        self.state.connect()
        self.every = every
        self.rounds = 0  # exchanges so far
        self._steps = 0  # since the last exchange
        self._samples = 0.0
        group = self.state.group
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), group=group, group_src=0)

        device = devices.pop()
        numel = sum(tensor.numel() for tensor in self._tensors.values())
        # One after another in one tensor: what goes through the codec and comes back, and the common values.
        self._flat = torch.zeros(numel, device=device)
        self._common = torch.zeros(numel, device=device)
        self._exchanged, self._kept = self._views(self._flat), self._views(self._common)
        for name, tensor in self._tensors.items():
            self._kept[name].copy_(tensor.detach())
        parameters = []
        for name in trained:
            parameter = nn.Parameter(self._kept[name])
            parameter.grad = self._exchanged[name]
            parameters.append(parameter)
        self._trained = list(trained)
        self._buffers = list(buffers)
        self._outer = outer_optimizer(parameters)
        self._buckets = self._cut(bucket_cap_mb * 2**20)

    def _views(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = flat.split([tensor.numel() for tensor in self._tensors.values()])
        return {name: part.view(t.shape) for (name, t), part in zip(self._tensors.items(), parts, strict=True)}

    def _cut(self, size: float) -> list[FlatBucket]:
        """Buckets of whole tensors, of `size` bytes as far as these allow."""
        cuts: list[list[str]] = [[]]
        used = 0
        for name, tensor in self._tensors.items():
            if used and used + 4 * tensor.numel() > size:
                cuts.append([])
                used = 0
            cuts[-1].append(name)
            used += 4 * tensor.numel()
        buckets = []
        begin = 0
        for index, names in enumerate(cuts):
            numel = sum(self._tensors[name].numel() for name in names)
            buffer = self._flat[begin : begin + numel]
            tensors, views = [self._tensors[name] for name in names], [self._exchanged[name] for name in names]
            buckets.append(FlatBucket(index, buffer, tensors, views, index == len(cuts) - 1))
            begin += numel
        return buckets

    def step(self, samples: float = 1.0) -> bool:
        """Call it after each step of the inner optimizer. Whether it exchanged.

        Args:
            samples: that the step saw. A rank's weight in the average is what it saw since the last exchange.
        """
        self._steps += 1
        self._samples += samples
        if self._steps < self.every:
            return False
        self.synchronize()
        return True

    @torch.no_grad()
    def synchronize(self) -> None:
        """Exchange now, however many steps were made: for the end of training, or a round without data.

        Every rank calls it. A rank with no samples since the last exchange takes part and adds nothing.

        Raises:
            ValueError: no rank has any samples.
            RuntimeError: a rank is lost, or the average has infinities or NaNs. The model, the common parameters and
                the residuals then are what they were before the call.
        """
        before = self.state.state_dict()
        try:
            self._exchange()
        except Exception:
            self.state.load_state_dict(before)
            raise
        self._outer.step()
        for name in self._buffers:
            self._kept[name].copy_(self._exchanged[name])
        self.rounds += 1
        self.rollback()

    def _exchange(self) -> None:
        """Average the outer gradients and the buffers into the flat tensor."""
        group, world = self.state.group, self.state.world
        total = torch.tensor([self._samples], dtype=torch.float64, device=self._flat.device)
        dist.all_reduce(total, group=group)
        if not total > 0:
            raise ValueError("pykernels: samples: no rank has seen any since the last exchange")
        share = self._samples * world / float(total)  # exactly 1 if all saw as many
        for name, tensor in self._tensors.items():
            out = self._exchanged[name]
            if name in self._buffers:
                out.copy_(tensor)
            else:
                torch.sub(self._kept[name], tensor.detach(), out=out)
        if share != 1.0:
            self._flat.mul_(share)
        if share == 0.0:
            self._flat.zero_()  # a rank without data may hold anything
        for future in [self.state(bucket.as_grad_bucket()) for bucket in self._buckets]:
            future.wait()
        if not bool(self._flat.isfinite().all()):
            raise RuntimeError(
                f"pykernels: the average of exchange {self.rounds} has infinities or NaNs: a rank has diverged. "
                "Nothing was applied; rollback() returns to the last common parameters"
            )

    @torch.no_grad()
    def rollback(self) -> None:
        """Return to the common parameters and buffers of the last exchange, and begin its round again."""
        for name, tensor in self._tensors.items():
            tensor.detach().copy_(self._kept[name])
        self._steps = 0
        self._samples = 0.0

    def stats(self) -> Stats:
        """Bytes, times and residual norms; a step is an exchange."""
        return self.state.stats()

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on, beside its model and its inner optimizer. Save one file a rank."""
        return {
            "format": FORMAT,
            "rounds": self.rounds,
            "steps": self._steps,
            "samples": self._samples,
            "common": {name: values.detach().cpu().clone() for name, values in self._kept.items()},
            "outer": self._outer.state_dict(),
            "wire": self.state.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on where ``state_dict`` was taken, also with more ranks or fewer. Every rank calls it at the same point.

        The rank with the most exchanges gives its common parameters and outer optimizer to those that have fewer, and
        these begin a round from there. So ranks that were saved before and after a failed exchange agree again, and a
        new rank joins with None. The other ranks' model must be loaded before, since a round may be under way.

        Raises:
            ValueError: a state of another format, model or codec; or no rank has a state.
        """
        if state is not None:
            self._load(state)
        rounds: list[Any] = [None] * self.state.world
        dist.all_gather_object(rounds, -1 if state is None else self.rounds, group=self.state.group)
        if max(rounds) < 0:
            raise ValueError("pykernels: state_dict: no rank has one")
        if min(rounds) == max(rounds):
            return
        source = rounds.index(max(rounds))
        dist.broadcast(self._common, group=self.state.group, group_src=source)
        shared = [(self._outer.state_dict(), self.rounds, self.state.step) if self.state.rank == source else None]
        dist.broadcast_object_list(shared, group=self.state.group, group_src=source)
        if rounds[self.state.rank] < max(rounds):
            assert shared[0] is not None
            outer, self.rounds, self.state.step = shared[0]
            self._outer.load_state_dict(outer)
            self.rollback()

    def _load(self, state: Mapping[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise ValueError(f"pykernels: state_dict: format {state.get('format')!r} is not {FORMAT}")
        for name in sorted({*state["common"], *self._kept}):
            theirs, mine = (values.get(name) for values in (state["common"], self._kept))
            if theirs is None or mine is None or theirs.shape != mine.shape:
                raise ValueError(
                    f"pykernels: state_dict: {name} is {'missing' if theirs is None else list(theirs.shape)}, in the "
                    f"model {'there is no such tensor' if mine is None else list(mine.shape)}"
                )
        self.state.load_state_dict(state["wire"])
        with torch.no_grad():
            for name, values in state["common"].items():
                self._kept[name].copy_(values)
        self._outer.load_state_dict(state["outer"])
        self.rounds, self._steps, self._samples = int(state["rounds"]), int(state["steps"]), float(state["samples"])
