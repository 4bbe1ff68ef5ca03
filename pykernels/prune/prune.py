"""`prune`: a model in, a copy of it with fewer channels and blocks out, as quick as was asked for."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pykernels.graph.export import mode
from pykernels.ops.dtypes import STORED
from pykernels.ops.errors import reason

from .blocks import residual_blocks
from .coupling import Coupling, Group, couple, width
from .eliminate import eliminate, steps
from .entries import check_names, check_repeatable, read_entry, read_example
from .importance import Importance, Loss, magnitude, taylor
from .knapsack import Choice, State, Unreachable, solve
from .latency import Latency, compare, lower
from .recipe import Recipe, check_recipe, recipe_of
from .reconstruct import reconstruct
from .report import Report, Row
from .surgery import Mismatch, check, cut, refuse
from .tracing import is_frozen_norm
from .trial import Trial, held_out

__all__ = ["Pruned", "prune"]

Progress = Callable[[str, int, int], None]
_PRECISIONS = ("fp32", *STORED, "int8")
_ROUNDS = 4  # networks that are made and measured until one takes what it may
_REFINEMENTS = 6  # choices by times of which some were interpolated, until one is quick enough by its own
_SLACK = 1.02  # of the budget: what a measurement may lie above it


@dataclass(frozen=True)
class Pruned:
    """What `prune` yields.

    Attributes:
        model: a pruned copy of the model, an `nn.Module` that trains as the model does, in the same mode.
        recipe: what was removed, as plain data for JSON: ``pk.prune(model, (x,), recipe=recipe)`` does it again.
    """

    model: nn.Module
    recipe: Recipe
    _report: Report

    def report(self) -> Report:
        """What was removed from each layer, what was left and why, latencies predicted and measured; printable."""
        return self._report


def prune(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | torch.Tensor,
    latency: float | None = None,
    data: Iterable[Any] | None = None,
    *,
    precision: str = "int8",
    importance: str = "taylor",
    loss: Loss | None = None,
    keep: Iterable[str] = (),
    blocks: bool = True,
    recipe: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Remove the channels and residual blocks that matter least, until a call takes `latency` of its time.

    Latencies are those of our kernels on this machine, with torch's number of threads and inputs of the example's
    sizes. Widths become multiples of 16, as wide as the kernels' panels. The pruned model answers as the model does
    when nobody reads the removed channels, to 1e-5 of the answer's norm on the example and on noise; that is checked
    before weights make up for what was removed, and the statistics of batch norms follow, by `data`. The model itself
    is not changed. (docs/compress.md)

    Args:
        model: an fp32 network on the CPU, in any mode.
        example_inputs: positional inputs of one call; a lone tensor stands for a tuple of one.
        latency: what a call may take, of what it takes now: between 0 and 1.
        data: an iterable that can be read twice (a loader, a list) of inputs, each a tensor or a tuple of inputs that a
            label may follow. Channels are weighed on it, weights fitted and batch norms adjusted. What is lost is
            measured on every fourth entry, which weights are not fitted to until it is decided what goes.
        precision: what the network will run in: ``fp32``, ``bf16``, ``fp16`` or ``int8``.
        importance: ``taylor`` (gradients over `data`: of the loss where there are labels, else of the outputs) or
            ``magnitude`` (of weights; needs no data, and drops no blocks).
        loss: called as ``loss(answer, label)``. Without it integer labels of classes mean cross entropy.
        keep: names of modules that go on making all their channels.
        blocks: whether residual blocks may be dropped.
        recipe: do what an earlier call did, in place of `latency`; nothing is measured.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        ValueError: an argument does not fit; the model has hooks, parametrizations, 16-bit weights, or is not on the
            CPU; its forward has sizes written into it, so that it does not run with fewer channels (the layers are
            named); or the budget cannot be met (the least that can is named).
        TypeError: an entry of `data` does not fit.
        NotExportable: torch.export cannot capture the model.
        ModuleNotFoundError: torch-pruning is not installed (the extra ``compress``).
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: an nn.Module is needed, not {type(model).__name__}")
    args = read_example(example_inputs)
    if (latency is None) == (recipe is None):
        raise ValueError("latency: give a latency to reach, or a recipe to follow, not both")
    refuse(model)
    if data is not None:
        check_repeatable(data, "data")
    if recipe is not None:
        checked = check_recipe(model, recipe)
        return _finish(model, args, checked, data, Report())
    if precision not in _PRECISIONS:
        raise ValueError(f"precision: {precision!r} is none of {', '.join(_PRECISIONS)}")
    if importance not in ("taylor", "magnitude"):
        raise ValueError(f"importance: {importance!r} is neither 'taylor' nor 'magnitude'")
    if importance == "taylor" and data is None:
        raise ValueError("data: importance 'taylor' needs some; give a loader, or importance='magnitude'")
    if not isinstance(latency, int | float) or not 0 < latency < 1:
        raise ValueError(f"latency: a part of today's is needed, between 0 and 1, not {latency!r}")
    if loss is not None and not callable(loss):
        raise ValueError(f"loss: expected a function of answer and label, not {type(loss).__name__}")
    keep = check_names(keep, "keep")
    report = Report(precision=precision, budget=latency)
    coupling = couple(copy.deepcopy(model), args, keep)
    coupling = _tried(model, args, coupling, progress)
    droppable: list[str] = []
    if blocks and importance == "taylor":
        droppable = _droppable(model, args, keep)
    if not coupling.groups and not droppable:
        why = _listed(coupling.left) or "it has no layer whose channels another reads"
        raise ValueError(f"model: nothing of it can be pruned: {why}")
    report.left = coupling.left
    if importance == "taylor":
        assert data is not None
        weighed = taylor(copy.deepcopy(model), coupling.groups, data, len(args), loss, progress)
        report.importance = f"{weighed.objective}, over {weighed.batches} batch{'es' * (weighed.batches != 1)}"
        order, lost, dropped = _lost(model, coupling.groups, droppable, weighed, data, len(args), loss, progress)
    else:
        weighed = magnitude(model, coupling.groups)
        report.importance = weighed.objective
        (order, lost), dropped = _by_units(coupling.groups, weighed), {}
    choices = [_choice(group, lost[group.name], dropped) for group in coupling.groups]
    found = _search(model, args, coupling, dropped, choices, order, latency, report, progress)
    return _finish(model, args, found, data, report)


def _tried(model: nn.Module, args: tuple[Any, ...], coupling: Coupling, progress: Progress | None) -> Coupling:
    """The groups that can be cut: half of the channels of all are taken away; where that fails, of half of the groups,
    and so on, down to those that fail alone.

    Raises:
        ValueError: the model does not run, or answers otherwise, without channels that it does not return.
    """
    generator = random.Random(0)
    halves = {
        group.name: sorted(generator.sample(range(len(group.units)), len(group.units) // 2))
        for group in coupling.groups
    }

    def attempt(groups: Sequence[Group]) -> None:
        recipe = recipe_of(model, groups, halves)
        check(model, cut(model, recipe), recipe, args)

    try:
        attempt(coupling.groups)
        return coupling
    except Mismatch as mismatch:
        together = mismatch
    try:
        attempt([])
    except Mismatch as mismatch:
        raise ValueError(
            f"model: it cannot be checked, since with nothing removed {mismatch}. Its answer in evaluation must be "
            "finite, and the same each time: is there a functional.dropout without training=self.training?"
        ) from None
    fine: list[Group] = []
    left, wrong = dict(coupling.left), {}
    pending = _halved(coupling.groups)
    while pending:
        groups = pending.pop()
        try:
            attempt(groups)
            fine += groups
        except Mismatch as mismatch:
            if len(groups) > 1:
                pending += _halved(groups)
            elif mismatch.returned or mismatch.training:
                left[groups[0].name] = str(mismatch)
            else:
                wrong[groups[0].name] = str(mismatch)
        if progress is not None:
            undecided = sum(map(len, pending))
            progress("trying layers", len(coupling.groups) - undecided, len(coupling.groups))
    if wrong:
        names = [name.partition("#")[0] for name in wrong]  # of a part of a layer's channels, the layer
        raise ValueError(
            f"model: channels cannot be removed from {_listed(wrong)}. Its forward has sizes written into it, or does "
            f"what torch-pruning cannot follow. keep={list(dict.fromkeys(names))} leaves these layers as they are"
        )
    if len(fine) == len(coupling.groups):
        raise ValueError(f"model: its layers can be cut one by one but not together: {together}")
    attempt(fine)
    return Coupling(fine, left)


def _halved(groups: Sequence[Group]) -> list[Sequence[Group]]:
    """Two halves, the first one last; of one group that alone."""
    middle = len(groups) // 2
    return [half for half in (groups[middle:], groups[:middle]) if half]


def _droppable(model: nn.Module, args: tuple[Any, ...], keep: Iterable[str]) -> list[str]:
    """Residual blocks without which the model runs."""
    kept = tuple(keep)
    found = [
        block
        for block in residual_blocks(copy.deepcopy(model), args)
        if not any(block == k or block.startswith(f"{k}.") or k.startswith(f"{block}.") for k in kept)
    ]

    def runs(blocks: list[str]) -> bool:
        recipe = recipe_of(model, [], {}, blocks)
        try:
            check(model, cut(model, recipe), recipe, args)
        except Mismatch:  # the model looks into them
            return False
        return True

    return found if runs(found) else [block for block in found if runs([block])]


def _search(
    model: nn.Module,
    args: tuple[Any, ...],
    coupling: Coupling,
    dropped: Mapping[str, float],
    choices: Sequence[Choice],
    order: Mapping[str, Sequence[int]],
    latency: float,
    report: Report,
    progress: Progress | None,
) -> Recipe:
    """The recipe of least loss whose network, made and measured, is quick enough."""
    original = lower(model, args, report.precision or "fp32")
    predict = Latency(model, original, coupling.groups)
    predict.measure(progress)
    whole = predict(predict.full)
    target, best, made = latency, None, 0
    for number in range(1, _ROUNDS + 1):
        try:
            state = _solved(choices, dropped, predict, target * whole)
        except Unreachable as error:
            if best is not None:  # another budget was reached
                break
            raise ValueError(
                f"latency: {latency:.3f} cannot be reached: with all that can be removed a call takes "
                f"{error.least / whole:.3f} of today's. Left as it is: {_listed(coupling.left) or 'nothing'}"
            ) from None
        made = number
        kept = {name: sorted(order[name][:count]) for name, count in state.widths.items()}
        recipe = recipe_of(model, coupling.groups, kept, sorted(state.dropped))
        smaller = lower(cut(model, recipe), args, report.precision or "fp32")
        before, after = compare(original, smaller)
        if after > _SLACK * latency * before:  # was the machine disturbed?
            again = compare(original, smaller)
            before, after = min(before, again[0]), min(after, again[1])
        if progress is not None:
            progress("measuring networks", number, _ROUNDS)
        part = after / before
        over = part > _SLACK * latency
        # of those that are quick enough the slowest is kept, of others the quickest
        if best is None or (over, part if over else -part) < best[0]:
            best = (over, part if over else -part), recipe
            report.predicted, report.before, report.after = predict(state) / whole, before, after
        if latency / _SLACK <= part <= _SLACK * latency:
            break
        target *= min(max(latency / part, 0.8), 1.1)
    assert best is not None
    (missed, found), recipe = best
    if missed:
        report.notes.append(
            f"the budget of {latency:.3f} was missed: the quickest of {made} networks takes {found:.3f}"
        )
        warnings.warn(f"latency: {report.notes[-1]}", UserWarning, stacklevel=3)
    return recipe


def _by_units(groups: Sequence[Group], weighed: Importance) -> tuple[dict[str, list[int]], dict[str, dict[int, float]]]:
    """Of each group its units, those that stay longest first, and by width the sum of what the others are worth."""
    order, lost = {}, {}
    for group in groups:
        worth, places = weighed.units[group.name].sort(descending=True)
        order[group.name] = places.tolist()
        lost[group.name] = {count: float(worth[count:].sum()) for count in group.widths}
    return order, lost


def _lost(
    model: nn.Module,
    groups: Sequence[Group],
    blocks: Sequence[str],
    weighed: Importance,
    data: Iterable[Any],
    inputs: int,
    loss: Loss | None,
    progress: Progress | None,
) -> tuple[dict[str, list[int]], dict[str, dict[int, float]], dict[str, float]]:
    """As `_by_units`, by what the objective loses on entries that nothing is fitted to; and what it loses with blocks.

    Where weights will not be fitted, the units' worth is in proportion what is measured at three quarters of them.
    """
    rest, held = held_out(data, weighed.batches)
    trial = Trial(copy.deepcopy(model), held, inputs, loss)
    order, lost = _by_units(groups, weighed)
    found = eliminate(model, groups, weighed.curvature, rest, held, inputs, trial, progress)
    for group in groups:
        name = group.name
        if name in found:
            order[name], lost[name] = found[name]
        else:
            width = steps(group)[-1]
            measured = trial(cut(model, recipe_of(model, [group], {name: order[name][:width]})))
            scale = measured / max(lost[name][width], 1e-30)
            lost[name] = {count: scale * worth for count, worth in lost[name].items()}
    dropped = {block: trial(cut(model, recipe_of(model, [], {}, [block]))) for block in blocks}
    return order, lost, dropped


def _choice(group: Group, lost: Mapping[int, float], blocks: Iterable[str]) -> Choice:
    """The widths of a group, with what is lost at each."""
    inside = [b for b in blocks if all(layer.startswith(f"{b}.") for layer, _ in group.axes)]
    return Choice(group.name, lost, inside[0] if inside else None)


def _solved(
    choices: Sequence[Choice],
    dropped: Mapping[str, float],
    predict: Latency,
    budget: float,
) -> State:
    """The state of least loss within the budget, by times of its own layers.

    Raises:
        Unreachable: there is none.
    """
    best: tuple[float, State] | None = None
    for _ in range(_REFINEMENTS):
        try:
            state = solve(choices, dropped, predict, budget)
        except Unreachable:
            if best is None:
                raise
            break  # it is nearly quick enough
        predict.refine(state)  # which changes what other widths seem to take, too
        over = max(predict(state) / budget, 1.0)
        if best is None or over < best[0]:
            best = over, state
        if over <= 1.005:
            return state
    assert best is not None
    return best[1]


def _finish(
    model: nn.Module, args: tuple[Any, ...], recipe: Recipe, data: Iterable[Any] | None, report: Report
) -> Pruned:
    """The pruned copy, checked, its weights and batch norms adjusted."""
    pruned = cut(model, recipe)
    try:
        check(model, pruned, recipe, args)
    except Mismatch as mismatch:
        raise ValueError(f"model: {mismatch}") from None
    if data is not None:
        report.fitted = reconstruct(model, pruned, recipe, data, len(args))
        _estimate_batch_norms(model, pruned, recipe, data, len(args))
    for name, module in model.named_modules():
        axes = recipe["layers"].get(name, {})
        if axes and not isinstance(module, nn.modules.batchnorm._NormBase) and not is_frozen_norm(module):
            smaller = pruned.get_submodule(name)
            reads, makes = ((width(module, axis), width(smaller, axis)) for axis in ("in", "out"))
            report.rows.append(Row(name, reads, makes))
    report.blocks = list(recipe["blocks"])
    report.operations = _operations(model, args), _operations(pruned, args)
    report.weights = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in pruned.parameters())
    return Pruned(pruned, recipe, report)


def _estimate_batch_norms(
    model: nn.Module, pruned: nn.Module, recipe: Recipe, data: Iterable[Any], inputs: int
) -> None:
    """Move the statistics of the pruned model's batch norms by what pruning has changed of them over `data`.

    Both models are measured on the same data; the difference of means and the ratio of variances are applied. So few
    data suffice, whose plain statistics would be far from those of training.
    """
    if not _norms(pruned):
        return
    before, after = _statistics(model, data, inputs), _statistics(pruned, data, inputs)
    with torch.no_grad():
        for name, norm in _norms(pruned).items():
            mean, variance = before[name]
            channels = recipe["layers"].get(name, {}).get("out")
            if channels is not None:
                mean, variance = mean[channels["kept"]], variance[channels["kept"]]
            norm.running_mean += after[name][0] - mean
            norm.running_var *= (after[name][1] + norm.eps) / (variance + norm.eps)


def _norms(model: nn.Module) -> dict[str, Any]:
    kind = nn.modules.batchnorm._BatchNorm
    return {n: m for n, m in model.named_modules() if isinstance(m, kind) and m.track_running_stats}


def _statistics(model: nn.Module, data: Iterable[Any], inputs: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Means and variances of what reaches each batch norm, each normalizing by its batch; all else is in evaluation."""
    measured = copy.deepcopy(model)
    norms = _norms(measured)
    with mode(measured, False), torch.no_grad():
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True  # the plain average
        for number, entry in enumerate(data):
            args, _ = read_entry(entry, inputs, number)
            try:
                measured(*args)
            except Exception as error:  # mostly a batch of one sample, at a norm behind a global pool
                raise ValueError(f"data: entry {number} cannot serve batch norms: {reason(error)}") from error
    return {name: (norm.running_mean, norm.running_var) for name, norm in norms.items()}


def _operations(model: nn.Module, args: tuple[Any, ...]) -> float:
    """Multiplications and additions of the products of one call."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    counted = copy.deepcopy(model)
    with mode(counted, False), torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(*args)
    return float(counter.get_total_flops())


def _listed(reasons: Mapping[str, str]) -> str:
    """The first of them, for a message."""
    shown = [f"{name!r} ({why})" for name, why in list(reasons.items())[:8]]
    return "; ".join([*shown, f"and {len(reasons) - 8} more"] if len(reasons) > 8 else shown)
