"""Collectives that return their answers: what they compute, their gradients, compiled, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import alike, error, run_ranks

from pykernels import comm

OPS: dict[str, Callable[..., torch.Tensor]] = {
    name: getattr(comm, name) for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
}
SAME = ("all_reduce", "all_gather")  # every rank gets the same
ROWS, WIDTH = 12, 320  # rows for 2, 3 and 4 ranks; a width that is no power of two
LEAST: dict[str, Any] = {"least": 0}


def values(rank: int) -> torch.Tensor:
    return torch.randn(ROWS, 3, WIDTH, generator=torch.Generator().manual_seed(rank))


def expected(name: str, everyone: list[torch.Tensor], rank: int) -> torch.Tensor:
    world = len(everyone)
    parts = [x.chunk(world)[rank] for x in everyone]
    answers = {
        "all_reduce": lambda: torch.stack(everyone).sum(0),
        "all_gather": lambda: torch.cat(everyone),
        "reduce_scatter": lambda: torch.stack(parts).sum(0),
        "all_to_all": lambda: torch.cat(parts),
    }
    return answers[name]()


def computes(rank: int) -> dict[str, Any]:
    world = dist.get_world_size()
    everyone = [values(r) for r in range(world)]
    answers: dict[str, Any] = {}
    for name, op in OPS.items():
        true = expected(name, everyone, rank)
        for codec, bound in (("fp32", 1e-6), ("bf16", 0.005), ("int8", 0.015), ("int4", 0.3)):
            found = op(everyone[rank], codec, **LEAST)
            answers[f"{name} {codec}"] = error(found, true), bound
            answers[f"{name} {codec}: alike"] = name not in SAME or alike(found)
        answers[f"{name}: small ones are exact"] = error(op(everyone[rank][..., :8]), true[..., :8]), 1e-6
        answers[f"{name}: integers"] = torch.equal(
            op(everyone[rank].mul(100).long(), **LEAST), expected(name, [x.mul(100).long() for x in everyone], rank)
        )
        empty = op(everyone[rank][..., :0], **LEAST)
        answers[f"{name}: empty"] = empty.shape == expected(name, [x[..., :0] for x in everyone], rank).shape
        half = op(everyone[rank].bfloat16(), **LEAST)
        answers[f"{name}: bf16"] = half.dtype == torch.bfloat16 and error(half.float(), true) < 0.02
        if name != "all_reduce":
            turned = op(everyone[rank].transpose(0, 1), dim=1, **LEAST)
            answers[f"{name}: dim 1"] = torch.equal(turned, op(everyone[rank], **LEAST).transpose(0, 1))

        # the gradient, against that of the definition on all ranks' tensors: sum over ranks of <answer, weights>
        leaves = [x.clone().requires_grad_() for x in everyone]
        generator = torch.Generator().manual_seed(99)
        weights = [torch.randn(true.shape, generator=generator) for _ in range(world)]
        total = sum((expected(name, leaves, r) * weights[r]).sum() for r in range(world))
        (wanted,) = torch.autograd.grad(total, leaves[rank])
        x = values(rank).requires_grad_()
        op(x, **LEAST).backward(weights[rank])
        assert x.grad is not None
        answers[f"{name}: gradient"] = error(x.grad, wanted), 0.015
    return answers


def compiles(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    for name, op in OPS.items():

        def call(x: torch.Tensor, op: Any = op) -> torch.Tensor:
            return op(x * 2, "int8", **LEAST).relu()

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        one, two = (values(rank).requires_grad_() for _ in range(2))
        eager, found = call(one), compiled(two)
        eager.sum().backward()
        found.sum().backward()
        answers[f"{name}: compiled"] = torch.equal(eager, found) and torch.equal(one.grad, two.grad)

    def one_after_another(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        for name in ("all_reduce", "all_to_all", "reduce_scatter", "all_gather"):
            x = OPS[name](x, "int8", **LEAST)
        return x.relu()

    one, two = (values(rank).requires_grad_() for _ in range(2))
    eager, found = one_after_another(one), torch.compile(one_after_another, fullgraph=True, backend="inductor")(two)
    eager.sum().backward()
    found.sum().backward()
    answers["inductor"] = torch.equal(eager, found) and torch.equal(one.grad, two.grad)
    group = dist.group.WORLD
    assert group is not None
    arguments = (values(rank), "int8", 256, 0, group.group_name)
    checks = torch.library.opcheck(torch.ops.pykernels_comm.all_reduce.default, arguments)
    answers["opcheck"] = set(checks.values()) == {"SUCCESS"}
    return answers


def refuses(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {
        "codec": lambda: comm.all_reduce(values(rank), "int9"),
        "block": lambda: comm.all_reduce(values(rank), block=100),
        "without dimensions": lambda: comm.all_gather(torch.tensor(1.0)),
        "along": lambda: comm.reduce_scatter(values(rank)[: 2 * dist.get_world_size() - 1]),
        "not as many": lambda: comm.all_to_all(values(rank)[: 2 * dist.get_world_size() - 1]),
    }
    for word, call in calls.items():
        with pytest.raises(ValueError) as raised:
            call()
        answers[word] = word in str(raised.value)
    return answers


def everything(rank: int) -> dict[str, Any]:
    return {**computes(rank), **refuses(rank)}


def check(found: list[dict[str, Any]]) -> None:
    for answers in found:
        for what, answer in answers.items():
            if isinstance(answer, tuple):
                assert answer[0] <= answer[1], (what, answer)
            else:
                assert answer, what


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_collectives_compute_what_they_say(world: int) -> None:
    check(run_ranks(world, everything))


@pytest.mark.slow
def test_each_is_one_op_for_a_compiler() -> None:
    check(run_ranks(2, compiles))
