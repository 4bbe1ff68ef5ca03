"""What only the sparse hooks do: warm-up, momentum correction, checkpoints with velocities."""

from __future__ import annotations

import copy
import itertools

import torch
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel as DDP
from training import backward, gradients, network, same_everywhere

from pykernels import comm


def sent(rank: int) -> tuple[list[int], bool]:
    """Non-zero gradients of the matrices, step by step, during a warm-up."""
    model = DDP(network())
    comm.register(model, "topk", ratio=0.01, warmup_steps=8)
    counts, equal = [], True
    for step in range(10):
        model.zero_grad()
        backward(model, rank, step)
        counts.append(sum(int(g.count_nonzero()) for g in gradients(model) if g.dim() == 2))
        equal &= same_everywhere(gradients(model))
    return counts, equal


def test_the_warm_up_falls_to_the_ratio() -> None:
    elements = 50 * 300 + 300 * 70 + 70 * 10
    for counts, equal in run_ranks(2, sent):
        assert equal
        assert counts[0] > 0.4 * elements
        assert all(later < earlier for earlier, later in itertools.pairwise(counts[:8]))
        for count in counts[8:]:  # two ranks choose one in a hundred each
            assert 0.009 * elements < count < 0.021 * elements


def corrected(rank: int) -> tuple[bool, bool, bool]:
    """Velocities build up where nothing is sent, are forgotten where it was, and are saved."""
    model = DDP(network())
    handle = comm.register(model, "topk", ratio=0.05, momentum=0.9)
    for _ in range(2):
        model.zero_grad()
        backward(model, rank, 0)
    state = copy.deepcopy(handle.state_dict())
    velocity, left = state["velocity"]["0.weight"], state["worker"]["0.weight"]
    kept = velocity != 0.0
    # Twice the same gradient g. Never sent: the velocity is g, then 1.9 g, and their sum is left. Sent in the first
    # step: both begin again at g.
    never = torch.isclose(left, velocity * (2.9 / 1.9), rtol=1e-4)
    first = torch.isclose(left, velocity, rtol=1e-4)
    built = bool((never | first)[kept].all())
    some_sent = bool((first & kept).any()) and bool((never & kept).any())
    again = comm.register(DDP(network()), "topk", ratio=0.05, momentum=0.9)
    again.load_state_dict(state)
    same = all(torch.equal(values, again.state_dict()["velocity"][key]) for key, values in state["velocity"].items())
    return built, some_sent, same


def test_momentum_correction_keeps_velocities() -> None:
    assert run_ranks(2, corrected) == [(True, True, True)] * 2
