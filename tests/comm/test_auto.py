"""`auto`: every rank chooses alike, by the facts, and what is chosen averages as it does alone."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel as DDP
from training import backward, gradients, network, relative, same_everywhere, train

from pykernels import comm
from pykernels.comm.feedback import ErrorFeedback
from pykernels.comm.layout import Piece, Run
from pykernels.comm.measure import codec_speed
from pykernels.comm.model import Link, Speed

SPEEDS = {"fp32": Speed(1e-10), "bf16": Speed(4e-10, 4e-10, 2e-10), "int8": Speed(5e-10, 5e-10, 2e-10)}
SLOW, FAST = Link.between(2, 12.5e6, 5e-5), Link.between(2, 12.5e9, 5e-5)


def averages(rank: int) -> list[tuple[list[str], float, bool, str]]:
    """On the slow link, then on the fast one: choices, the error of the first average, whether all ranks are alike, and
    the statistics."""
    found = []
    for link in (SLOW, FAST):
        plain, model = DDP(network()), DDP(network())
        handle = comm.register(model, "auto", facts=(link, SPEEDS))
        error, alike = -1.0, True
        for step in range(3):
            for net in (plain, model):
                net.zero_grad()
                backward(net, rank, step)
            if step == 0:
                error = relative(gradients(model), gradients(plain), True)
            alike &= same_everywhere(gradients(model))
        stats = handle.stats()
        assert isinstance(stats, comm.AutoStats)
        found.append(([choice.codec for choice in stats.choices.values()], error, alike, str(stats)))
    return found


def test_auto_takes_the_codec_of_the_least_predicted_time() -> None:
    for answers in run_ranks(2, averages):
        for codec, least, most, (choices, error, alike, text) in zip(
            ("int8", "fp32"), (1e-4, 0.0), (0.02, 0.0), answers, strict=True
        ):
            assert choices and set(choices) == {codec}
            assert least <= error <= most
            assert alike
            assert re.search(
                rf"bucket 0: {codec} for \d+ gradients, predicted ms: fp32 [\d.]+, bf16 [\d.]+, int8 ", text
            )


def measures(rank: int) -> tuple[Any, ...]:
    model = DDP(network())
    state = comm.register(model, "auto", candidates=("fp32", "int8")).state
    assert isinstance(state, comm.AutoState)
    backward(model, rank, 0)
    return state.link, state.speeds, [choice.codec for choice in state.choices.values()]


def test_auto_measures_and_all_ranks_have_the_same_facts() -> None:
    first, second = run_ranks(2, measures)
    assert first == second
    link, speeds, choices = first
    for cost in (link.all_to_all, link.all_gather, link.all_reduce):
        assert 1e-7 < cost.seconds < 0.5
        assert 1e-12 < cost.per_byte < 1e-5
    assert list(speeds) == ["fp32", "int8"]
    assert speeds["int8"].encode > 0 and speeds["int8"].reduce > 0 and speeds["int8"].decode > 0
    assert speeds["fp32"].encode > 0
    assert choices


def plain_fp32(rank: int) -> tuple[bool, comm.Stats, int]:
    """Whether the codec "fp32" averages to the same bits as DDP without a hook."""
    plain, model = DDP(network()), DDP(network())
    handle = comm.register(model, "fp32")
    same = True
    for step in range(3):
        for net in (plain, model):
            net.zero_grad()
            backward(net, rank, step)
        same &= all(torch.equal(a, b) for a, b in zip(gradients(model), gradients(plain), strict=True))
    return same, handle.stats(), sum(p.numel() for p in model.parameters())


def test_fp32_is_ddp_without_a_hook() -> None:
    for same, stats, numel in run_ranks(2, plain_fp32):
        assert same
        assert stats.steps == 3
        assert stats.wire_bytes == stats.gradient_bytes == 3 * 4 * numel


def resumes(rank: int) -> tuple[float, float, list[str]]:
    """Train with int8, save, go on with fp32 chosen: the residuals enter the next average, then none are left."""
    torch.manual_seed(0)
    model = DDP(network())
    handle = comm.register(model, "auto", facts=(SLOW, SPEEDS))
    train(model, rank, range(3))
    saved = handle.state_dict()
    owed = torch.cat([values.flatten() for values in saved["worker"].values()]).norm()

    plain, after = DDP(network()), DDP(network())
    resumed = comm.register(after, "auto", facts=(FAST, SPEEDS))
    resumed.load_state_dict(saved)
    for net in (plain, after):
        net.zero_grad()
        backward(net, rank, 3)
    for (name, p), q in zip(after.module.named_parameters(), plain.module.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        debt = torch.zeros(p.numel())
        if name in saved["worker"]:
            debt += saved["worker"][name].flatten() / 2
        for offset, values in saved["shard"].get(name, ()):
            debt[offset : offset + values.numel()] += values
        dist.all_reduce(debt)
        torch.testing.assert_close(p.grad.flatten(), q.grad.flatten() + debt, rtol=1e-5, atol=1e-7)
    left = resumed.stats().residual_norms
    return float(owed), sum(left.values()), [choice.codec for choice in resumed.state.choices.values()]  # type: ignore[attr-defined]


def test_residuals_are_paid_when_a_bucket_goes_plain() -> None:
    for owed, left, choices in run_ranks(2, resumes):
        assert owed > 0
        assert left == 0
        assert set(choices) == {"fp32"}


def test_settle_adds_what_is_owed_once() -> None:
    feedback = ErrorFeedback()
    run = Run("w", 2, 3, False)
    feedback.attach_worker([run], 5, torch.device("cpu"))[2:] = torch.tensor([1.0, 2.0, 3.0])
    feedback.attach_shard([run], [Piece("w", 1, 2, 0)], 4, torch.device("cpu"), None)[:2] = torch.tensor([10.0, 20.0])
    gradients = torch.zeros(5)
    feedback.settle([run], gradients, 4)
    assert gradients.tolist() == [0.0, 0.0, 1.0, 42.0, 83.0]
    feedback.settle([run], gradients, 4)
    assert gradients.tolist() == [0.0, 0.0, 1.0, 42.0, 83.0]


def refusals(rank: int) -> list[str]:
    found = []
    for options in (
        {"candidates": ()},
        {"candidates": "int8"},
        {"candidates": ("fp32", "int9")},
        {"candidates": ("int8", "int4"), "facts": (FAST, SPEEDS)},
    ):
        with pytest.raises(ValueError) as caught:
            comm.AutoState(**options)
        found.append(str(caught.value))
    return found


def test_auto_refuses_what_it_cannot_choose_from() -> None:
    (found,) = run_ranks(1, refusals)
    for message in found[:3]:
        assert "candidates must be some of fp32, bf16" in message
    assert "facts: no speed of int4" in found[3]


@pytest.mark.parametrize("codec", ["fp32", "bf16", "int8", "onebit"])
def test_speeds_are_of_this_earth(codec: str) -> None:
    speed = codec_speed(codec, 256, 4, codec == "int8", numel=1 << 14, seconds=1e-3)
    phases = (speed.encode, speed.reduce, speed.decode) if codec != "fp32" else (speed.encode,)
    assert all(1e-12 < phase < 1e-4 for phase in phases)
