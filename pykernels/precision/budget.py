"""How much of the float network's answers may be lost: what was asked for, and what a network keeps of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch.utils import _pytree as pytree

__all__ = ["Budget", "Kept", "Reference"]

_NAMES = ("error", "agreement", "drop")
_DEFAULT = {"error": 0.1}


@dataclass(frozen=True)
class Budget:
    """What was asked for; None where nothing was.

    Attributes:
        error: at most |y - y0| / |y0| over all float outputs y, y0 being the float network's.
        agreement: at least this share of answers whose largest class is the float network's.
        drop: at most so much lower may `validate` be than for the float network.
        validate: from a network to its accuracy, the higher the better.
    """

    error: float | None = None
    agreement: float | None = None
    drop: float | None = None
    validate: Callable[[Any], float] | None = None

    @classmethod
    def read(cls, budget: Mapping[str, Any] | None, validate: Callable[[Any], float] | None) -> Budget:
        """From the arguments of `pykernels.optimize`.

        Raises:
            ValueError: they are malformed, or nothing could hold them.
        """
        given = _DEFAULT if budget is None and validate is None else budget
        if not isinstance(given, Mapping) or not given or not set(given) <= set(_NAMES):
            raise ValueError(f"budget: expected a dictionary with some of {', '.join(_NAMES)}, not {given!r}")
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"budget: {name!r} is {value!r}, not a number")
        if given.get("error", 1.0) <= 0:
            raise ValueError(f"budget: 'error' is {given['error']}; it must be above 0")
        if not 0 < given.get("agreement", 1.0) <= 1:
            raise ValueError(f"budget: 'agreement' is {given['agreement']}; it is a share, above 0 and at most 1")
        if given.get("drop", 0.0) < 0:
            raise ValueError(f"budget: 'drop' is {given['drop']}; it must not be negative")
        if "drop" in given and len(given) > 1:
            raise ValueError("budget: 'drop' stands alone, without 'error' and 'agreement'")
        if ("drop" in given) != (validate is not None):
            raise ValueError("validate: it is needed for a budget of 'drop', and for no other")
        if validate is not None and not callable(validate):
            raise ValueError(f"validate: expected a function of a network, not {type(validate).__name__}")
        return cls(**{name: float(value) for name, value in given.items()}, validate=validate)

    def __str__(self) -> str:
        words = {"error": "error at most", "agreement": "agreement at least", "drop": "accuracy lower by at most"}
        given = [(words[name], getattr(self, name)) for name in _NAMES if getattr(self, name) is not None]
        return ", ".join(f"{text} {value:g}" for text, value in given)


@dataclass(frozen=True)
class Kept:
    """What a network keeps of the float one; None where it was not asked for."""

    error: float
    agreement: float | None = None
    drop: float | None = None

    def __str__(self) -> str:
        parts = [f"error {self.error:.4f}"]
        parts += [] if self.agreement is None else [f"agreement {self.agreement:.4f}"]
        parts += [] if self.drop is None else [f"accuracy lower by {self.drop:.4f}"]
        return ", ".join(parts)


class Reference:
    """The float network's answers to the calibration inputs, against which others are held.

    Args:
        network: the float network, called as the model is.
        samples: flat inputs of calls.
        in_spec: how these make up arguments.

    Raises:
        ValueError: the answers are not of a kind that the budget is about, or `validate` yields no number.
    """

    def __init__(self, network: Any, samples: Sequence[tuple[Any, ...]], in_spec: pytree.TreeSpec, budget: Budget):
        self.samples, self.in_spec, self.budget = samples, in_spec, budget
        self.answers = [self._answers(network, sample) for sample in samples]
        self.square = sum(float(a.double().square().sum()) for answer in self.answers for a in answer)
        if not self.square > 0 or not math.isfinite(self.square):
            raise ValueError(
                "budget: no error is relative to the float network's answers: they are zero, or not finite"
            )
        if budget.agreement is not None and any(not answer or answer[0].dim() < 2 for answer in self.answers):
            raise ValueError("budget: 'agreement' needs a first output of classes, [N, C, ...]")
        self.accuracy = None if budget.validate is None else self._accuracy(network)

    def keeps(self, network: Any) -> Kept:
        """What a network keeps."""
        wrong, same, count = 0.0, 0, 0
        for sample, exact in zip(self.samples, self.answers, strict=True):
            found = self._answers(network, sample)
            wrong += sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
            if self.budget.agreement is not None:
                equal = found[0].argmax(1) == exact[0].argmax(1)
                same, count = same + int(equal.sum()), count + equal.numel()
        error = math.sqrt(wrong / self.square)
        agreement = None if self.budget.agreement is None else same / count
        return Kept(error, agreement, None if self.accuracy is None else self.accuracy - self._accuracy(network))

    def holds(self, kept: Kept) -> bool:
        """Whether that is within the budget."""
        budget = self.budget
        if budget.error is not None and not kept.error <= budget.error:  # NaN is not
            return False
        if budget.agreement is not None and (kept.agreement is None or kept.agreement < budget.agreement):
            return False
        return budget.drop is None or (kept.drop is not None and kept.drop <= budget.drop)

    def _answers(self, network: Any, sample: tuple[Any, ...]) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_unflatten(list(sample), self.in_spec)
        with torch.no_grad():
            leaves = pytree.tree_leaves(network(*args, **kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]

    def _accuracy(self, network: Any) -> float:
        assert self.budget.validate is not None
        found = self.budget.validate(network)
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise ValueError(f"validate: it returned {type(found).__name__}, not a number") from None
        if not math.isfinite(value):
            raise ValueError(f"validate: it returned {value}")
        return value
