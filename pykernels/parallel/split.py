"""An optimized network in parts that follow one another, each a network and a file of its own.

Where to cut follows from the measured times of the steps and from the bytes that cross: a part takes its steps' time
and that of copying what it gets and hands on, a link the time of its bytes, and the slowest of all these is made as
quick as it can be.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree

from pykernels.graph.alias import writes
from pykernels.network.plan.cut import Cuts, Spec
from pykernels.network.plan.cut import Part as Piece
from pykernels.network.report import Report
from pykernels.optimized import Optimized, load
from pykernels.parallel.sizes import calls

if TYPE_CHECKING:
    from pykernels.parallel.chain import Chain

__all__ = ["Split", "split"]

COPY = 2e-10  # seconds that a process spends on a byte which it gets or hands on
NAME = re.compile(r"part-(\d+)-of-(\d+)\.pk")
NOTE = re.compile(r"part (\d+) of (\d+) of a network, split ([0-9a-f]{16})")


class Place(NamedTuple):
    """Which part of which split a network is, as a note in its report says.

    Attributes:
        number, total: from 1; of so many.
        split: differs from split to split, of one network too.
    """

    number: int
    total: int
    split: str

    @classmethod
    def of(cls, network: Optimized) -> Place:
        """
        Raises:
            ValueError: it is no part.
        """
        for note in network.report().notes:
            if (found := NOTE.fullmatch(note)) is not None:
                return cls(int(found[1]), int(found[2]), found[3])
        raise ValueError("network: it is no part of one that was split")

    def __str__(self) -> str:
        return f"part {self.number} of {self.total} of a network, split {self.split}"


@dataclass(frozen=True)
class Split:
    """The parts of a network, in order. Called, they answer one after the other in this process.

    Attributes:
        parts: each takes, flat, what the one before it returns; the first takes the network's inputs, as they were
            nested, and the last returns its outputs.
        seconds: of each part's steps, as measured when the network was split; empty for parts that were loaded.
        crossing: bytes behind each part but the last, for the example; empty as well.
    """

    parts: tuple[Optimized, ...]
    seconds: tuple[float, ...] = ()
    crossing: tuple[int, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first, *others = self.parts
        answer = first(*args, **kwargs)
        for part in others:
            answer = part(*answer)
        return answer

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write ``part-1-of-4.pk`` and so on, each a file as `Optimized.save` writes it.

        Raises:
            ValueError: a part cannot be saved.
            OSError: the folder or a file cannot be written.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        count = len(self.parts)
        paths = [Path(folder) / f"part-{number}-of-{count}.pk" for number in range(1, count + 1)]
        for part, path in zip(self.parts, paths, strict=True):
            part.save(path)
        return paths

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Split:
        """What `save` wrote.

        Raises:
            ValueError: parts are missing, of several splits, damaged, or named otherwise than they follow one another.
            OSError: a file cannot be read.
        """
        parts = tuple(load(path) for path in files_in(folder))
        places = [Place.of(part) for part in parts]
        if places != [Place(number, len(parts), places[0].split) for number in range(1, len(parts) + 1)]:
            found = "; ".join(map(str, places))
            raise ValueError(f"folder: the parts of one split in order are needed, not {found}")
        return cls(parts)

    def serve(
        self,
        threads: int | None = None,
        in_flight: int | None = None,
        silence: float = 5.0,
        devices: Sequence[str] | None = None,
    ) -> Chain:
        """A process for each part, on this machine, joined to a pipeline: `pykernels.parallel.Chain`, whose arguments
        these are."""
        from pykernels.parallel.chain import Chain

        return Chain.of(self, threads, in_flight, silence, devices)

    def __str__(self) -> str:
        lines = []
        for number, part in enumerate(self.parts, 1):
            report = part.report()
            line = f"part {number}: {len(report.fused)} fused calls, weights {report.bytes_after / 1e6:.1f} MB"
            if self.seconds:
                line += f", {1e3 * self.seconds[number - 1]:.2f} ms"
            if number <= len(self.crossing):
                line += f"; {self.crossing[number - 1] / 1e3:.0f} kB to the next"
            lines.append(line)
        if self.seconds:
            lines.append(f"balance: {sum(self.seconds) / max(self.seconds):.2f} times the throughput of one process")
        return "\n".join(lines)


def files_in(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of all parts, in order.

    Raises:
        ValueError: there are none, some are missing, or they are of several splits.
    """
    found = {match: path for path in Path(folder).iterdir() if (match := NAME.fullmatch(path.name))}
    counts = {int(match[2]) for match in found}
    numbers = sorted(int(match[1]) for match in found)
    if len(counts) != 1 or numbers != list(range(1, max(counts) + 1)):
        names = ", ".join(sorted(path.name for path in found.values())) or "none"
        raise ValueError(f"folder: the files of all parts of one network are needed, {folder} has {names}")
    return [path for _, path in sorted((int(match[1]), path) for match, path in found.items())]


