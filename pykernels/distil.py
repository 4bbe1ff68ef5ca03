"""`distill`: a student learns to answer as a teacher does.

After Hinton et al., Distilling the Knowledge in a Neural Network, 2015; of hidden tensors Romero et al., FitNets, 2015.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from pykernels.graph.export import mode
from pykernels.network.devices import to_device
from pykernels.ops.errors import reason
from pykernels.prune.entries import check_loader, read_entry

__all__ = ["Features", "Stopped", "distill"]

Loss = Callable[[Any, Any, Any], torch.Tensor]
Progress = Callable[[str, int, int], None]


class Stopped(ValueError):
    """A step failed. The student is as the step before left it: weights, statistics of batch norms, optimizer.

    Attributes:
        losses: of the steps that were made.
    """

    def __init__(self, message: str, losses: list[float]) -> None:
        super().__init__(f"{message}; {len(losses)} steps were made and are kept")
        self.losses = losses


class Features(nn.Module):
    """The mean squared distance of what modules of the student and of the teacher give.

    Where the student's has fewer or more channels, a linear map of them (a 1x1 convolution) is learned beside, by an
    Adam of its own. Pass the same object to the next call of `distill` to go on with the same maps.

    Args:
        pairs: name of a module of the student -> name of one of the teacher. Each gives one tensor, [N, C, ...] or,
            where it has three dimensions, [N, T, C]; sizes other than C must agree.
        weight: of the mean of all distances in the loss.
    """

    def __init__(self, pairs: Mapping[str, str], weight: float = 1.0) -> None:
        super().__init__()
        if not pairs:
            raise ValueError("features: no pairs of modules are given")
        self.pairs, self.weight = dict(pairs), float(weight)
        self.projections = nn.ParameterDict()
        self._optimizer: torch.optim.Optimizer | None = None

    def forward(self, student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted distance, a scalar, of what the modules gave, by their names."""
        total = torch.zeros(())
        for ours, theirs in self.pairs.items():
            total = total.to(student[ours].device) + self._distance(ours, student[ours], teacher[theirs])
        return self.weight / len(self.pairs) * total

    def _distance(self, name: str, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        dim = 2 if x.dim() == 3 else 1
        sizes = [[s for d, s in enumerate(t.shape) if d != dim] for t in (x, target)]
        if x.dim() < 2 or sizes[0] != sizes[1]:
            raise ValueError(f"features: {name!r} gives {list(x.shape)}, the teacher's module {list(target.shape)}")
        before, after = x.shape[dim], target.shape[dim]
        if before != after:
            x = torch.tensordot(x.movedim(dim, -1), self._projection(name, before, after).to(x), 1).movedim(-1, dim)
        return F.mse_loss(x, target.to(x))

    def _projection(self, name: str, before: int, after: int) -> nn.Parameter:
        key = name.replace(".", "/")  # names of parameters have no dots
        if key not in self.projections:
            self.projections[key] = nn.Parameter(nn.init.orthogonal_(torch.empty(before, after)))
            self._optimizer = None
        found: nn.Parameter = self.projections[key]
        if found.shape != (before, after):
            raise ValueError(f"features: the map of {name!r} was learned for {list(found.shape)} channels")
        return found

    def step(self) -> None:
        """Learn the maps from the gradients that they have."""
        if not len(self.projections):
            return
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.projections.parameters(), lr=1e-3)
        self._optimizer.step()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    steps: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    temperature: float = 4.0,
    labels: float = 0.0,
    features: Features | Mapping[str, str] | None = None,
    loss: Loss | None = None,
    freeze_norms: bool = False,
    inputs: int = 1,
    progress: Progress | None = None,
) -> list[float]:
    """Train `student` in place for `steps` batches to answer as `teacher` does.

    The loss is the Kullback-Leibler divergence of the student's classes from the teacher's, both softened by
    `temperature`, times its square, summed over classes and positions and averaged over the batch. Classes lie in
    dimension 1 of [N, C] and [N, C, H, W], in the last one of [N, T, C].

    To go on later, keep the optimizer (and the scheduler, and `Features`) and call again with it.

    Args:
        student: any module that trains: pruned, with swapped modules, a graph of `prepare_qat`. It is in training for
            the time of the call, a graph as it was left by `train_mode`.
        teacher: called in evaluation and in inference mode; a network of `pykernels.optimize` serves.
        loader: yields inputs, each a tensor or a tuple of `inputs` tensors that a label may follow; read again from the
            start when it ends.
        steps: how many batches.
        optimizer: over the student's parameters; None: AdamW with a learning rate of 3e-4.
        scheduler: of learning rates, stepped after each batch.
        temperature: above 0.
        labels: from 0 to 1: the weight of the cross entropy with labels, against that of the teacher's answers.
        features: distances of hidden tensors, added to the loss.
        loss: called as ``loss(answer, teacher's answer, label or None)``, gives a scalar; in place of divergence and
            labels.
        freeze_norms: batch norms normalize by their statistics, which stay as they are, and not by the batch's: of few
            data, or small batches, these mislead.
        inputs: how many inputs a call has.
        progress: called as ``progress("distilling", done, steps)``.

    Returns:
        The loss of each step.

    Raises:
        ValueError: an argument does not fit, or `loader` is empty.
        Stopped: a step failed: the loader ended and cannot be read again, an entry or an answer does not fit, a loss
            or gradients are not finite. What was reached is kept.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"steps: a whole number above 0 is needed, not {steps!r}")
    for name, module in (("student", student), ("teacher", teacher)):
        if not isinstance(module, nn.Module):
            raise ValueError(f"{name}: an nn.Module is needed, not {type(module).__name__}")
    check_loader(loader, "loader")
    if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise ValueError(f"temperature: a number above 0 is needed, not {temperature!r}")
    if not isinstance(labels, int | float) or not 0 <= labels <= 1:
        raise ValueError(f"labels: a weight from 0 to 1 is needed, not {labels!r}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError("optimizer: an optimizer over the student's parameters is needed, not what makes one")
    if loss is not None and not callable(loss):
        raise ValueError(f"loss: expected a function of two answers and a label, not {type(loss).__name__}")
    if loss is not None and labels:
        raise ValueError("labels: a loss of your own gets the labels and weighs them itself")
    if set(student.modules()) & set(teacher.modules()):
        raise ValueError("teacher: it shares modules with the student, so it would change with it: give a copy")
    trained = [p for p in student.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("student: none of its parameters is to be trained (requires_grad)")
    if features is not None and not isinstance(features, Features | Mapping):
        raise ValueError(f"features: a dictionary of names of modules is needed, not {type(features).__name__}")
    if features is not None and not isinstance(features, Features):
        features = Features(features)
    optimizer = optimizer or torch.optim.AdamW(trained, lr=3e-4)
    objective = loss or _softened(temperature, labels)
    losses: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(mode(student, True))
        stack.enter_context(mode(teacher, False))
        if freeze_norms:
            for module in student.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.training = False
        ours = stack.enter_context(_outputs(student, features.pairs.keys() if features else (), "student"))
        theirs = stack.enter_context(_outputs(teacher, features.pairs.values() if features else (), "teacher"))
        for number, entry in enumerate(_endless(loader, steps, losses)):
            buffers = [(buffer, buffer.clone()) for buffer in student.buffers()]
            _clear(optimizer, student, features)
            try:
                args, label = read_entry(entry, inputs, number, "loader")
                total = _loss(student, teacher, args, label, objective, features, ours, theirs)
                total.backward()
                norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
                if not norm.isfinite():
                    raise ValueError("the gradients are not finite")
            except Exception as error:  # both models' own code runs in there
                with torch.no_grad():
                    for buffer, before in buffers:
                        buffer.copy_(before)
                _clear(optimizer, student, features)
                shapes = [list(x.shape) for x in pytree.tree_leaves(entry) if isinstance(x, torch.Tensor)]
                raise Stopped(f"loader: entry {number}, of shapes {shapes}: {reason(error)}", losses) from error
            optimizer.step()
            if features is not None:
                features.step()
            if scheduler is not None:
                scheduler.step()
            losses.append(float(total.detach()))
            if progress is not None:
                progress("distilling", len(losses), steps)
    _clear(optimizer, student, features)
    return losses


def _clear(optimizer: torch.optim.Optimizer, student: nn.Module, features: Features | None) -> None:
    """No gradients, of what the optimizer leaves alone neither."""
    optimizer.zero_grad()
    student.zero_grad()
    if features is not None:
        features.zero_grad()


def _endless(loader: Iterable[Any], steps: int, losses: list[float]) -> Iterator[Any]:
    """So many entries, from the start again when they end."""
    made = 0
    while made < steps:
        before = made
        for entry in loader:
            yield entry
            made += 1
            if made == steps:
                return
        if made == 0:
            raise ValueError("loader: it is empty")
        if made == before:
            raise Stopped("loader: it ended and cannot be read again: give a loader or a list, no iterator", losses)


def _loss(
    student: nn.Module,
    teacher: nn.Module,
    args: tuple[Any, ...],
    label: Any,
    objective: Loss,
    features: Features | None,
    ours: dict[str, torch.Tensor],
    theirs: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The loss of one batch, finite."""
    device = next(student.parameters()).device
    home = next((t.device for t in (*teacher.parameters(), *teacher.buffers())), device)
    with torch.inference_mode():
        target = teacher(*to_device(args, home))
    # Copies: autograd may not keep what was made in inference mode.
    target, hidden = pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, (target, dict(theirs)))
    target, hidden, label, args = to_device((target, hidden, label, args), device)
    with torch.enable_grad():
        total = objective(student(*args), target, label)
        if features is not None:
            total = total + features(ours, hidden)
    if not isinstance(total, torch.Tensor) or total.dim():
        raise ValueError("loss: it must give a scalar tensor")
    if not total.isfinite():
        raise ValueError(f"the loss is {float(total.detach())}")
    return total


