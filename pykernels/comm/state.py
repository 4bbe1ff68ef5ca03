"""What every hook's state has: the process groups, the buckets seen, the parameters' names, statistics, checkpoints."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.collectives import agree, new_group
from pykernels.comm.feedback import ErrorFeedback, check_residuals
from pykernels.comm.lanes import Averaged, Lanes, Way
from pykernels.comm.layout import Run
from pykernels.comm.stats import Meter, Stats

NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]
Exempt = Callable[[str, torch.Tensor], bool]
FORMAT = 1  # of state_dict
KEYS = ("codec", "world", "rank", "step", "grad_scale", "worker", "shard", "history")  # that it has in any case
PYTHON_REDUCER = 'keep torch._dynamo.config.optimize_ddp = "ddp_optimizer" when DistributedDataParallel is constructed'


def one_dimensional(name: str, parameter: torch.Tensor) -> bool:
    """Biases and the parameters of norms: few bytes, and other magnitudes than matrices have."""
    return parameter.dim() <= 1


def compress_all(name: str, parameter: torch.Tensor) -> bool:
    """Leave no parameter out."""
    return False


class CommState(ABC):
    """State of a DDP communication hook.

    It needs no process group when it is made: that may come later, as under trainers that construct the hook's state
    before they start. The first bucket connects it, on every rank at the same point; see :meth:`connect`.

    Args:
        process_group: the ranks that average their gradients; the default group if None.
        named_parameters: of the model, in any order, so that residuals have stable names in checkpoints and messages.
            Without it parameters are numbered as their gradients first come, and ``state_dict`` refuses.
        exempt: ``exempt(name, parameter)`` says what travels as fp32; parameters of one dimension unless given.
        grad_scaler: of automatic mixed precision; residuals are rescaled when its scale changes.
        within: a state of the same ranks that hands its buckets to this one: groups, threads, residuals, counters,
            names and `exempt` are its.
    """

    codec: ClassVar[str]
    lanes: ClassVar[int] = 2

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        named_parameters: NamedParameters | None = None,
        *,
        exempt: Exempt = one_dimensional,
        grad_scaler: torch.amp.GradScaler | None = None,
        within: CommState | None = None,
    ) -> None:
        self._process_group = process_group
        self._named = named_parameters is not None
        self._names: dict[torch.Tensor, str] = {parameter: name for name, parameter in named_parameters or ()}
        self._exempt = exempt
        self._grad_scaler = grad_scaler
        self._grad_scale: float | None = None
        self._meter = Meter()
        self._lanes = Lanes(self.lanes, self._meter)
        self.feedback = ErrorFeedback()
        self.step = -1
        self._slots: dict[int, tuple[list[Run], Any]] = {}
        self._connected = False
        self._within = within
        if within is not None:
            self._lanes, self._meter, self.feedback = within._lanes, within._meter, within.feedback
            self._named, self._names, self._exempt = within._named, within._names, within._exempt

    @cached_property
    def group(self) -> dist.ProcessGroup:
        """The ranks that average their gradients."""
        if self._within is not None:
            return self._within.group
        group = self._process_group if self._process_group is not None else dist.group.WORLD
        if group is None:
            raise RuntimeError("pykernels: torch.distributed is not initialized: call init_process_group first")
        return group

    @cached_property
    def world(self) -> int:
        """How many ranks there are."""
        return self.group.size()

    @cached_property
    def rank(self) -> int:
        """Which one this is."""
        return self.group.rank()

    def connect(self) -> None:
        """Make what ranks make together, once; all ranks call it, or meet their first bucket, at the same point."""
        if not self._connected:
            self._connected = True
            self._connect()

    def _connect(self) -> None:
        # The second collective of a bucket has a group of its own: its order is that of another thread.
        self.gather_group = self.group
        if self._within is not None:
            self.gather_group = self._within.gather_group
        elif self.world > 1:
            self.gather_group = new_group(dist.get_process_group_ranks(self.group), self.group)

    # ---- a bucket ----

    def __call__(self, bucket: GradBucket) -> Averaged:
        """Average a bucket over the ranks: what the hook does."""
        traced: Any = bucket
        if isinstance(traced, tuple):  # (gradient, parameter), while DistributedDataParallel's Python reducer is traced
            if self.world > 1:
                self.average_traced(*traced)
            nothing: Any = None
            return nothing
        self.connect()
        if bucket.index() == 0:
            self._begin_step()
        if self.world == 1:
            future: Averaged = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future
        return self.average(bucket)

    def average(self, bucket: GradBucket) -> Averaged:
        """Average a bucket over two or more ranks."""
        slot = self.slot(bucket)
        with self._lanes.side_stream(bucket.buffer().device):
            return self._lanes.run(bucket.buffer(), self.way(bucket.index(), bucket.buffer(), slot))

    @abstractmethod
    def way(self, index: int, buffer: torch.Tensor, slot: Any) -> Way:
        """All that happens to the `buffer` of bucket `index`, which is averaged in place."""

    def slot(self, bucket: GradBucket) -> Any:
        """What is kept for a bucket from step to step; made anew when other parameters are in it."""
        runs = self.runs(bucket)
        kept = self._slots.get(bucket.index())
        if kept is None or kept[0] != runs:
            kept = self._slots[bucket.index()] = runs, self.new_slot(bucket, runs)
        return kept[1]

    def new_slot(self, bucket: GradBucket, runs: list[Run]) -> Any:
        """Make what ``way`` needs. Collective; most ask whether the ranks ``agree``."""
        return None

    def forget_bucket(self, index: int) -> None:
        """Drop what was made for one bucket."""
        self._slots.pop(index, None)

    def forget_buckets(self) -> None:
        """Drop what was made for the buckets seen; they attach to their residuals again."""
        self._slots.clear()

    def average_traced(self, gradient: torch.Tensor, parameter: torch.nn.Parameter) -> None:
        """Average one gradient in place, inside a compiled backward pass."""
        raise RuntimeError(f"pykernels: {self.codec} cannot be compiled: {PYTHON_REDUCER}")

    def prepare_traced(self) -> None:
        """Make what ``average_traced`` needs, on every rank at the same point."""
        raise ValueError(f"pykernels: {self.codec} cannot be compiled: {PYTHON_REDUCER}")

    def _begin_step(self) -> None:
        self.step += 1
        self._meter.total.steps += 1
        if self.step:
            self.feedback.has_history = True
        if self._grad_scaler is not None and self._grad_scaler.is_enabled():
            scale = self._grad_scaler.get_scale()
            if self._grad_scale is not None and scale != self._grad_scale:
                self.rescale(scale / self._grad_scale)
            self._grad_scale = scale

    def rescale(self, factor: float) -> None:
        """Multiply what is kept of earlier gradients: from now on they are scaled otherwise."""
        self.feedback.scale(factor)

    def runs(self, bucket: GradBucket) -> list[Run]:
        """The parameters of a bucket, where their gradients lie in it."""
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise ValueError(f"pykernels: sparse gradients (bucket {bucket.index()}) are not supported by this hook")
        found = []
        for place, (parameter, gradient) in enumerate(zip(bucket.parameters(), bucket.gradients(), strict=True)):
            if parameter not in self._names:
                if self._named:
                    raise ValueError(
                        f"pykernels: named_parameters lacks a parameter of shape {list(parameter.shape)} that has a "
                        f"gradient in bucket {bucket.index()}, parameter {place}"
                    )
                self._names[parameter] = f"parameter {len(self._names)}"
            name = self._names[parameter]
            first = gradient.storage_offset() - buffer.storage_offset()
            found.append(Run(name, int(first), gradient.numel(), self._exempt(name, parameter)))
        return found

    def agree(self, what: str, options: str, runs: Sequence[Run], vote: bool = False) -> bool:
        """Whether any rank votes yes. Raises on every rank, by name, if `options` or `runs` are not the same on all.

        The step becomes the latest of any rank: one that joins a resumed job counts with the others. Collective and
        slow: for new buckets only.
        """
        advice = "All ranks must build the same model, with the same hook and options, and the same DDP bucket sizes"
        mine = [options, *((run.key, run.numel, run.exempt) for run in runs)]
        said = agree(self.group, what, mine, (vote, self.step), advice)
        self.step = max(step for _, step in said)
        return any(yes for yes, _ in said)

    # ---- for the user ----

    def stats(self) -> Stats:
        """Bytes, times and residual norms since the beginning. Waits for nothing: call it between steps."""
        return self._meter.snapshot(self.feedback.norms())

    def state_dict(self) -> dict[str, Any]:
        """What this rank must keep to go on as if it had not stopped. Ranks differ: save one file a rank."""
        if not self._named:
            raise RuntimeError(
                "pykernels: state_dict needs stable names: give the state named_parameters=model.named_parameters()"
            )
        return {
            "format": FORMAT,
            "codec": self.codec,
            "world": self.world,
            "rank": self.rank,
            "step": self.step,
            "grad_scale": self._grad_scale,
            **self.feedback.state_dict(),
            **self.extra_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave.

        The residuals of the same number of ranks return to their places. After a change of the number of ranks, each
        rank may load any one of the old states, or none: worker residuals stay, what belonged to shards is reset.

        Raises:
            ValueError: a state of another codec, another format, or of another rank of the same number of ranks; one
                that is damaged; a residual for a parameter that the model has not, or that has another size.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"pykernels: state_dict: format {state.get('format')!r} is not {FORMAT}")
        if "codec" in state and state["codec"] != self.codec:
            raise ValueError(f"pykernels: state_dict: saved with {state['codec']!r}, this hook is {self.codec!r}")
        if lacking := [key for key in (*KEYS, *self.extra_state()) if key not in state]:
            raise ValueError(f"pykernels: state_dict: lacks {', '.join(lacking)}: it is damaged")
        same_world = state["world"] == self.world
        if same_world and state["rank"] != self.rank:
            raise ValueError(
                f"pykernels: state_dict: saved by rank {state['rank']}, loaded by rank {self.rank}: save and load one "
                "file a rank"
            )
        named = {name: parameter.numel() for parameter, name in self._names.items()}
        check_residuals(state, named if self._named else None)
        self.step = int(state["step"])
        self._grad_scale = state["grad_scale"]
        self.feedback.load(state["worker"], state["shard"] if same_world else {}, bool(state["history"]))
        self.load_extra_state(state)
        self.forget_buckets()

    def extra_state(self) -> dict[str, Any]:
        """What a subclass saves beside the residuals."""
        return {}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (most have none)
        """The inverse of ``extra_state``."""

    def close(self) -> None:
        """End the threads. The hook must not be called afterwards."""
        self._lanes.close()


def hook(state: CommState, bucket: GradBucket) -> Averaged:
    """What DistributedDataParallel calls, in torch's convention: ``ddp.register_comm_hook(state, hook)``."""
    return state(bucket)


# DistributedDataParallel compares a hook's annotations with the classes themselves, not with their names.
hook.__annotations__ |= {"bucket": GradBucket, "return": Averaged}
