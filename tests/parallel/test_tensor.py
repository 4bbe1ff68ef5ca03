"""Linear layers split over ranks with compressed collectives, against the whole network in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import alike, error, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import pykernels as pk
from pykernels.comm import tensor_parallel

pytestmark = pytest.mark.xdist_group("two ranks of tests/parallel")
WIDTH, INNER, TOKENS = 256, 512, 24


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))


def tokens() -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def weights() -> torch.Tensor:
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


def whole(parameter: torch.Tensor | None) -> torch.Tensor:
    assert parameter is not None
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def splits(rank: int) -> dict[str, Any]:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    answers: dict[str, Any] = {}
    reference = network()
    x = tokens().requires_grad_()
    true = reference(x)
    true.backward(weights())

    def judge(what: str, model: nn.Module, bound: float, sequence: bool = False) -> None:
        """Its answer and every gradient, and whether the ranks are alike; of a sequence each rank has its tokens."""
        mine = slice(None) if not sequence else slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
        y = tokens()[:, mine].clone().requires_grad_()
        found = model(y)
        found.backward(weights()[:, mine])
        answers[f"{what}: answer"] = error(found, true[:, mine]), bound
        answers[f"{what}: gradient of the input"] = error(y.grad, x.grad[:, mine]), bound
        for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
            if not (sequence and name.startswith("0.")):  # torch leaves the sum over a norm's tokens to its user
                answers[f"{what}: gradient of {name}"] = error(whole(p.grad), q.grad), bound
        answers[f"{what}: ranks"] = sequence or (alike(found.detach()) and alike(y.grad))

    plan: dict[str, Any] = {"1": "colwise", "3": "rowwise"}
    for codec, bound in (("fp32", 1e-5), ("int8", 0.02)):
        judge(codec, parallelize_module(network(), mesh, tensor_parallel(plan, codec, least=0)), bound)
    judge("small", parallelize_module(network(), mesh, tensor_parallel(plan, "int4", least=1 << 20)), 1e-5)
    sequences = {
        "0": SequenceParallel(use_local_output=True),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Shard(1)),
    }
    for codec, bound in (("fp32", 1e-5), ("int8", 0.02)):
        model = parallelize_module(network(), mesh, tensor_parallel(sequences, codec, least=0))
        judge(f"sequences {codec}", model, bound, sequence=True)

    model = parallelize_module(network(), mesh, tensor_parallel(plan, "int8", least=0))
    answers["checkpoint"] = torch.equal(whole(model.state_dict()["3.weight"]), reference.state_dict()["3.weight"])

    for word, bad in {
        "output_layouts": {"1": ColwiseParallel(output_layouts=Shard(1))},
        "input_layouts": {"3": RowwiseParallel(input_layouts=Replicate())},
        "from the front": {"3": RowwiseParallel(output_layouts=Shard(-1))},
        "colwise, rowwise": {"1": "columns"},
        "or a style, not None": {"1": None},
        "LayerNorm": {"0": "colwise"},
    }.items():
        with pytest.raises(ValueError) as raised:
            parallelize_module(network(), mesh, tensor_parallel(bad))
        answers[f"refused: {word}"] = word in str(raised.value)
    for word, options in {"codec": {"codec": "int9"}, "block": {"block": 100}}.items():
        with pytest.raises(ValueError, match=word):
            tensor_parallel(plan, **options)

    class Mine(ColwiseParallel):
        """A style of somebody's own."""

    mine = Mine()
    answers["styles of others stay"] = tensor_parallel({"1": mine})["1"] is mine
    return answers


def check(found: list[dict[str, Any]]) -> None:
    for answers in found:
        assert answers
        for what, answer in answers.items():
            assert answer[0] < answer[1] if isinstance(answer, tuple) else answer, (what, answer)


def test_layers_that_are_split_answer_as_whole_ones(found: list[dict[str, Any]]) -> None:
    check([answers["splits"] for answers in found])