def _softened(temperature: float, labels: float) -> Loss:
    def divergence(answer: Any, target: Any, label: Any) -> torch.Tensor:
        if not isinstance(answer, torch.Tensor) or not isinstance(target, torch.Tensor):
            raise ValueError("student and teacher must give one tensor each; for others give a loss")
        if answer.shape != target.shape:
            raise ValueError(f"the student answers {list(answer.shape)}, the teacher {list(target.shape)}")
        dim = -1 if answer.dim() == 3 else 1
        given = F.log_softmax(answer / temperature, dim)
        wanted = F.log_softmax(target.to(answer) / temperature, dim)
        total = F.kl_div(given, wanted, reduction="batchmean", log_target=True) * temperature**2
        if not labels:
            return total
        if label is None:
            raise ValueError("labels: the entry has no label")
        classes = answer.movedim(dim, 1)
        return (1 - labels) * total + labels * F.cross_entropy(classes, label)

    return divergence


@contextmanager
def _outputs(model: nn.Module, names: Iterable[str], whose: str) -> Iterator[dict[str, torch.Tensor]]:
    """What modules gave in the last call, by their names.

    Raises:
        ValueError: there is no such module.
    """
    found: dict[str, torch.Tensor] = {}
    modules, handles = dict(model.named_modules()), []

    def remember(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, given, output: found.__setitem__(name, output)

    try:
        for name in dict.fromkeys(names):
            if name not in modules:
                raise ValueError(f"features: the {whose} has no module {name!r}")
            handles.append(modules[name].register_forward_hook(remember(name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()
