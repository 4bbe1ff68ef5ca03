"""`compress`: a model and a budget in, the first network that keeps it out, by what costs least."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pykernels.ops.errors import reason
from pykernels.optimized import Optimized
from pykernels.prune.entries import check_names, read_example
from pykernels.prune.surgery import refuse

from .checkpoint import Checkpoint, fingerprint
from .data import ENOUGH, Judge, Loader, hold_out, take
from .recipe import Recipe, check_recipe, recipe_of
from .report import Report
from .search import Options, Progress, Search, Wanted

__all__ = ["Compressed", "Interrupted", "Stopped", "compress"]

_STEPS = 1000


@dataclass(frozen=True)
class Compressed:
    """What `compress` yields.

    Attributes:
        network: on our kernels, for inference.
        model: what it was made of: an `nn.Module` of ordinary layers that trains.
        recipe: what was done, as plain data for JSON: ``pk.compress(model, (x,), recipe=recipe, ...)`` does it again.
    """

    network: Optimized
    model: nn.Module
    recipe: Recipe
    _report: Report

    def report(self) -> Report:
        """What was tried, with latency, quality and size of each, what was turned down, and a chart; printable."""
        return self._report


class Stopped(ValueError):
    """No network keeps the budget, or something failed after some were made.

    Attributes:
        result: the quickest that does not lose too much.
    """

    def __init__(self, message: str, result: Compressed) -> None:
        super().__init__(f"{message}. What was reached is kept in the error's `result`")
        self.result = result


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after some networks were made.

    Attributes:
        result: the quickest of them that does not lose too much.
    """

    def __init__(self, result: Compressed) -> None:
        super().__init__("what was reached is kept in `result`")
        self.result = result


def compress(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | torch.Tensor,
    *,
    train: Iterable[Any] | None = None,
    data: Iterable[Any] | None = None,
    validate: Callable[[Any], float] | None = None,
    budget: Mapping[str, float] | None = None,
    steps: int | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    labels: float = 0.0,
    freeze_norms: bool = False,
    keep: Iterable[str] = (),
    rounds: int = 4,
    recipe: Mapping[str, Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Make a network quicker until it keeps a budget, by what costs least: int8, precisions by step, fewer channels.

    The original in fp32 on our kernels is what latencies and drops are counted from. In turn are tried: the original
    in int8; where that loses too much, in the precisions that suit each step; pruned to what is missing and, with
    training data, distilled, in the same precision. The first that keeps the budget is the answer. Latencies are those
    of this machine's CPU, with torch's number of threads and inputs of the example's sizes. (docs/compress.md)

    Args:
        model: an fp32 network on the CPU, in any mode; it is not changed.
        example_inputs: positional inputs of one call; a lone tensor stands for a tuple of one.
        train: what students learn from: a loader of inputs, each a tensor or a tuple of inputs that a label may follow,
            of the example's sizes but for the batch. None: nothing is trained.
        data: inputs like those of production, read several times: channels are weighed on them, and ranges observed.
            None: the first 256 samples of `train`.
        validate: from a network, called as the model is, to its accuracy, the higher the better. None: the share of
            answers that have the original's largest class, on every fourth entry of the data, which nothing else uses;
            where answers are no classes ([N, C, ...]), 1 - |y - y0| / |y0|.
        budget: ``latency``: the part of the original's time that a call may take. ``drop``: how much lower
            `validate`, or what stands for it, may be. By default ``{"drop": 0.01}``. Without a latency it is the
            quickest that `rounds` find; without a drop nothing is too much.
        steps: of distillation, for each student; 1000.
        optimizer: from parameters to what trains them; AdamW with a learning rate of 1e-3. The rate rises for a
            twentieth of the steps, and falls to 0 by half a cosine.
        loss, labels, freeze_norms: as for `pykernels.distill`.
        keep: names of modules that go on making all their channels.
        rounds: how many students are made at most.
        recipe: do what an earlier call did, in place of a search, with the `train` and `data` that it needs.
        checkpoint: a folder that what is reached is written into; the same call goes on from there.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        ValueError: an argument does not fit: no data where some are needed, a loader that is empty or changes its
            shapes, a malformed budget or recipe, a checkpoint of another search, a model that cannot be copied and cut
            (see `pykernels.prune`) or of which nothing runs on our kernels.
        Stopped: the budget cannot be met, or something failed later on; its `result` is what was reached.
        Interrupted: a KeyboardInterrupt; its `result` is what was reached.
        NotExportable: torch.export cannot capture the model.
        ModuleNotFoundError: torch-pruning or highspy are not installed (the extra ``compress``).
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: an nn.Module is needed, not {type(model).__name__}")
    refuse(model)
    args = read_example(example_inputs)
    known = None if recipe is None else check_recipe(recipe)
    if known is not None and budget is not None:
        raise ValueError("budget: a recipe leaves nothing to search for; give one of them")
    wanted = Wanted.read(budget) if known is None else Wanted()
    options = _options(train, steps, optimizer, loss, labels, freeze_norms, keep, rounds)
    if validate is not None and not callable(validate):
        raise ValueError(f"validate: expected a function of a network, not {type(validate).__name__}")
    if train is not None and not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "model: none of its parameters is to be trained (requires_grad): leave train out, or thaw some"
        )
    if not isinstance(checkpoint, str | os.PathLike | None):
        raise ValueError(f"checkpoint: the path of a folder is needed, not {type(checkpoint).__name__}")
    _installed()
    taught = None if train is None else Loader(train, "train", args)
    fit, held, notes = _samples(taught, None if data is None else Loader(data, "data", args), validate is None)
    if known is not None and not fit and (known["precision"] == "int8" or isinstance(known["precision"], dict)):
        raise ValueError("data: the recipe's precision, int8, needs some: give data, or train")
    search = Search(
        model,
        args,
        taught,
        fit,
        lambda base: Judge(validate, base, args, held),
        wanted,
        options,
        Checkpoint(checkpoint, {} if checkpoint is None else _identity(model, args, wanted, options, known)),
        progress,
    )
    search.report.notes += notes
    try:
        search.run() if known is None else search.replay(known)
    except KeyboardInterrupt as stop:
        if search.found is None:
            raise
        raise Interrupted(_result(search)) from stop
    except Exception as error:  # the user's own code runs in there: model, loaders, validate
        if search.found is None:
            raise
        words = str(error) if isinstance(error, ValueError | TypeError) else reason(error)
        raise Stopped(words, _result(search)) from error
    found = _result(search)
    if known is None and not search.met:
        row = search.report.rows[search.report.chosen]
        raise Stopped(
            f"budget: no network that was made {wanted}; the nearest takes {row.latency:.3f} ({row.name})", found
        )
    return found


def _options(
    train: Any,
    steps: Any,
    optimizer: Any,
    loss: Any,
    labels: float,
    freeze_norms: bool,
    keep: Iterable[str],
    rounds: Any,
) -> Options:
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"steps: a whole number above 0 is needed, not {steps!r}")
    if type(rounds) is not int or rounds < 0:
        raise ValueError(f"rounds: a whole number is needed, not {rounds!r}")
    if isinstance(labels, bool) or not isinstance(labels, int | float):
        raise ValueError(f"labels: a weight from 0 to 1 is needed, not {labels!r}")
    if optimizer is not None and (isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer)):
        made = type(optimizer).__name__
        raise ValueError(f"optimizer: expected a function of parameters, as each student has its own, not {made}")
    if train is None:
        given = [n for n, v in (("steps", steps), ("optimizer", optimizer), ("loss", loss), ("labels", labels)) if v]
        if given:
            raise ValueError(f"{given[0]}: without train nothing is distilled")
    elif not 0 <= labels <= 1:
        raise ValueError(f"labels: a weight from 0 to 1 is needed, not {labels}")
    elif loss is not None and labels:
        raise ValueError("labels: a loss of your own gets the labels and weighs them itself")
    steps = 0 if train is None else steps or _STEPS
    return Options(steps, optimizer, loss, labels, freeze_norms, check_names(keep, "keep"), rounds)


