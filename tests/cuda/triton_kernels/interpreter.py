"""Runs launchers of pykernels.cuda.triton on CPU tensors in Triton's interpreter.

Whether a kernel is interpreted is settled when Triton is imported, for the whole process; so this happens in one of its
own, and the environment of the other tests stays as it is.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch

from pykernels.reference.dot import fma


def begin() -> None:
    """In the process that interprets."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    from triton.runtime import interpreter

    # Left to itself, the interpreter passes over assertions, even those of kernels compiled with them.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True, sanitize_overflow=False)
    # Its own rounds twice.
    interpreter.InterpreterBuilder.create_fma = lambda _, x, y, z: interpreter.TensorHandle(
        fma(*(torch.from_numpy(v.data) for v in (x, y, z))).numpy(), z.dtype.scalar
    )


def _run(call: bytes) -> bytes:
    function, arguments = pickle.loads(call)
    return pickle.dumps(function(*arguments))


def _launch(module: str, name: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    getattr(importlib.import_module(f"pykernels.cuda.triton.{module}"), name)(*arguments)
    return arguments


def _answer(module: str, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return getattr(importlib.import_module(f"pykernels.cuda.triton.{module}"), name)(*arguments, **named)


class Interpreter:
    """Calls launchers in a process that interprets."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=begin)

    def apply(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function of this file returns there. Copies travel: of tensors, ordinary pickles."""
        return pickle.loads(self._pool.submit(_run, pickle.dumps((function, arguments))).result(timeout=600))

    def __call__(self, module: str, name: str, *arguments: Any) -> tuple[Any, ...]:
        """The arguments as `pykernels.cuda.triton.<module>.<name>` leaves them; the caller's own are not touched."""
        left: tuple[Any, ...] = self.apply(_launch, module, name, arguments)
        return left

    def answer(self, module: str, name: str, *arguments: Any, **named: Any) -> Any:
        """What `pykernels.cuda.triton.<module>.<name>` returns."""
        return self.apply(_answer, module, name, arguments, named)

    def close(self) -> None:
        self._pool.shutdown()


def encode_by_changing_segments(x: torch.Tensor, tables: list[torch.Tensor], size: int) -> list[torch.Tensor]:
    """There: payloads of the same segments tensor, overwritten with each of the tables."""
    from pykernels.cuda.triton.compress import compress_encode

    segments, payloads = tables[0].clone(), []
    for table in tables:
        segments.copy_(table)
        payloads.append(torch.zeros(size, dtype=torch.uint8))
        compress_encode(x, None, payloads[-1], segments, "int8", 32)
    return payloads


def max_pool_numbered_in_64_bits(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """There: as for an output of more than 2^31 rows."""
    from pykernels.cuda.triton import pool

    limit, pool.INDEX_LIMIT = pool.INDEX_LIMIT, 0
    try:
        return pool.max_pool2d_with_indices(x, *arguments)
    finally:
        pool.INDEX_LIMIT = limit


@contextmanager
def stand_in(machine: tuple[int, int]) -> Iterator[None]:
    """Launchers take the CPU for this machine, see `pykernels.cuda.triton.gemm.STAND_IN`.

    Their tiles are those of the formula and short K is taken by rule, whatever was measured.
    """
    from pykernels.cuda import tables
    from pykernels.cuda.triton import gemm

    before, gemm.STAND_IN = gemm.STAND_IN, machine
    tile, tables.tile = tables.tile, lambda *_: None
    short_k, tables._short_k = tables._short_k, lambda *_: None
    gemm.machine.cache_clear()
    try:
        yield
    finally:
        gemm.STAND_IN, tables.tile, tables._short_k = before, tile, short_k
        gemm.machine.cache_clear()


def on_machine(machine: tuple[int, int], module: str, name: str, *arguments: Any) -> Any:
    """There: what a launcher returns that takes the CPU for this machine."""
    with stand_in(machine):
        return _answer(module, name, arguments, {})


def list_candidates(fewest: int, slack: int, call: tuple[Any, ...]) -> tuple[tuple[Any, ...], int]:
    """There: what sparse_encode leaves of its arguments, where it lists from `fewest` elements on and has `slack`
    entries more; and how often a list was made."""
    from pykernels.cuda.triton import topk

    before, made = (topk.FEWEST, topk.SLACK, topk.plan_of), []

    def plan_of(numel: int, k: int) -> tuple[int, int, int]:
        made.append(before[2](numel, k))
        return made[-1]

    topk.FEWEST, topk.SLACK, topk.plan_of = fewest, slack, plan_of
    try:
        topk.sparse_encode(*call)
    finally:
        topk.FEWEST, topk.SLACK, topk.plan_of = before
    return call, sum(size > 0 for size, _, _ in made)