class Language(nn.Module):
    """Words, a residual block, and logits: what torch's plans for language models are written for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(WORDS, WIDTH)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        return self.head(self.last(x + self.inner(self.norm(x))))


def gathered(layout: Any) -> Any:
    return PrepareModuleInput(input_layouts=(layout,), desired_input_layouts=(Replicate(),))


WORDS = 101  # so many are for no number of ranks
PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "tokens": lambda: {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "inner.0": ColwiseParallel(),
        "inner.2": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    },
    "sequences": lambda: {
        "words": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
        "norm": SequenceParallel(),
        "inner": gathered(Shard(1)),
        "inner.0": ColwiseParallel(),
        "inner.2": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "last": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
    "logits in parts": lambda: {
        "words": ColwiseParallel(output_layouts=Replicate()),
        "inner.0": ColwiseParallel(use_local_output=False),
        "inner.2": RowwiseParallel(),
        "head": ColwiseParallel(use_local_output=False),
    },
}


def plans(rank: int) -> dict[str, Any]:
    """Plans as torch's users write them, against the whole network in one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(3)
    words, following = (torch.randint(0, WORDS, (4, TOKENS), generator=generator) for _ in range(2))

    def loss(model: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(model(words).flatten(0, 1), following.flatten())

    reference = Language()
    true = loss(reference)
    true.backward()
    answers: dict[str, Any] = {}
    for name, plan in PLANS.items():
        for codec, bound in (("fp32", 1e-5), ("int8", 0.02)):
            model = parallelize_module(Language(), mesh, tensor_parallel(plan(), codec, least=0))
            with loss_parallel() if name == "logits in parts" else contextlib.nullcontext():
                found = loss(model)
                found.backward()
            what = f"{name}, {codec}"
            answers[f"{what}: loss"] = error(whole(found.detach()), true.detach()), bound
            answers[f"{what}: ranks"] = alike(whole(found.detach()))
            for (parameter, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
                answers[f"{what}: gradient of {parameter}"] = error(whole(p.grad), q.grad), bound

    # under autocast the layer's dtype is that of the sums, as of a whole layer, whatever its bias has
    model = parallelize_module(network(), mesh, tensor_parallel({"1": "colwise", "3": "rowwise"}, least=0))
    with torch.autocast("cpu", torch.bfloat16):
        answers["autocast"] = model(tokens()).dtype == network()(tokens()).dtype == torch.bfloat16
    return answers


def test_plans_of_torchs_users_train_as_one_process(found: list[dict[str, Any]]) -> None:
    check([answers["plans"] for answers in found])


@pytest.mark.slow
def test_plans_of_torchs_users_train_as_one_process_on_three_ranks() -> None:
    check(run_ranks(3, plans))


def swapped(model: nn.Module) -> nn.Module:
    pk.swap(model.eval(), "int8")
    return model


def int8(rank: int) -> dict[str, Any]:
    """Layers of `swap`, split, against the swapped ones in one process."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    answers: dict[str, Any] = {}
    x, whole = tokens(), swapped(network())
    with torch.no_grad():
        true, inner = whole(x), whole[:3](x)
        for codec, bound in (("fp32", 0.01), ("int8", 0.015)):
            plan = tensor_parallel({"1": "colwise", "3": "rowwise"}, codec, least=0)
            model = parallelize_module(swapped(network()), mesh, plan)
            mine = slice(rank * INNER // world, (rank + 1) * INNER // world)
            answers[f"{codec}: columns have the bits of the whole"] = torch.equal(model[:3](x), inner[..., mine])
            answers[f"{codec}: rows"] = error(model(x), true), bound
            answers[f"{codec}: ranks"] = alike(model(x))
    model.train()
    with pytest.raises(RuntimeError, match="runs in evaluation alone"):
        model(x)
    activated, odd = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), nn.Sequential(nn.Linear(WIDTH, 5))
    for word, bad, style in (
        ("relu belongs", activated, "rowwise"),
        ("5 outputs", odd, "colwise"),
        ("input_layouts", odd, ColwiseParallel(input_layouts=Shard(1))),
        ("output_layouts", odd, ColwiseParallel(output_layouts=Replicate())),
        ("use_local_output", odd, RowwiseParallel(use_local_output=False)),
    ):
        with pytest.raises(ValueError, match=word):
            parallelize_module(swapped(bad), mesh, tensor_parallel({"0": style}))
    return answers


def test_int8_layers_are_split_for_inference(found: list[dict[str, Any]]) -> None:
    check([answers["int8"] for answers in found])


def compiled(rank: int) -> bool:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(network(), mesh, tensor_parallel({"1": "colwise", "3": "rowwise"}, "int8", least=0))
    one, two = (tokens().requires_grad_() for _ in range(2))
    eager, found = model(one), torch.compile(model, fullgraph=True, backend="aot_eager")(two)
    for y in (eager, found):
        y.backward(weights())
    assert one.grad is not None and two.grad is not None
    return torch.equal(eager, found) and torch.equal(one.grad, two.grad)


@pytest.mark.slow
def test_a_compiled_network_answers_with_the_same_bits() -> None:
    assert run_ranks(2, compiled) == [True, True]
