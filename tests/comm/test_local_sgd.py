"""Local SGD and DiLoCo: each test is one group of ranks."""

from __future__ import annotations

import copy
import datetime
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from pykernels import comm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 4)
    )


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A task that can be learnt: the class is the sign of two fixed projections."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(32, 20, generator=generator)
    directions = torch.randn(20, 2, generator=torch.Generator().manual_seed(7))
    signs = (x @ directions > 0).long()
    return x, 2 * signs[:, 0] + signs[:, 1]


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> float:
    x, y = batch(rank, step)
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def values(model: nn.Module) -> torch.Tensor:
    floating = [t.detach().flatten() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    return torch.cat(floating).clone()


def everyones(mine: torch.Tensor) -> list[torch.Tensor]:
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found


def exact(name: str, parameter: torch.Tensor) -> bool:
    return True


def averages(rank: int) -> dict[str, Any]:
    """Without loss on the wire: against the definitions."""
    answers: dict[str, Any] = {}
    torch.manual_seed(0)
    model = network()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(rank)  # rank 0's are everyone's from here on
    outer = comm.DiLoCo(model, 3, exempt=exact, outer_optimizer=comm.plain_average, bucket_cap_mb=0.01)
    answers["begin"] = torch.equal(everyones(values(model))[0], values(network()))
    inner = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        inner_step(model, inner, rank, step)
        if step < 2:
            assert not outer.step(samples=1 + rank)
    local = everyones(values(model))
    assert outer.step(samples=1 + rank)
    expected = sum((1 + r) * t for r, t in enumerate(local)) / sum(range(1, len(local) + 1))
    answers["weighted"] = float((values(model) - expected).norm() / expected.norm())

    common = values(model)
    if rank == 0:
        inner_step(model, inner, rank, 3)
    local = everyones(values(model))
    if rank == 0:
        outer._samples = 32.0
    outer.synchronize()  # the others have no data
    answers["absent"] = float((values(model) - local[0]).norm() / local[0].norm()), not torch.equal(local[0], common)

    model = network()
    outer = comm.DiLoCo(model, 1, exempt=exact)
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    reference = torch.optim.SGD(parameters, 0.7, momentum=0.9, nesterov=True)
    inner = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(4):
        inner_step(model, inner, rank, step)
        for mine, p in zip(parameters, model.parameters(), strict=True):
            mine.grad = torch.stack(everyones(mine.detach() - p.detach())).mean(0)
        reference.step()
        outer.step()
    pairs = zip(parameters, model.parameters(), strict=True)
    answers["nesterov"] = max(float((a - b).norm() / a.norm()) for a, b in pairs)
    return answers


def test_exchanges_are_what_their_definitions_say() -> None:
    for answers in run_ranks(3, averages):
        assert answers["begin"]
        assert answers["weighted"] < 1e-6
        assert answers["absent"][0] < 1e-6
        assert answers["absent"][1]
        assert answers["nesterov"] < 1e-5


def trains(rank: int) -> dict[str, Any]:
    answers = {}
    for codec, options in {"exact": {"exempt": exact}, "int8": {}, "int4": {}}.items():
        model = network()
        outer = comm.DiLoCo(model, 10, "int8" if codec == "exact" else codec, **options)
        inner = torch.optim.AdamW(model.parameters(), 3e-3)
        losses, equal = [], True
        for step in range(100):
            losses.append(inner_step(model, inner, rank, step))
            if outer.step():
                equal &= all(torch.equal(other, values(model)) for other in everyones(values(model)))
        stats = outer.stats()
        answers[codec] = sum(losses[:10]), sum(losses[-10:]), equal, stats.steps, stats.ratio
    return answers


def test_it_learns_as_well_with_lossy_codecs_and_ranks_stay_equal_to_the_bit() -> None:
    for answers in run_ranks(2, trains):
        first, exact_last, *_ = answers["exact"]
        assert exact_last < first / 2
        for codec, least in {"exact": 0.9, "int8": 2.5, "int4": 4}.items():
            _, last, equal, rounds, ratio = answers[codec]
            assert last < 1.05 * exact_last, (codec, last, exact_last)
            assert equal, codec
            assert rounds == 10
            assert ratio > least, (codec, ratio)


def resumed(rank: int) -> bool:
    """Twelve steps at once, and seven, a checkpoint in the middle of a round, and five more."""

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, comm.DiLoCo]:
        model = network()
        return model, torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), comm.DiLoCo(model, 4, "int4")

    def train(model: nn.Module, inner: torch.optim.Optimizer, outer: comm.DiLoCo, steps: range) -> None:
        for step in steps:
            inner_step(model, inner, rank, step)
            outer.step()

    model, inner, outer = fresh()
    train(model, inner, outer, range(12))
    first = fresh()
    train(*first, range(7))
    kept = copy.deepcopy([part.state_dict() for part in first])
    second = fresh()
    for part, state in zip(second, kept, strict=True):
        part.load_state_dict(state)
    train(*second, range(7, 12))
    return torch.equal(values(model), values(second[0]))


