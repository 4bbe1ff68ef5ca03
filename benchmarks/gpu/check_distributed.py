"""Gradients between ranks on a GPU: hooks of DistributedDataParallel and of fully_shard, on CUDA's streams.

    python -m benchmarks.gpu.check_distributed [--device cuda]

one rank    fully_shard over NCCL, whose reduce-scatter encodes, sends and decodes on FSDP's own stream
two ranks   DistributedDataParallel over gloo, on tensors of one device
two GPUs    both over NCCL, where there are two

Every gradient must be near the true average, the same on all ranks, and to the bit the same where the device is kept
busy in the middle of the backward pass: a hook that does not wait for the stream that computes a gradient sends what
was there before. On a CPU gloo takes NCCL's place, and nothing is late. Prints what was looked at as lines of JSON:
its name, and what is wrong or null.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pykernels import comm

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent / "tests"))
from ranks import alike, error, run_ranks

# By codec: how far a gradient may be from the true average, relative; None where one step alone says little.
REPLICATED = {"fp32": 1e-5, "bf16": 0.01, "int8": 0.03, "fp8": 0.1, "onebit": None, "topk": None, "powersgd": None}
SHARDED = {"bf16": 0.01, "int8": 0.03, "int4": 0.3}
CYCLES = 20_000_000  # of a busy device: some hundredths of a second
Gradients = list[torch.Tensor]
Found = list[tuple[str, str | None]]


class _Late(torch.autograd.Function):
    """The identity, whose backward pass keeps the device busy first."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        if gradient.is_cuda:
            torch.cuda._sleep(CYCLES)  # type: ignore[no-untyped-call]
        return gradient.clone()


class Late(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Late.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def network(late: bool) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Linear(64, 300), nn.Linear(300, 50)
    return nn.Sequential(first, Late() if late else nn.Identity(), nn.ReLU(), second)


def loss(model: nn.Module, rank: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    x, y = torch.randn(32, 64, generator=generator), torch.randn(32, 50, generator=generator)
    return nn.functional.mse_loss(model(x.to(device)), y.to(device))


def average(ranks: int, device: torch.device) -> Gradients:
    """The true one, by a process alone."""
    model = network(False).to(device)
    torch.stack([loss(model, rank, device) for rank in range(ranks)]).mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def replicated(codec: str, late: bool, rank: int, device: torch.device, group: dist.ProcessGroup) -> Gradients:
    model = DistributedDataParallel(network(late).to(device), process_group=group, bucket_cap_mb=0.05)
    comm.register(model, codec)
    loss(model, rank, device).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def sharded(codec: str, late: bool, rank: int, device: torch.device, group: dist.ProcessGroup) -> Gradients:
    model = network(late).to(device)
    mesh = DeviceMesh.from_group(group, device.type)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    comm.register(model, codec)
    loss(model, rank, device).backward()
    return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]  # type: ignore[attr-defined]


Way = Callable[[str, bool, int, torch.device, dist.ProcessGroup], Gradients]


def complaint(found: Gradients, late: Gradients, true: Gradients, most: float | None) -> str | None:
    """What is wrong with gradients on a rank, and with those that came late, beside the true average."""
    together, expected = (torch.cat([g.flatten() for g in gradients]) for gradients in (found, true))
    if together.shape != expected.shape:
        return f"{together.numel()} gradients, not {expected.numel()}"
    if not bool(together.isfinite().all()):
        return "a gradient is not finite"
    if not all(torch.equal(a, b) for a, b in zip(found, late, strict=True)):
        return "a gradient that comes late is another one"
    if most is not None and (off := error(together, expected)) > most:
        return f"off the true average by {off:.3g}, more than {most}"
    return None


def look(rank: int, device_type: str, backend: str, each: bool, ways: tuple[str, ...]) -> Found:
    """On a rank; `each` has a device of its own."""
    device = torch.device(device_type, rank if each else 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world, found = dist.get_world_size(), Found()
    group = dist.new_group(backend=backend)
    true = average(world, device)
    known: dict[str, tuple[Way, dict[str, Any]]] = {
        "DDP": (replicated, REPLICATED), "FSDP": (sharded, SHARDED),
    }  # fmt: skip
    for way, (run, codecs) in ((name, known[name]) for name in ways):
        for codec, most in codecs.items():
            gradients, late = (run(codec, late, rank, device, group) for late in (False, True))
            wrong = complaint(gradients, late, true, most)
            same = alike(torch.cat([g.flatten() for g in gradients]).cpu())
            name = f"{way} over {backend}, {world} rank{'s' * (world > 1)} on {device_type}, {codec}"
            found.append((name, wrong or (None if same else "the ranks have different gradients")))
    return found


def check_distributed(device: str = "cuda") -> Iterator[tuple[str, str | None]]:
    """What was looked at, and what is wrong or None; rank by rank the first that is wrong."""
    backend = "nccl" if device == "cuda" else "gloo"
    plans: list[tuple[int, str, bool, tuple[str, ...]]] = [(1, backend, False, ("FSDP",)), (2, "gloo", False, ("DDP",))]
    if device == "cuda" and torch.cuda.device_count() > 1:
        plans.append((2, "nccl", True, ("DDP", "FSDP")))
    for world, by, each, ways in plans:
        for answers in zip(*run_ranks(world, look, device, by, each, ways), strict=True):
            yield answers[0][0], next((wrong for _, wrong in answers if wrong is not None), None)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    given = arguments.parse_args()
    for found in check_distributed(given.device):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
