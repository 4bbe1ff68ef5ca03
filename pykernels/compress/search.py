"""The search: what costs least is tried first, and the first network that keeps the budget is the answer.

1. The original in fp32: its latency is the unit, its quality what drops are counted from.
2. The original in int8 (without data: bf16); where that loses too much or wins nothing, step by step in the precisions
   that suit (``auto``).
3. Pruned to a part of the quickest of these, distilled where there are training data, in the same precision. Which
   part: what is missing to the budget; else, by bisection, the least that does not lose too much.

It ends at a network that keeps latency and drop; where no latency is asked for, when the rounds are over.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pykernels.distil import Stopped as Halted
from pykernels.distil import distill
from pykernels.network.plan.timing import quiet_seconds
from pykernels.optimize import optimize
from pykernels.optimized import Optimized
from pykernels.prune import prune

from .checkpoint import Checkpoint
from .data import Judge, Loader
from .report import Report, Row

__all__ = ["Found", "Options", "Search", "Wanted"]

Progress = Callable[[str, int, int], None]
Precision = str | Mapping[str, str]  # as `pykernels.optimize` takes it
SLACK = 1.02
"""Of the latency: what a measurement may lie above it."""
_ROUNDS, _MOST_ROUNDS, _TURNS = 20, 200, 3  # of timing networks in turn
_TIMED = 0.05  # seconds a turn at least, as far as rounds go
_FIRST = 0.7  # of the time, where nothing says how much is to go
_CLOSE = 0.05  # parts that differ by less are not told apart
_CHUNK = 50  # steps of distillation between which it can be written down
_SECONDS = 20.0  # between two times that it is
_WARM_UP = 0.05  # of the steps, in which the learning rate rises


@dataclass(frozen=True)
class Wanted:
    """A budget; None where nothing is asked for.

    Attributes:
        latency: of a call, as a part of the original's in fp32.
        drop: of quality.
    """

    latency: float | None = None
    drop: float | None = None

    @classmethod
    def read(cls, budget: Mapping[str, Any] | None) -> Wanted:
        """Raises:
        ValueError: it is malformed.
        """
        given = {"drop": 0.01} if budget is None else budget
        if not isinstance(given, Mapping) or not given or not set(given) <= {"latency", "drop"}:
            raise ValueError(f"budget: expected a dictionary with latency, drop, or both, not {given!r}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"budget: {name!r} is {value!r}, not a number")
        if not 0 < given.get("latency", 0.5) < 1:
            raise ValueError(
                f"budget: 'latency' is {given['latency']}; it is a part of the original's in fp32, between 0 and 1"
            )
        if given.get("drop", 0.0) < 0:
            raise ValueError(f"budget: 'drop' is {given['drop']}; it must not be negative")
        return cls(**{name: float(value) for name, value in given.items()})

    def __str__(self) -> str:
        words = [] if self.latency is None else [f"takes at most {self.latency:g} of the original's time in fp32"]
        words += [] if self.drop is None else [f"loses at most {self.drop:g}"]
        return " and ".join(words)


@dataclass(frozen=True)
class Options:
    """How students are made; as the arguments of `compress`."""

    steps: int = 0
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None
    loss: Callable[..., torch.Tensor] | None = None
    labels: float = 0.0
    freeze_norms: bool = False
    keep: tuple[str, ...] = ()
    rounds: int = 4


@dataclass
class Student:
    """The original, or a smaller model made of it.

    Attributes:
        key: names it in a checkpoint.
        name: the stages behind it.
        recipe: what was removed; None of the original.
    """

    key: str
    name: str
    model: nn.Module
    recipe: Mapping[str, Any] | None = None
    steps: int = 0


@dataclass
class Found:
    """A network, what it was made of, and in which precision that was asked for."""

    student: Student
    network: Optimized
    precision: str
    place: int = field(default=0)


class Search:
    """One search.

    Args:
        model: stays as it is.
        args: inputs of the call that is timed.
        train: what students are distilled on; None: they are not.
        fit: entries that channels are weighed and ranges observed on; none: they are not.
        judge: from the original on our kernels to what judges all networks.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        train: Loader | None,
        fit: Sequence[Any],
        judge: Callable[[Optimized], Judge],
        wanted: Wanted,
        options: Options,
        store: Checkpoint,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.args, self.train, self.fit, self.wanted = model, args, train, list(fit), wanted
        self.options, self.store, self.progress = options, store, progress
        self.report = Report(latency=wanted.latency, drop=wanted.drop)
        self.found: Found | None = None
        self._made: Found | None = None
        self._rows: dict[str, Row] = {}
        self._hopeless = False
        self._rounds = _ROUNDS
        self._since = time.monotonic()
        self._judge_of = judge

    # --- the way ---

    def run(self) -> None:
        """Find the network; what is reached stands in `found` and `report` at any time."""
        original = self.begin()
        for precision in self._of_original(original):
            if self._met(self._row(original, precision)):
                return
        self._prune()

    def begin(self) -> Student:
        """Measure the original in fp32."""
        original = Student("original", "original", copy.deepcopy(self.model))
        self.base = self._lowered(original, "fp32")
        if self.base.planned is None:
            raise ValueError("model: nothing of it runs on our kernels, so there is no latency to win")
        once = quiet_seconds([self.base.planned], self._leaves(), _ROUNDS, 1)[0]
        self._rounds = min(_MOST_ROUNDS, max(_ROUNDS, int(_TIMED / max(once, 1e-9))))
        self.judge = self._judge_of(self.base)
        self.report.measure = self.judge.measure
        self._row(original, "fp32", self.base)
        return original

    def replay(self, recipe: Mapping[str, Any]) -> None:
        """Do what a recipe says, and measure it."""
        student = original = self.begin()
        if recipe["prune"] is not None:
            pruned = prune(self.model, self.args, recipe=recipe["prune"], data=self.fit or None)
            student = Student("replayed", "pruned by the recipe", pruned.model, pruned.recipe)
        steps = recipe["distil"]["steps"] if recipe["distil"] else 0
        if steps and self.train is None:
            self.report.notes.append(f"the recipe distils for {steps} steps; without train that was left out")
        elif steps and student is not original:
            self._distil(student, steps, student.name)
            student.steps, student.name = steps, f"{student.name}, distilled {steps} steps"
        self._row(student, recipe["precision"])
        self.found = self._made  # it is what was asked for, whatever it loses

    def _of_original(self, original: Student) -> Iterator[str]:
        """Precisions in which the original is tried."""
        if not self.fit:
            self.report.notes.append("int8 and auto were not tried, and channels are weighed by magnitude: no data")
            yield "bf16"
            return
        yield "int8"
        row = self.report.rows[-1]
        if not self._holds(row) or row.latency >= 1.0:
            yield "auto"

    def _prune(self) -> None:
        """Students, each of another size."""
        assert self.found is not None
        whole, precision = self.report.rows[self.found.place], self.found.precision
        made_in = precision
        if precision == "auto":
            made_in = whole.precision if whole.precision in ("fp32", "bf16", "fp16") else "int8"
        latency = self.wanted.latency
        low, high = 0.0, 1.0  # parts that lose too much, or cannot be; and that do not
        target = _FIRST if latency is None else min(1.0 - _CLOSE, latency / whole.latency)
        for _ in range(self.options.rounds):
            rows = list(self._tried(target, made_in, precision))
            if any(map(self._met, rows)) or (not rows and self._hopeless):
                return
            if any(map(self._holds, rows)):
                high = min(high, target)
            else:
                low = max(low, target)
            if low > 0.0:
                target = (low + high) / 2
            elif latency is not None:  # good, but not quick enough
                target *= 0.98 * latency / rows[-1].latency
            else:
                target *= _FIRST
            if high - low < _CLOSE:
                return

    def _tried(self, target: float, made_in: str, precision: str) -> Iterator[Row]:
        """Networks of the model pruned to this part of the original's latency in `made_in`; none if it cannot be.

        With training data, what is lost without training is measured in fp32; where that is little enough, nothing is
        trained unless the network is too slow.
        """
        pruned = self._pruned(target, made_in)
        if pruned is None:
            return
        if not self.options.steps:
            yield self._best_row(pruned, precision)
            return
        plain = self._row(pruned, "fp32")
        if self.wanted.drop is not None and self._holds(plain):
            row = plain if self._met(plain) else self._best_row(pruned, precision)
            yield row
            if self._met(row):
                return
        distilled = self._best_row(self._distilled(pruned), precision)
        yield distilled
        if self.wanted.drop is None and distilled.quality < plain.quality:
            yield self._best_row(pruned, precision)

    # --- students ---

    def _pruned(self, target: float, precision: str) -> Student | None:
        key, name = f"{target:.4f}", f"pruned to {target:.2f}"
        self._hopeless = False
        stored, why = self.store.student(key), self.store.refused(key)
        if stored is not None:
            recipe, weights = stored
            student = Student(key, name, prune(self.model, self.args, recipe=recipe).model, recipe)
            student.model.load_state_dict(weights)
            return student
        if why is None:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="latency:")  # what it takes stands in the report
                    found = prune(
                        self.model,
                        self.args,
                        latency=target,
                        data=self.fit or None,
                        importance="taylor" if self.fit else "magnitude",
                        precision=precision,
                        keep=self.options.keep,
                        progress=self._shown(name),
                    )
                self.store.keep_student(key, found.recipe, found.model)
                return Student(key, name, found.model, found.recipe)
            except ValueError as error:
                why = str(error)
                self.store.refuse(key, why)
        self._hopeless = not why.startswith("latency:")  # no other part would do
        self.report.refused.append(f"{name}: {why}")
        return None

    def _distilled(self, pruned: Student) -> Student:
        """A copy of a pruned student, trained on the original's answers."""
        steps = self.options.steps
        key, name = f"{pruned.key}-distilled", f"{pruned.name}, distilled {steps} steps"
        student = Student(key, name, copy.deepcopy(pruned.model), pruned.recipe, steps)
        stored = self.store.student(key)
        if stored is not None:
            student.model.load_state_dict(stored[1])
            return student
        self._distil(student, steps, pruned.name)
        self.store.keep_student(key, pruned.recipe or {}, student.model)
        return student

    def _distil(self, student: Student, steps: int, stage: str) -> None:
        """Train a student on the original's answers; interrupted, it goes on where it was last written down."""
        assert self.train is not None
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        optimizer = (self.options.optimizer or _adam)(parameters)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
        done, saved = 0, time.monotonic()
        before = self.store.training(student.key)
        if before is not None:
            student.model.load_state_dict(before["weights"])
            optimizer.load_state_dict(before["optimizer"])
            scheduler.load_state_dict(before["scheduler"])
            done = before["step"]
        while done < steps:
            count = min(_CHUNK, steps - done)
            try:
                distill(
                    student.model,
                    self._teacher(),
                    self.train,
                    count,
                    optimizer=optimizer,
                    scheduler=scheduler,
                    loss=self.options.loss,
                    labels=self.options.labels,
                    freeze_norms=self.options.freeze_norms,
                    inputs=len(self.args),
                    progress=self._shown(stage, done, steps),
                )
            except Halted as error:
                raise ValueError(f"{str(error).replace('loader:', 'train:', 1)} since step {done}") from error
            done += count
            if done < steps and time.monotonic() - saved > _SECONDS:
                saved = time.monotonic()
                content = {
                    "step": done,
                    "weights": student.model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scheduler": scheduler.state_dict(),
                }
                self.store.keep_training(student.key, content)

    def _teacher(self) -> nn.Module:
        """The original on our kernels; as it is where these take no other batch size."""
        known = zip(self.base.free, self.base.example, strict=True)
        free = all(0 in dims for dims, example in known if example is not None)
        return self.base if free else copy.deepcopy(self.model)

    # --- rows ---

    def _best_row(self, student: Student, precision: str) -> Row:
        """A student in this precision; where int8 loses too much, step by step."""
        if precision != "auto":
            row = self._row(student, precision)
            if precision != "int8" or self._holds(row):
                return row
        plain = self._row(student, "fp32")
        return self._row(student, "auto", quality=plain.quality) if self._holds(plain) else plain

    def _row(
        self, student: Student, precision: Precision, network: Optimized | None = None, quality: float | None = None
    ) -> Row:
        """Make, time and judge a network, once."""
        asked = _named(precision)
        key = f"{student.key}-{asked}"
        if key in self._rows:
            return self._rows[key]
        stored = self.store.row(key)
        if stored is not None:
            row, network = stored
        else:
            network = network or self._lowered(student, precision, quality)
            seconds, latency = self._timed(network)
            report = network.report()
            made = asked if asked == report.precision else f"{asked} ({report.precision})"
            row = Row(
                f"{student.name}, {made}", report.precision, seconds, latency, self.judge(network), report.bytes_after
            )
            row.spent = time.monotonic() - self._since
            self.store.keep_row(key, row, network)
        self._since = time.monotonic()
        self.report.rows.append(row)
        self._rows[key] = row
        self._made = Found(student, network, asked, len(self.report.rows) - 1)
        if self.found is None or (self._holds(row) and self._better(row, self.report.rows[self.found.place])):
            self.found = self._made
        return row

    def _better(self, row: Row, other: Row) -> bool:
        """Whether it is quicker; where both are quick enough and any drop will do, whether it loses less."""
        if self.wanted.drop is None and self._quick(row) and self._quick(other):
            return (row.quality, -row.latency) > (other.quality, -other.latency)
        return row.latency < other.latency

    def _lowered(self, student: Student, precision: Precision, quality: float | None = None) -> Optimized:
        """A student on our kernels; for auto, what `quality` in fp32 leaves of the drop may be lost."""
        options: dict[str, Any] = {}
        if precision in ("int8", "auto") or not isinstance(precision, str):
            options["calibration"] = self.fit
        if precision == "auto":
            base = self.report.rows[0].quality
            left = (self.wanted.drop or 0.0) - (base - (base if quality is None else quality))
            options |= {"budget": {"drop": max(0.0, left)}, "validate": self.judge}
        return optimize(
            student.model, self.args, precision, progress=self._shown(f"{student.name}, {_named(precision)}"), **options
        )

    def _timed(self, network: Optimized) -> tuple[float, float]:
        """Seconds of a call, and as a part of the original's in fp32, both timed in turn; a near miss once more."""
        if network is self.base:
            assert self.base.planned is not None
            return quiet_seconds([self.base.planned], self._leaves(), self._rounds, _TURNS)[0], 1.0
        least = [math.inf, math.inf]
        for _ in range(2):
            planned = [n.planned for n in (self.base, network) if n.planned is not None]
            found = quiet_seconds(planned, self._leaves(), self._rounds, _TURNS)
            least = [min(pair) for pair in zip(least, found, strict=True)]
            part = least[1] / least[0]
            if self.wanted.latency is None or not 1.0 < part / (SLACK * self.wanted.latency) < 1.1:
                break
        return least[1], part

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves(self.args)

    def _holds(self, row: Row) -> bool:
        return self.wanted.drop is None or self.report.rows[0].quality - row.quality <= self.wanted.drop + 1e-9

    def _quick(self, row: Row) -> bool:
        return self.wanted.latency is not None and row.latency <= SLACK * self.wanted.latency

    def _met(self, row: Row) -> bool:
        return self._holds(row) and self._quick(row)

    @property
    def met(self) -> bool:
        """Whether what was found keeps the budget."""
        if self.found is None:
            return False
        row = self.report.rows[self.found.place]
        return self._holds(row) and (self.wanted.latency is None or self._quick(row))

    def conclude(self) -> Report:
        """The report, with what became of each row."""
        assert self.found is not None
        self.report.chosen = self.found.place
        for place, row in enumerate(self.report.rows):
            if place == self.found.place:
                row.verdict = "chosen"
            elif not place:
                row.verdict = "the original"
            elif not self._holds(row):
                row.verdict = "loses too much"
            elif self.wanted.latency is not None and not self._quick(row):
                row.verdict = "too slow"
            elif self.wanted.drop is None and self.wanted.latency is not None:
                row.verdict = "loses more than the chosen"
            else:
                row.verdict = "slower than the chosen"
        return self.report

    def _shown(self, stage: str, done: int = 0, total: int | None = None) -> Progress | None:
        """The caller's progress, of a part that is one of a stage."""
        show = self.progress
        if show is None:
            return None
        return lambda part, count, of: show(f"{stage}: {part}", done + count, of if total is None else total)


def _named(precision: Precision) -> str:
    return precision if isinstance(precision, str) else "mixed"


def _adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _rate(part: float) -> float:
    """Of the learning rate, at this part of all steps: a line up, half a cosine down."""
    if part < _WARM_UP:
        return (part + 1e-3) / (_WARM_UP + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * (part - _WARM_UP) / (1.0 - _WARM_UP)))
