"""A world in which making and timing networks costs nothing: what each takes and keeps is written down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from pykernels.compress import search
from pykernels.network.report import Chosen, Report


class Model(nn.Module):
    """[N, 4] -> [N, 3]; `part` of it is left."""

    def __init__(self, part: float = 1.0) -> None:
        super().__init__()
        self.layer, self.part, self.steps = nn.Linear(4, 3), part, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Network(nn.Module):
    """What stands for an `Optimized`."""

    def __init__(self, model: Model, precision: str, made: str, seconds: float) -> None:
        super().__init__()
        self.part, self.steps, self.precision, self.seconds = model.part, model.steps, precision, seconds
        self.planned, self.free, self.example = self, [[0]], [(torch.float32, [1, 4])]
        self.made = made

    def report(self) -> Any:
        report = Report.__new__(Report)
        report.precision, report.bytes_after = self.made, int(1e6 * self.part)
        report.chosen = [Chosen("linear", "linear", "layer", "int8")]
        return report


@dataclass
class World:
    """What networks take, and keep.

    Attributes:
        latency: of a precision, as a part of fp32's.
        lost: by a precision.
        lost_by_pruning: by a part that is left.
        least: the least part that pruning reaches.
        calls: what was done, in order.
    """

    latency: Mapping[str, float] = field(default_factory=lambda: {"fp32": 1.0, "bf16": 0.8, "int8": 0.5, "auto": 0.6})
    lost: Mapping[str, float] = field(default_factory=lambda: {"fp32": 0.0, "bf16": 0.0, "int8": 0.004, "auto": 0.002})
    lost_by_pruning: Any = field(default=lambda part: 0.02 * (1.0 - part))
    least: float = 0.2
    hopeless: str = ""
    calls: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def optimize(self, model: Any, args: Any, precision: Any, progress: Any = None, **options: Any) -> Any:
        precision = precision if isinstance(precision, str) else "auto"  # what it chose, given again
        self.calls.append(f"{precision} of {model.part:.2f}")
        self.options[self.calls[-1]] = options
        made = "mixed" if precision == "auto" else precision
        return Network(model, precision, made, self.latency[precision] * model.part)

    def prune(self, model: Any, args: Any, latency: float | None = None, **options: Any) -> Any:
        part = options["recipe"]["part"] if latency is None else latency
        self.calls.append(f"prune to {part:.2f}")
        self.options[self.calls[-1]] = options
        if self.hopeless:
            raise ValueError(self.hopeless)
        if part < self.least:
            raise ValueError(f"latency: {part:.3f} cannot be reached: ...")
        return type("Pruned", (), {"model": Model(part), "recipe": {"version": 1, "part": part}})()

    def distill(self, student: Any, teacher: Any, loader: Any, steps: int, **options: Any) -> list[float]:
        self.calls.append(f"distil {steps}")
        student.steps += steps
        return [0.0] * steps

    def validate(self, network: Any) -> float:
        lost = self.lost[network.precision] + self.lost_by_pruning(network.part) / (2 if network.steps else 1)
        return 0.9 - lost


@contextmanager
def pretended(world: World) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("optimize", "prune", "distill"):
            patch.setattr(search, name, getattr(world, name))
        patch.setattr(search, "quiet_seconds", lambda networks, *_: [network.seconds for network in networks])
        yield world
