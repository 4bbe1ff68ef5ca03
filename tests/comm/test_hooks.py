"""The hooks under DistributedDataParallel, with every way of using it: each test is one group of ranks."""

from __future__ import annotations

import copy
import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel as DDP
from training import backward, batch, gradients, network, relative, same_everywhere, train

from pykernels import comm

DENSE = ["int8", "int4", "int2", "onebit", "fp8", "bf16", "fp16"]
# Relative error of one averaged gradient: two encodings of normal data, each with the codec's own error.
ERROR = {"int8": 0.02, "int4": 0.3, "int2": 0.8, "onebit": 1.2, "fp8": 0.06, "bf16": 0.005, "fp16": 0.001}


def averages(rank: int, codecs: list[str]) -> dict[str, tuple[float, float, bool, str]]:
    answers = {}
    for codec in codecs:
        plain, model = DDP(network()), DDP(network(), bucket_cap_mb=0.03)
        handle = comm.register(model, codec)
        matrices = vectors = 0.0
        equal = True
        for step in range(3):
            for net in (plain, model):
                net.zero_grad()
                backward(net, rank, step)
            if step == 0:
                matrices = relative(gradients(model), gradients(plain), True)
            vectors = max(vectors, relative(gradients(model), gradients(plain), False))
            equal &= same_everywhere(gradients(model))
        answers[codec] = matrices, vectors, equal, str(handle.stats())
    return answers


def test_every_codec_averages_the_gradients_and_leaves_vectors_exact() -> None:
    for answers in run_ranks(3, averages, DENSE):
        for codec, (matrices, vectors, equal, stats) in answers.items():
            assert matrices < ERROR[codec], (codec, matrices)
            assert vectors < 1e-6, (codec, vectors)  # exempt: sums of three fp32 numbers in another order
            assert equal, codec
            assert stats.startswith("3 steps"), stats