def _samples(train: Loader | None, data: Loader | None, judged: bool) -> tuple[list[Any], list[Any], list[str]]:
    """Entries to fit to, entries to judge by where `judged`, and notes."""
    if data is not None:
        entries, source = take(data), "data"
    elif train is not None:
        entries, source = take(train, ENOUGH), "train"
    elif judged:
        raise ValueError("data: there is nothing to judge by: give data or train (unlabelled inputs do), or validate")
    else:
        return [], [], []
    if not judged:
        return entries, [], []
    fit, held = hold_out(entries, source)
    notes = ["answers are judged by inputs that students were trained on: give data apart from train, or validate"]
    return fit, held, notes if source == "train" else []


def _identity(
    model: nn.Module, args: tuple[Any, ...], wanted: Wanted, options: Options, recipe: Recipe | None
) -> dict[str, Any]:
    """What a checkpoint is for."""
    from pykernels.bench.machine import machine

    facts = machine()
    return {
        "model": fingerprint(model),
        "example_inputs": [f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else repr(x) for x in args],
        "budget": [wanted.latency, wanted.drop],
        "steps": options.steps,
        "labels": options.labels,
        "freeze_norms": options.freeze_norms,
        "keep": list(options.keep),
        "recipe": recipe,
        "machine": [facts.cpu, facts.isa, facts.threads],
    }


def _result(search: Search) -> Compressed:
    found = search.found
    assert found is not None
    recipe = recipe_of(found.student.recipe, found.student.steps, found.network.report().choice)
    return Compressed(found.network, found.student.model, recipe, search.conclude())


def _installed() -> None:
    """Said before hours of work, not after."""
    missing = [name for name in ("torch_pruning", "highspy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"compression needs {' and '.join(missing)}: pip install 'pykernels[compress]', or torch-pruning==1.6.1 "
            "(with --no-deps) and highspy by themselves"
        )
