"""Ops on CPU tensors done by their CUDA launchers, interpreted or emulated: a GPU's answer where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pykernels.cuda import registry


class Launchers(TorchDispatchMode):
    """While it is entered, every op of the library that has a launcher runs it. `calls` counts them by name.

    `interpreter`: an `Interpreter`, or an `EmulatedGPU`.
    """

    def __init__(self, interpreter: Any) -> None:
        super().__init__()
        self.interpreter = interpreter
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "pykernels" or name not in registry.KERNELS:
            return func(*args, **(kwargs or {}))
        self.calls[name] += 1
        named = dict(kwargs or {})
        if not func._schema.is_mutable:
            return self.interpreter.answer(registry.KERNELS[name], name, *args, **named)
        rest = func._schema.arguments[len(args) :]
        arguments = [*args, *(named.get(argument.name, argument.default_value) for argument in rest)]
        left = self.interpreter(registry.KERNELS[name], name, *arguments)
        for argument, given, written in zip(func._schema.arguments, arguments, left, strict=True):
            if argument.is_write and given is not None:
                given.copy_(written)
        return None


def refuses_as_the_cpu_does(call: Callable[[], object], message: str) -> None:
    """With this message, from a launcher (the mode is entered) and from the CPU's op alike."""
    with pytest.raises(RuntimeError, match=message) as here:
        call()
    with _disable_current_modes(), pytest.raises(RuntimeError) as on_cpu:
        call()
    assert str(here.value).startswith("pykernels: ")
    assert str(on_cpu.value).splitlines()[0].endswith(str(here.value))