def split(
    network: Optimized,
    stages: int,
    inputs: Sequence[torch.Tensor] | None = None,
    rate: float | None = None,
    rounds: int = 20,
) -> Split:
    """Cut a network into parts of one process each, balanced by measured step times and by the bytes between them.

    Every size that the network takes goes through the parts, with its bits: batches, and whatever else is free.

    Args:
        network: on the CPU, of `pykernels.optimize` or `pykernels.load`.
        stages: how many parts.
        inputs: flat inputs of one call, for which it is balanced; by default of the example's shapes.
        rate: bits per second of the slowest link between two parts; None where they are on one machine.
        rounds: timed calls; of each step the quickest counts. With torch's number of threads now.

    Raises:
        TypeError: `network` is no `Optimized` one.
        ValueError: it has no plans, its calls write into something, an input is no tensor, it does not take `inputs`,
            a number is none that can be, or it cannot be cut into so many parts.
    """
    if not isinstance(network, Optimized):
        raise TypeError(f"network: an Optimized network is needed, not {type(network).__name__}")
    if type(stages) is not int or stages < 1:
        raise ValueError(f"stages: must be a whole number of at least 1, not {stages!r}")
    if type(rounds) is not int or rounds < 1:
        raise ValueError(f"rounds: must be a whole number of at least 1, not {rounds!r}")
    if rate is not None and (not isinstance(rate, int | float) or not 0 < rate < math.inf):
        raise ValueError(f"rate: must be bits per second, above 0, not {rate!r}")
    if network.planned is None or network.report().device != "cpu":
        raise ValueError("network: it has no plans: it is not on the CPU, or no step of it could be planned")
    if any(writes(node) for node in network.planned.program.graph.nodes):
        raise ValueError("network: its calls write into buffers or inputs, which parts do not share")
    examples, sizes = calls(network, inputs)
    cuts = Cuts(network.planned, examples, sizes)
    places, seconds = _balance(cuts, stages, sizes[0], rate, rounds)
    pieces = [cuts.part(begin, end) for begin, end in itertools.pairwise(places)]
    specs = [piece.inputs for piece in pieces]
    token = secrets.token_hex(8)
    named = [Place(number, stages, token) for number in range(1, stages + 1)]
    parts = tuple(_network(network, piece, sizes[0], place) for place, piece in zip(named, pieces, strict=True))
    crossing = tuple(sum(spec.bytes(sizes[0]) for spec in found) for found in specs[1:])
    return Split(parts, tuple(seconds), crossing)


def _balance(
    cuts: Cuts, stages: int, free: Sequence[int], rate: float | None, rounds: int
) -> tuple[list[int], list[float]]:
    """Where to cut, the two ends included, and the seconds of each part's steps.

    Dynamic programming over the places where a cut may go: the least time of the slowest for so many parts up to each.
    """
    where, sizes = [], []
    for cut in range(cuts.count + 1):
        specs = cuts.specs(cut)
        if specs is not None or cut in (0, cuts.count):
            where.append(cut)
            sizes.append(sum(spec.bytes(free) for spec in specs or ()))
    if len(where) <= stages:
        raise ValueError(f"stages: the network can be cut into {len(where) - 1} parts at most, not {stages}")
    until = np.concatenate([[0.0], np.cumsum(cuts.seconds(rounds))])[where]
    crossing = np.array(sizes, dtype=float)
    link = crossing * 8 / rate if rate is not None else np.zeros(len(where))
    link[[0, -1]] = 0.0
    least = np.full(len(where), np.inf)
    least[0] = 0.0
    came: list[list[int]] = []
    for _ in range(stages):
        following, sources = np.full(len(where), np.inf), [0] * len(where)
        for end in range(1, len(where)):
            alone = until[end] - until[:end] + COPY * (crossing[:end] + crossing[end])
            slowest = np.maximum(np.maximum(least[:end], alone), link[end])
            sources[end] = int(slowest.argmin())
            following[end] = slowest[sources[end]]
        least = following
        came.append(sources)
    places = [len(where) - 1]
    for sources in reversed(came):
        places.append(sources[places[-1]])
    places.reverse()
    return [where[place] for place in places], [float(s) for s in np.diff(until[places])]


def _network(whole: Optimized, piece: Piece, free: Sequence[int], place: Place) -> Optimized:
    """A part as a network of its own."""
    first, last = place.number == 1, place.number == place.total
    report, told = whole.report(), piece.labels
    mine = Report(
        precision=report.precision,
        fused=[entry for entry in report.fused if ": ".join(filter(None, (entry.where, entry.what))) in told],
        left=[entry for entry in report.left if ": ".join(filter(None, (entry.where, entry.op))) in told],
        notes=[str(place)],
    )
    if piece.calls:
        mine.notes.append(f"calls of torch's: {', '.join(piece.calls)}")
    mine.bytes_before = mine.bytes_after = sum(x.numel() * x.element_size() for x in piece.program.buffers())
    outputs = len(next(node for node in piece.program.graph.nodes if node.op == "output").args[0])
    return Optimized(
        piece.program,
        mine,
        whole.in_spec if first else pytree.tree_structure((tuple(range(len(piece.inputs))), {})),
        whole.out_spec if last else pytree.tree_structure(tuple(range(outputs))),
        whole.free if first else [[d for d, size in enumerate(spec.sizes) if size.of] for spec in piece.inputs],
        whole.example if first else [_shape(spec, free) for spec in piece.inputs],
        piece.planned,
    )


def _shape(spec: Spec, free: Sequence[int]) -> tuple[torch.dtype, list[int]]:
    return spec.dtype, [size.at(free) for size in spec.sizes]