def left_over(kept: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
    """What this rank's residuals hold of a parameter, in units of the average."""
    left = torch.zeros(like.numel())
    if name in kept["worker"]:
        left += kept["worker"][name] / dist.get_world_size()
    for offset, values in kept["shard"].get(name, []):  # of an average already
        left[offset : offset + values.numel()] += values
    for offset, values in kept.get("part", {}).get(name, []):  # of the average of a host
        left[offset : offset + values.numel()] += values * kept["ranks_per_host"] / dist.get_world_size()
    return left


def telescopes(rank: int, cases: list[tuple[str, dict[str, Any]]], steps: int) -> list[tuple[str, float]]:
    """The sum of the averages, plus what the residuals hold, against the sum of the true averages."""
    answers = []
    for codec, options in cases:
        plain, model = DDP(network()), DDP(network(), bucket_cap_mb=0.03)
        handle = comm.register(model, codec, **options)
        sent: list[torch.Tensor] = []
        true: list[torch.Tensor] = []
        for step in range(steps):
            for net, sums in ((plain, true), (model, sent)):
                net.zero_grad()
                backward(net, rank, step % 7)
                sums[:] = [a + g for a, g in zip(sums, gradients(net), strict=True)] if sums else gradients(net)
        kept = handle.state_dict()
        worst = 0.0
        for (name, _), total, expected in zip(model.module.named_parameters(), sent, true, strict=True):
            left = left_over(kept, name, expected)
            dist.all_reduce(left)
            worst = max(worst, float((total + left.view_as(total) - expected).norm() / expected.norm()))
        answers.append((codec, worst))
    return answers


def test_what_is_sent_and_what_is_kept_is_all_there_was() -> None:
    cases = [
        ("int8", {}),
        ("onebit", {}),
        ("topk", {}),
        ("topk", {"threshold": 0.01}),
        ("randomk", {"ratio": 0.1}),
        ("powersgd", {"start_step": 2}),
        ("int8", {"ranks_per_host": 2}),
    ]
    for answers in run_ranks(4, telescopes, cases, 40):
        for codec, error in answers:
            assert error < 1e-4, codec


def delayed(rank: int, steps: int) -> tuple[bool, bool]:
    """Ranks sleep at random before each backward pass and between its layers."""
    wait = random.Random(rank)
    model = DDP(network(), bucket_cap_mb=0.01)
    comm.register(model, "int8")
    for module in model.module:
        if isinstance(module, nn.ReLU):
            module.register_full_backward_hook(lambda *_: time.sleep(wait.random() * 2e-3))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    equal = True
    for step in range(steps):
        if wait.random() < 0.1:
            time.sleep(wait.random() * 5e-3)
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
        if step % 50 == 49:
            equal &= same_everywhere([p.detach() for p in model.parameters()])
    return equal, all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.slow
def test_ranks_stay_equal_to_the_bit_whatever_the_delays() -> None:
    assert run_ranks(3, delayed, 2000) == [(True, True)] * 3


class Branches(nn.Module):
    """Uses one of two layers, so that the other has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(50, 40), nn.Linear(50, 40), nn.Linear(40, 10)

    def forward(self, x: torch.Tensor, second: bool = False) -> torch.Tensor:
        y: torch.Tensor = self.last((self.second if second else self.first)(x).relu())
        return y


def ways(rank: int) -> dict[str, Any]:
    """Each way of using DDP, against DDP without a hook; bf16 is near enough to compare with."""
    answers: dict[str, Any] = {}

    def compare(what: str, options: dict[str, Any], steps: int = 3, make: Any = network) -> None:
        plain, model = DDP(make(), **options), DDP(make(), **options, bucket_cap_mb=0.03)
        comm.register(model, "bf16")
        for step in range(steps):
            for net in (plain, model):
                net.zero_grad()
                backward(net, rank, step)
        answers[what] = relative(gradients(model), gradients(plain), True), same_everywhere(gradients(model))

    compare("bucket views", {"gradient_as_bucket_view": True})
    compare("static graph", {"static_graph": True})
    compare("channels_last", {}, make=lambda: nn.Sequential(nn.Unflatten(1, (2, 5, 5)), images(), nn.Flatten()))

    plain, model = DDP(network()), DDP(network())
    comm.register(model, "bf16")
    for net in (plain, model):
        with net.no_sync():
            backward(net, rank, 0)
        backward(net, rank, 1)
    answers["no_sync"] = relative(gradients(model), gradients(plain), True), same_everywhere(gradients(model))

    torch.manual_seed(0)
    branches = Branches()
    plain, model = (DDP(copy.deepcopy(branches), find_unused_parameters=True) for _ in range(2))
    comm.register(model, "bf16")
    for step in range(3):
        x, y = batch(rank, step)
        for net in (plain, model):
            net.zero_grad()
            nn.functional.cross_entropy(net(x, second=rank == 0 and step == 1), y).backward()
    answers["unused parameters"] = (
        relative(gradients(model), gradients(plain), True),
        same_everywhere(gradients(model)),
    )

    plain, model = DDP(network()), DDP(network())
    comm.register(model, "bf16")
    with Join([plain, model]):
        for step in range(2 + rank):  # rank 0 ends first
            for net in (plain, model):
                net.zero_grad()
                backward(net, rank, step)
    answers["join"] = relative(gradients(model), gradients(plain), True), True

    plain, model = DDP(network().bfloat16()), DDP(network().bfloat16())
    comm.register(model, "int8")
    x, y = batch(rank, 0)
    for net in (plain, model):
        nn.functional.cross_entropy(net(x.bfloat16()).float(), y).backward()
    found, expected = ([g.float() for g in gradients(net)] for net in (model, plain))
    answers["bf16 gradients"] = relative(found, expected, True), same_everywhere(found)
    return answers


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).to(
        memory_format=torch.channels_last
    )


def test_every_way_of_using_ddp() -> None:
    for answers in run_ranks(2, ways):
        for what, (error, equal) in answers.items():
            assert error < 0.05, (what, error)
            assert equal, what


def bad_gradient(rank: int) -> tuple[bool, bool, bool, int]:
    """One rank has an infinite gradient in one step, as automatic mixed precision makes them."""
    model = DDP(network())
    handle = comm.register(model, "int8")
    seen = []
    for step in range(3):
        model.zero_grad()
        x, y = batch(rank, step)
        loss = nn.functional.cross_entropy(model(x), y)
        (loss * (torch.inf if rank == 1 and step == 1 else 1.0)).backward()
        seen.append(all(bool(g.isfinite().all()) for g in gradients(model)))
    kept = all(bool(values.isfinite().all()) for values in handle.state_dict()["worker"].values())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaled = DDP(network())
    handle = comm.register(scaled, "int8", grad_scaler=scaler)
    scaler.scale(nn.functional.cross_entropy(scaled(batch(rank, 0)[0]), batch(rank, 0)[1])).backward()
    before = handle.stats().residual_norms
    handle.state.feedback.scale(2.0)
    after = handle.stats().residual_norms
    doubled = sum(abs(after[name] - 2 * norm) < 1e-6 * norm for name, norm in before.items())
    return seen == [True, False, True], kept, same_everywhere(gradients(model)), doubled


def test_a_bad_gradient_is_passed_on_and_never_kept() -> None:
    assert run_ranks(2, bad_gradient) == [(True, True, True, 3)] * 2


def resumed(rank: int, codec: str, options: dict[str, Any]) -> tuple[bool, bool]:
    """Six steps at once, and three, a checkpoint in new objects, and three more."""

    def fresh() -> tuple[DDP, comm.Handle]:
        model = DDP(network(), bucket_cap_mb=0.03)
        return model, comm.register(model, codec, **options)

    model, handle = fresh()
    train(model, rank, range(6))
    first, kept = fresh()
    train(first, rank, range(3))
    second, again = fresh()
    second.module.load_state_dict(first.module.state_dict())
    again.load_state_dict(copy.deepcopy(kept.state_dict()))
    train(second, rank, range(3, 6))
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))
    ours, theirs = handle.state_dict(), again.state_dict()
    residuals = ours["worker"].keys() == theirs["worker"].keys()
    residuals &= all(torch.equal(ours["worker"][name], theirs["worker"][name]) for name in ours["worker"])
    return same, residuals


def resume_all(rank: int, cases: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, bool, bool]]:
    return [(codec, *resumed(rank, codec, options)) for codec, options in cases]


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit() -> None:
    cases = [
        ("int4", {}),
        ("onebit", {}),
        ("int8", {"ranks_per_host": 2}),
    ]
    for answers in run_ranks(4, resume_all, cases):
        for codec, weights, residuals in answers:
            assert weights and residuals, codec


def complaints(rank: int) -> list[str]:
    """What is wrong is said, by name."""
    found = []

    def expect(kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as raised:
            call()
        found.append(str(raised.value))

    model = DDP(network())
    expect(TypeError, lambda: comm.register(model.module, "int8"))
    expect(ValueError, lambda: comm.register(model, "int9"))
    expect(ValueError, lambda: comm.register(model, "int8", block=100))
    expect(ValueError, lambda: comm.register(model, "onebit", stochastic=True))
    expect(ValueError, lambda: comm.register(model, "int2", stochastic=True))
    expect(TypeError, lambda: comm.register(model, "int8", blocks=128))
    expect(ValueError, lambda: comm.register(model, "int8", ranks_per_host=3))
    expect(ValueError, lambda: comm.register(model, "topk", ranks_per_host=2))
    expect(ValueError, lambda: comm.register(model, "topk", ratio=0.0))
    expect(ValueError, lambda: comm.register(model, "topk", momentum=1.0))
    expect(ValueError, lambda: comm.register(model, "powersgd", rank=0))
    handle = comm.register(model, "int8")
    backward(model, rank, 0)
    state = handle.state_dict()
    expect(ValueError, lambda: handle.load_state_dict({**state, "codec": "int4"}))
    expect(ValueError, lambda: handle.load_state_dict({**state, "rank": 1 - rank}))
    expect(ValueError, lambda: handle.load_state_dict({**state, "worker": {"0.weight": torch.zeros(3)}}))
    expect(RuntimeError, comm.Int8State().state_dict)
    return found


def test_what_is_wrong_is_named() -> None:
    words = ["DistributedDataParallel", "int9", "block", "stochastic", "int2", "blocks"]
    words += ["ranks_per_host", "dense codec", "ratio", "momentum", "rank must"]
    words += ["int4", "one file a rank", "0.weight", "named_parameters"]
    for found in run_ranks(2, complaints):
        assert len(found) == len(words)
        for word, message in zip(words, found, strict=True):
            assert word in message
