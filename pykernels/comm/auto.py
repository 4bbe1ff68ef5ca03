"""The codec that suits the link: measured when the hook is made, chosen for each bucket by predicted time."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._distributed_c10d import GradBucket

from pykernels.comm.dense import DENSE, DenseState
from pykernels.comm.lanes import Way
from pykernels.comm.layout import Run
from pykernels.comm.measure import codec_speed, link_cost, slowest
from pykernels.comm.model import Link, Speed, Times, predict
from pykernels.comm.plain import Fp32State
from pykernels.comm.state import CommState
from pykernels.comm.stats import Stats

WORTHWHILE = 0.9  # a compressed bucket must be predicted to take at most this share of fp32's time


@dataclass(frozen=True)
class Choice:
    """What a bucket goes by, and why.

    Attributes:
        codec: what was chosen.
        numel: gradients of the bucket.
        predicted: seconds of the bucket alone, by candidate and phase.
    """

    codec: str
    numel: int
    predicted: Mapping[str, Times]

    def __str__(self) -> str:
        times = ", ".join(f"{codec} {1e3 * times.total:.2f}" for codec, times in self.predicted.items())
        return f"{self.codec} for {self.numel} gradients, predicted ms: {times}"


@dataclass
class AutoStats(Stats):
    """:class:`Stats`, and what was chosen for each bucket (by its index)."""

    choices: dict[int, Choice] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([super().__str__(), *(f"bucket {i}: {choice}" for i, choice in sorted(self.choices.items()))])


class AutoState(CommState):
    """State of the hook that chooses among codecs; the arguments of :class:`CommState`, and

    Args:
        candidates: "fp32" (a plain all-reduce) and names of dense codecs. Where fp32 is among them a codec is chosen
            only if it is predicted to save a tenth of fp32's time. A codec that loses more than you accept should not
            be here: nothing but time is compared.
        error_feedback: as of :class:`DenseState`; each codec's own default if None.
        device: of the gradients.
        facts: a link and the speed of each candidate, if they are known; else they are measured now, for up to a second
            or so, by all ranks together.

    What it keeps in ``state_dict`` are the residuals, which serve every codec; the choice is made anew.

    Raises:
        ValueError: no candidate, an unknown one, or one that `facts` lack.
    """

    codec = "auto"

    def __init__(
        self,
        *args: Any,
        candidates: Sequence[str] = ("fp32", "bf16", "int8"),
        error_feedback: bool | None = None,
        device: torch.device | None = None,
        facts: tuple[Link, Mapping[str, Speed]] | None = None,
        **kwargs: Any,
    ) -> None:
        known = ("fp32", *DENSE)
        if isinstance(candidates, str) or not candidates or not set(candidates) <= set(known):
            raise ValueError(f"pykernels: candidates must be some of {', '.join(known)}, not {candidates!r}")
        if facts is not None and not set(candidates) <= set(facts[1]):
            raise ValueError(f"pykernels: facts: no speed of {', '.join(sorted(set(candidates) - set(facts[1])))}")
        super().__init__(*args, **kwargs)
        self._members: dict[str, Fp32State | DenseState] = {
            codec: Fp32State(within=self)
            if codec == "fp32"
            else DENSE[codec](error_feedback=error_feedback, within=self)
            for codec in dict.fromkeys(candidates)
        }
        self.choices: dict[int, Choice] = {}
        self._facts, self._device = facts, device or torch.device("cpu")

    def _connect(self) -> None:
        super()._connect()
        for member in self._members.values():
            member.connect()
        if self.world > 1:
            self.link, self.speeds = self._facts if self._facts is not None else self._measure(self._device)

    def _measure(self, device: torch.device) -> tuple[Link, dict[str, Speed]]:
        link = link_cost(self.group, device)
        slowest([0.0], self.group, device)  # codecs are timed at the same time, since they will run at the same time
        mine = [
            codec_speed(
                codec,
                getattr(state, "block", 0),
                self.world,
                getattr(state, "error_feedback", False),
                device,
                seconds=0.03,
                of=statistics.fmean,
            )
            for codec, state in self._members.items()
        ]
        agreed = slowest([seconds for speed in mine for seconds in dataclasses.astuple(speed)], self.group, device)
        return link, {codec: Speed(*agreed[3 * i : 3 * i + 3]) for i, codec in enumerate(self._members)}

    def _choose(self, runs: Sequence[Run]) -> Choice:
        predicted = {
            codec: predict(codec, runs, getattr(state, "block", 0), self.world, self.link, self.speeds[codec])
            for codec, state in self._members.items()
        }
        best = min(predicted, key=lambda codec: predicted[codec].total)
        if "fp32" in predicted and predicted[best].total > WORTHWHILE * predicted["fp32"].total:
            best = "fp32"
        return Choice(best, sum(run.numel for run in runs), predicted)

    def new_slot(self, bucket: GradBucket, runs: list[Run]) -> tuple[CommState, Any]:
        index = bucket.index()
        choice = self._choose(runs)
        self.agree(f"bucket {index}", choice.codec, runs)
        for member in self._members.values():
            member.forget_bucket(index)
        chosen = self._members[choice.codec]
        if not getattr(chosen, "error_feedback", False):
            self.feedback.settle(runs, bucket.buffer(), self.world)
        self.choices[index] = choice
        return chosen, chosen.slot(bucket)

    def way(self, index: int, buffer: torch.Tensor, slot: tuple[CommState, Any]) -> Way:
        chosen, kept = slot
        return chosen.way(index, buffer, kept)

    def _begin_step(self) -> None:
        super()._begin_step()
        for member in self._members.values():
            member.step = self.step

    def stats(self) -> AutoStats:
        """As every state's, with the choices."""
        found = super().stats()
        return AutoStats(
            **{f.name: getattr(found, f.name) for f in dataclasses.fields(found)}, choices=dict(self.choices)
        )

    def forget_buckets(self) -> None:
        super().forget_buckets()
        for member in self._members.values():
            member.forget_buckets()
