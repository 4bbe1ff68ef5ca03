"""The codecs under fully_shard: each test is one group of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from pykernels import comm, reference

# By codec: gradients that share a scale, and how many times fewer bytes travel at least, in so small a network.
DENSE = {"int8": (256, 3.3), "int4": (256, 5), "int2": (256, 7), "onebit": (1024, 8), "fp8": (256, 3.3)}
DENSE |= {"bf16": (256, 1.8), "fp16": (256, 1.8)}


def network() -> nn.Sequential:
    """Rows that do not divide by the number of ranks, a norm, and more than one group."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Linear(50, 301), nn.LayerNorm(301), nn.ReLU()),
        nn.Linear(301, 70),
        nn.ReLU(),
        nn.Linear(70, 10),
    )


def sharded(model: nn.Sequential, **options: Any) -> nn.Module:
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(16, 50, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def loss(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    x, y = batch(rank, step)
    return nn.functional.cross_entropy(model(x).float(), y)


def average(model: nn.Module, ranks: int, step: int) -> list[torch.Tensor]:
    """The gradients of the mean loss over the batches of all ranks, in one process."""
    model.zero_grad()
    torch.stack([loss(model, rank, step) for rank in range(ranks)]).mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def whole(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]


def reduced(ranks: int, codec: str) -> list[torch.Tensor]:
    """What the gradients of step 0 must become, by the oracle: each rank's part of each matrix is encoded by itself."""
    everyone = []
    for rank in range(ranks):
        model = network()
        loss(model, rank, 0).backward()
        everyone.append([p.grad for p in model.parameters()])
    answers = []
    for gradients in zip(*everyone, strict=True):
        kind, block = (codec, DENSE[codec][0]) if gradients[0].dim() > 1 else ("fp32", 32)
        rows = -(-gradients[0].shape[0] // ranks)
        parts = []
        for begin in range(0, rows * ranks, rows):
            pieces = [torch.zeros(rows, *g.shape[1:]) for g in gradients]  # the last ones are padded
            for piece, gradient in zip(pieces, gradients, strict=True):
                piece[: max(0, gradient.shape[0] - begin)] = gradient[begin : begin + rows]
            n = pieces[0].numel()
            payloads = torch.zeros(ranks, -(-n // block) * reference.record_bytes(kind, block), dtype=torch.uint8)
            segments = torch.tensor([[0, n, 0]])
            for piece, payload in zip(pieces, payloads, strict=True):
                reference.compress_encode(piece, None, payload, segments, kind, block)
            reference.compress_decode(payloads, pieces[0], segments, kind, block, 1 / ranks)
            parts.append(pieces[0])
        answers.append(torch.cat(parts)[: gradients[0].shape[0]])
    return answers


def worst(found: list[torch.Tensor], expected: list[torch.Tensor], at_least_2d: bool) -> float:
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if (b.dim() >= 2) == at_least_2d]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def reduces(rank: int) -> dict[str, Any]:
    """One spawn for all that a reduce-scatter over three ranks must do."""
    answers: dict[str, Any] = {}
    world = dist.get_world_size()
    for codec in DENSE:
        model = sharded(network())
        handle = comm.register(model, codec, checksum=codec == "int8")
        loss(model, rank, 0).backward()
        same = [torch.equal(a, b) for a, b in zip(whole(model), reduced(world, codec), strict=True)]
        answers[codec] = same, handle.stats().ratio
    return answers


def test_every_dense_codec_reduces_as_the_oracle_does() -> None:
    for answers in run_ranks(3, reduces):
        for codec, (same, ratio) in answers.items():
            assert all(same), (codec, same)
            assert ratio > DENSE[codec][1], (codec, ratio)


def ways(rank: int) -> dict[str, tuple[float, float]]:
    """The ways of using FSDP2, compared with the true average."""
    world = dist.get_world_size()
    expected = average(network(), world, 0)
    answers = {}

    def compare(what: str, options: dict[str, Any], tolerance: float, steps: int = 1) -> None:
        model = sharded(network(), **options)
        comm.register(model, "bf16")
        for step in range(steps):
            model.set_requires_gradient_sync(step == steps - 1)
            loss(model, rank, 0).backward()
        found = [g / steps for g in whole(model)]
        answers[what] = max(worst(found, expected, True), worst(found, expected, False)), tolerance

    compare("accumulated gradients", {}, 2**-8, steps=2)  # the rounding of bf16 is half of 2^-8
    compare("kept after the forward pass", {"reshard_after_forward": False}, 2**-8)
    columns = {"shard_placement_fn": lambda p: Shard(1) if p.shape == (301, 50) else Shard(0)}
    compare("sharded by columns", columns, 2**-8)
    compare("fp16 gradients", {"mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float16)}, 2**-8)
    return answers


def test_every_way_of_using_fsdp() -> None:
    for answers in run_ranks(2, ways):
        for what, (error, tolerance) in answers.items():
            assert error < tolerance, (what, error)


def feedback(rank: int, steps: int) -> tuple[float, bool, bool]:
    """The sum of what was sent, plus what the residuals hold, against the sum of the true averages; a checkpoint."""
    world = dist.get_world_size()
    expected = average(network(), world, 0)
    model = sharded(network())
    handle = comm.register(model, "onebit")
    sums = [torch.zeros_like(g) for g in expected]
    for _ in range(steps):
        model.zero_grad()
        loss(model, rank, 0).backward()
        sums = [a + g for a, g in zip(sums, whole(model), strict=True)]
    kept = handle.state_dict()["worker"]
    error = 0.0
    for (name, _), total, true in zip(network().named_parameters(), sums, expected, strict=True):
        left = torch.zeros_like(total)
        if f"{name}[0]" in kept:
            rows = torch.cat([kept[f"{name}[{row}]"] for row in range(world)])
            left = rows[: left.numel()].view_as(left) / world
        dist.all_reduce(left)
        error = max(error, float((total + left - steps * true).norm() / (steps * true).norm()))

    def train(model: nn.Module, steps: range) -> list[torch.Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in steps:
            optimizer.zero_grad()
            loss(model, rank, step).backward()
            optimizer.step()
        return [p.to_local().clone() for p in model.parameters()]

    model = sharded(network())
    comm.register(model, "int4")
    uninterrupted = train(model, range(4))
    model = sharded(network())
    handle = comm.register(model, "int4")
    train(model, range(2))
    kept, parameters = copy.deepcopy(handle.state_dict()), copy.deepcopy(model.state_dict())
    model = sharded(network())
    handle = comm.register(model, "int4")
    model.load_state_dict(parameters)
    handle.load_state_dict(kept)
    same = all(torch.equal(a, b) for a, b in zip(train(model, range(2, 4)), uninterrupted, strict=True))
    names = handle.stats().residual_norms
    return error, same, "0.0.weight[0]" in names and "0.0.bias[0]" not in names


def test_what_is_sent_and_what_is_kept_is_all_there_was_and_a_checkpoint_keeps_it() -> None:
    for error, same, named in run_ranks(2, feedback, 20):
        assert error < 1e-5  # sums of twenty fp32 numbers in another order
        assert same
        assert named


def hybrid(rank: int) -> tuple[list[float], bool, float]:
    """Two hosts of two ranks: shards inside a host, compressed averages between hosts."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    expected = average(network(), world, 0)
    model = sharded(network(), mesh=mesh["shard"])
    handle = comm.register(model, "int8", replicas=mesh["replicate"].get_group())
    loss(model, rank, 0).backward()
    found = whole(model)
    handle.load_state_dict(handle.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(4):
        optimizer.zero_grad()
        loss(model, rank, step).backward()
        optimizer.step()
    mine = torch.cat([p.full_tensor().flatten() for p in model.parameters()])
    everyone = [torch.zeros_like(mine) for _ in range(world)]
    dist.all_gather(everyone, mine)
    native = sharded(network(), mesh=mesh)
    with pytest.raises(ValueError, match="2-D mesh"):
        comm.register(native, "int8")
    errors = [worst(found, expected, True), worst(found, expected, False)]
    return errors, all(torch.equal(other, mine) for other in everyone), handle.stats().ratio


def test_replicas_average_compressed_and_stay_equal_to_the_bit() -> None:
    for (matrices, vectors), equal, ratio in run_ranks(4, hybrid):
        assert matrices < 0.015
        assert vectors < 2e-6
        assert equal
        assert ratio > 3


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(50, 10), nn.Linear(50, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


def complaints(rank: int) -> list[str]:
    found = []

    def expect(kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as raised:
            call()
        found.append(str(raised.value))

    model = sharded(network())
    expect(ValueError, lambda: comm.register(model, "int9"))
    expect(TypeError, lambda: comm.register(model, "int8", blocks=3))
    expect(TypeError, lambda: comm.register(network(), "int8"))
    partly = fully_shard(Branches())
    comm.register(partly, "int8")
    expect(RuntimeError, lambda: loss(partly, rank, 0).backward())
    handle = comm.register(model, "int8")
    loss(model, rank, 0).backward()
    expect(ValueError, lambda: handle.load_state_dict({**handle.state_dict(), "rank": 5}))
    return found


def test_what_is_wrong_is_named() -> None:
    for found in run_ranks(2, complaints):
        for word, message in zip(["int9", "blocks", "fully_shard", "second.weight", "rank 5"], found, strict=True):
            assert word in message
