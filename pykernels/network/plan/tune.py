"""Choose by timing how the layers of a plan are cut into tiles and tasks.

All layers are cut anew at once, by one candidate after another, and the whole network is timed, so that every layer
finds the caches as the others leave them. Each layer keeps what was best for it and for the step behind it, which reads
what it left in which core's cache. The result is timed against the plan as it was, and kept only if it is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from pykernels.network.plan.format import UNTUNED, Program, decode, encode
from pykernels.network.plan.planned import Planned, calls_of_plans
from pykernels.ops import names
from pykernels.ops.plan import describe_plan, profile_plan

__all__ = ["tune"]

Tiling = tuple[int, int, int]  # rows of a tile, tiles of a block, pieces of the rows; 0: as a count of steps finds best
_ROWS = (0, 3, 2)
_BLOCKS = (0, 1, 2, 4, 8, 16)
# What must be left of the time before a choice is taken over what counting finds, of a layer and of the whole.
_GAIN, _GAIN_OF_ALL = 0.97, 0.99


def tune(
    planned: Planned,
    inputs: Sequence[Any],
    rounds: int = 20,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Time the layers of all plans with these flat inputs and keep the best cut of each, in the plans.

    It holds for the isa in force and the number of threads set now; with others a plan cuts as if it was not tuned.
    Layers that run image by image with these inputs, each on one of several threads, are not cut, and left as they are.

    Args:
        rounds: calls that are timed for each candidate.
        progress: called as ``progress("tuning", done, total)``.
    """
    found = calls_of_plans(planned, inputs)
    candidates = list(_candidates(torch.get_num_threads()))
    total, done = len(found) * (rounds + 1), 0
    isa, threads = names.ISAS.index(torch.ops.pykernels._isa()) + 1, torch.get_num_threads()
    for name, (plan, given) in found.items():
        program = decode(plan)
        program.isa, program.threads = isa, threads
        rows = describe_plan(plan, planned.weights, given)["drivers"]
        uncut = {row["step"] for row in rows if row["by_image"] and threads > 1}
        layers = [i for i, r in enumerate(program.records) if r.kind in ("conv2d", "linear") and i not in uncut]
        trials = [_Trial(program, dict.fromkeys(layers, tiling), planned.weights, given) for tiling in candidates]
        for _ in range(rounds):
            if progress is not None:
                progress("tuning", done, total)
            done += 1
            for trial in trials:
                trial.time()
        steps = [trial.steps() for trial in trials]
        chosen = {}
        for layer in layers:
            taken = [times.get(layer, 0.0) + times.get(layer + 1, 0.0) for times in steps]
            best = min(range(len(candidates)), key=taken.__getitem__)
            chosen[layer] = candidates[best] if taken[best] < _GAIN * taken[0] else UNTUNED
        before, after = trials[0], _Trial(program, chosen, planned.weights, given)
        before.rounds.clear()
        for _ in range(2 * rounds):
            before.time()
            after.time()
        done += 1
        if sum(after.steps().values()) < _GAIN_OF_ALL * sum(before.steps().values()):
            planned.program._buffers[name] = after.plan
    if progress is not None:
        progress("tuning", total, total)


class _Trial:
    """A plan with its layers cut in a certain way, and the times it took."""

    def __init__(
        self, program: Program, tilings: Mapping[int, Tiling], weights: torch.Tensor, inputs: list[torch.Tensor]
    ) -> None:
        for layer, tiling in tilings.items():
            program.records[layer].numbers[-len(tiling) :] = tiling
        self.plan, self.weights, self.inputs = encode(program), weights, inputs
        self.drivers = [driver["step"] for driver in describe_plan(self.plan, weights, inputs)["drivers"]]
        self.rounds: list[torch.Tensor] = []
        profile_plan(self.plan, weights, inputs, 1)

    def time(self) -> None:
        """One call more."""
        self.rounds.append(profile_plan(self.plan, self.weights, self.inputs, 2)[1:])

    def steps(self) -> dict[int, float]:
        """Of each step, the median in nanoseconds."""
        found: dict[int, float] = {}
        for step, time in zip(self.drivers, torch.cat(self.rounds).median(0).values.tolist(), strict=True):
            found[step] = found.get(step, 0.0) + time
        return found


def _candidates(threads: int) -> Iterator[Tiling]:
    """What counting finds comes first."""
    splits = (0, 1, threads, 2 * threads, 4 * threads)
    yield UNTUNED
    for rows in _ROWS:
        for block in _BLOCKS:
            if (rows, block) != (0, 0):
                yield rows, block, 0
    for count in dict.fromkeys(splits[1:]):
        yield 0, 0, count
