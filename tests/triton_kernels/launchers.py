"""Ops on CPU tensors done by their CUDA launchers, in Triton's interpreter: a GPU's answer where there is none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from interpreter import Interpreter
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pykernels import _cuda


class Launchers(TorchDispatchMode):
    """While it is entered, every op of the library that has a launcher runs it. `calls` counts them by name."""

    def __init__(self, interpreter: Interpreter) -> None:
        super().__init__()
        self.interpreter = interpreter
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace != "pykernels" or name not in _cuda.KERNELS:
            return func(*args, **(kwargs or {}))
        self.calls[name] += 1
        arguments = list(args)
        for argument in func._schema.arguments[len(args) :]:
            arguments.append((kwargs or {}).get(argument.name, argument.default_value))
        return self.interpreter.answer(_cuda.KERNELS[name], name, *arguments)


def refuses_as_the_cpu_does(call: Callable[[], object], message: str) -> None:
    """With this message, from a launcher (the mode is entered) and from the CPU's op alike."""
    with pytest.raises(RuntimeError, match=message) as here:
        call()
    with _disable_current_modes(), pytest.raises(RuntimeError) as on_cpu:
        call()
    assert str(here.value).startswith("pykernels: ")
    assert str(on_cpu.value).splitlines()[0].endswith(str(here.value))
