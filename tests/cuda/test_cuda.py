"""How the CUDA implementations are registered, without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from pykernels.bench import machine
from pykernels.cuda import registry


def test_every_kernel_has_the_arguments_of_its_op() -> None:
    """Names, order and defaults: the dispatcher passes arguments by place and leaves out defaults."""
    import importlib
    import inspect

    for op, file in registry.KERNELS.items():
        launcher = getattr(importlib.import_module(f"pykernels.cuda.triton.{file}"), op)
        schema = getattr(torch.ops.pykernels, op).default._schema
        expected = [
            (a.name, a.default_value if a.has_default_value() else inspect.Parameter.empty) for a in schema.arguments
        ]
        parameters = inspect.signature(launcher).parameters.values()
        numbers = {torch.uint8: 0}  # a schema has the number of a dtype
        assert [(p.name, numbers.get(p.default, p.default)) for p in parameters] == expected, op


def test_without_triton_a_call_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("pykernels.cuda.triton"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not there
    with pytest.raises(RuntimeError, match=r"compress_decode on CUDA needs Triton .*: pip install 'pykernels\[gpu\]'"):
        registry.implementation("compress_decode")(torch.zeros(1), torch.zeros(1), torch.zeros(1), "int8", 32)


def test_doctor_counts_an_op_without_triton_as_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher knows an implementation, but it could not run."""
    library = torch.library.Library("pykernels", "IMPL")
    try:
        library.impl("compress_decode", registry.implementation("compress_decode"), "CUDA")
        for error, expected in ((None, True), ("no Triton", False)):
            monkeypatch.setattr(registry, "error", lambda error=error: error)
            support = {op.name: op.cuda for op in machine.op_support()}
            assert support["compress_decode"] is expected
            assert support["int8_mm"] is (expected and torch.version.cuda is not None)
    finally:
        library._destroy()