def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit() -> None:
    assert run_ranks(2, resumed) == [True, True]


def loses_a_rank(rank: int, folder: str) -> dict[str, Any]:
    """Rank 2 of 3 dies in a round; the others go on as two, then a new one joins them in another group."""
    answers: dict[str, Any] = {}
    model = network()
    # A rank that waits for one that waits for the lost one learns of it when its time is up.
    group = dist.new_group(timeout=datetime.timedelta(seconds=5))
    outer = comm.DiLoCo(model, 2, "int8", process_group=group)
    inner = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(3):
        inner_step(model, inner, rank, step)
        outer.step()
    inner_step(model, inner, rank, 3)
    if rank == 2:
        return answers
    local, before = values(model), copy.deepcopy(outer.state_dict())
    with pytest.raises(RuntimeError):
        outer.step()
    answers["model unchanged"] = torch.equal(values(model), local)
    kept = outer.state_dict()
    answers["residuals unchanged"] = all(
        torch.equal(a, kept["wire"]["worker"][name]) for name, a in before["wire"]["worker"].items()
    )
    answers["common unchanged"] = all(torch.equal(a, kept["common"][name]) for name, a in before["common"].items())

    dist.destroy_process_group()
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/again", rank=rank, world_size=2, timeout=timeout)
    parameters = copy.deepcopy(model.state_dict())
    outer = comm.DiLoCo(model, 2, "int8")
    model.load_state_dict(parameters)
    outer.load_state_dict(kept)
    outer.synchronize()
    answers["goes on"] = all(torch.equal(other, values(model)) for other in everyones(values(model)))

    # Rank 0 has a round more than rank 1, which comes without a state.
    kept = outer.state_dict()
    common = values(model)
    joined = network()
    outer = comm.DiLoCo(joined, 2, "int8")
    if rank == 0:
        joined.load_state_dict(model.state_dict())
    outer.load_state_dict(kept if rank == 0 else None)
    answers["joins"] = torch.equal(values(joined), common) and outer.rounds == 2
    inner = torch.optim.SGD(joined.parameters(), 0.05)
    for step in range(4, 6):
        inner_step(joined, inner, rank, step)
        outer.step()
    answers["trains on"] = all(torch.equal(other, values(joined)) for other in everyones(values(joined)))
    return answers


def test_a_lost_rank_is_reported_and_the_others_go_on(tmp_path: pathlib.Path) -> None:
    first, second, _ = run_ranks(3, loses_a_rank, str(tmp_path))
    assert len(first) == 6
    assert all(first.values()), first
    assert all(second.values()), second


def complaints(rank: int) -> list[str]:
    found = []

    def expect(kind: type[Exception], call: Any) -> None:
        with pytest.raises(kind) as raised:
            call()
        found.append(str(raised.value))

    expect(ValueError, lambda: comm.DiLoCo(network(), 0))
    expect(ValueError, lambda: comm.DiLoCo(network(), 1, "int9"))
    expect(ValueError, lambda: comm.DiLoCo(network().requires_grad_(False), 1))
    expect(TypeError, lambda: comm.DiLoCo(network(), 1, blocks=3))
    expect(TypeError, lambda: comm.DiLoCo(nn.parallel.DistributedDataParallel(network()), 1))
    model = network()
    outer = comm.DiLoCo(model, 1)
    expect(ValueError, outer.synchronize)
    expect(ValueError, lambda: outer.load_state_dict(None))
    kept = outer.state_dict()
    expect(ValueError, lambda: outer.load_state_dict({**kept, "common": {}}))
    before = values(model)
    if rank == 1:
        with torch.no_grad():
            model[0].weight[0, 0] = torch.inf
    expect(RuntimeError, lambda: outer.step())
    outer.rollback()
    found.append(f"restored {torch.equal(values(model), before)}")

    return found


def test_what_is_wrong_is_named() -> None:
    words = ["every", "int9", "requires a gradient", "blocks", "unwrapped", "samples", "no rank", "0.bias", "diverged"]
    for found in run_ranks(2, complaints):
        for word, message in zip([*words, "restored True"], found, strict=True):
            assert word in message
