"""The hooks under torch.compile: each test is one group of ranks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from pykernels import comm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(50, 300), nn.ReLU(), nn.Linear(300, 70), nn.ReLU(), nn.Linear(70, 10))


@contextmanager
def compiled_backward(backend: str) -> Iterator[None]:
    """Backward passes are compiled as a whole; a graph break is an error."""
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True)):
        yield


def gradients(model: nn.Module, rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x, y = torch.randn(16, 50, generator=generator), torch.randint(0, 10, (16,), generator=generator)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def eager(rank: int, codec: str, steps: int) -> list[list[torch.Tensor]]:
    """What the hook makes of the same batches without a compiler."""
    model = DDP(network())
    comm.register(model, codec)
    return [gradients(model, rank, step) for step in range(steps)]


def equal(found: list[list[torch.Tensor]], expected: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for f, e in zip(found, expected, strict=True) for a, b in zip(f, e, strict=True))


def compiles(rank: int, backend: str, codecs: list[str]) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for codec in codecs:
        expected = eager(rank, codec, 3)
        model = DDP(network())
        handle = comm.register(model, codec)
        compiled = torch.compile(model, backend=backend)
        found = [gradients(compiled, rank, step) for step in range(3)]
        answers[f"ddp_optimizer {codec}"] = equal(found, expected), handle.stats().steps == 3
    torch._dynamo.reset()
    torch._dynamo.config.optimize_ddp = "python_reducer"
    for codec in codecs:
        torch._dynamo.config.optimize_ddp = "ddp_optimizer"
        expected = eager(rank, codec, 4)
        torch._dynamo.config.optimize_ddp = "python_reducer"
        model = DDP(network())
        handle = comm.register(model, codec)
        compiled = torch.compile(model, backend=backend)
        with compiled_backward(backend):
            found = [gradients(compiled, rank, step) for step in range(2)]
            handle.load_state_dict(copy.deepcopy(handle.state_dict()))
            found += [gradients(compiled, rank, step) for step in range(2, 4)]
        answers[f"python_reducer {codec}"] = equal(found, expected), True
        torch._dynamo.reset()
    return answers


def test_compiled_gradients_are_those_of_the_hook_to_the_bit() -> None:
    for answers in run_ranks(2, compiles, "aot_eager", ["int8", "onebit"]):
        for what, (same, counted) in answers.items():
            assert same, what
            assert counted, what


@pytest.mark.slow
def test_inductor_compiles_the_hook() -> None:
    for answers in run_ranks(2, learns, "inductor"):
        assert answers["error"] < 0.03  # int8 loses about 1 %, the averages of two encodings
        assert answers["equal"]


def learns(rank: int, backend: str) -> dict[str, Any]:
    """Inductor's own sums may differ from eager ones in the last bits, so compare with the true average."""
    torch._inductor.config.compile_threads = 1  # no pool of processes that import torch
    plain = DDP(network())
    expected = gradients(plain, rank, 0)
    torch._dynamo.config.optimize_ddp = "python_reducer"
    model = DDP(network())
    comm.register(model, "int8")
    with compiled_backward(backend):
        found = gradients(torch.compile(model, backend=backend), rank, 0)
    mine = torch.cat([g.flatten() for g in found])
    both = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(both, mine)
    error = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
    return {"error": error, "equal": torch.equal(*both)}


def complaints(rank: int) -> list[str]:
    torch._dynamo.config.optimize_ddp = "python_reducer"
    found = []
    for options in ({"stochastic": True}, {"checksum": True}):
        with pytest.raises(ValueError) as raised:
            comm.register(DDP(network()), "int8", **options)
        found.append(str(raised.value))
    return found


def test_what_cannot_be_traced_is_named() -> None:
    for found in run_ranks(2, complaints):
        for word, message in zip(["stochastic", "checksum"], found, strict=True):
            assert word in message
            assert "ddp_optimizer" in message
