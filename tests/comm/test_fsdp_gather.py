"""Weights that FSDP2 gathers through a codec: all that two ranks are asked, since to start them costs more."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import alike, error, run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from pykernels import comm

# By codec: the error of the weights in the first forward pass, at most; how many times fewer bytes travel, at least.
GATHERED = {
    "int8": (0.01, 3.3),
    "fp8": (0.05, 3.3),
    "bf16": (0.003, 1.8),
    "int4": (0.0, 4.0),
}  # whose first message is exact
WAYS: list[tuple[bool, torch.dtype | None]] = [(True, None), (False, None), (True, torch.bfloat16)]
STEPS = 40


def network() -> nn.Sequential:
    """Rows that do not divide by the number of ranks, a norm, two groups, a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Linear(50, 301), nn.LayerNorm(301), nn.ReLU()),
        nn.Linear(301, 70),
        nn.ReLU(),
        nn.Linear(70, 10),
    )
    model[1].requires_grad_(False)
    return model


def sharded(**options: Any) -> nn.Module:
    model = network()
    fully_shard(model[0], **options)
    return fully_shard(model, **options)


def loss(model: nn.Module, rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(16, 50, generator=generator)
    return nn.functional.cross_entropy(model(x).float(), x[:, :10].argmax(1))


def seen_by(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the layers compute with, forwards and backwards, noted as they do."""
    found: dict[str, torch.Tensor] = {}

    def forward(name: str) -> Any:
        return lambda layer, *_: found.update({name: layer.weight.detach().clone()})

    def backward(name: str) -> Any:
        return lambda layer, *_: found.update({f"{name} backwards": layer.weight.detach().clone()})

    for name, layer in (("first", model[0][0]), ("frozen", model[1]), ("norm", model[0][1])):
        layer.register_forward_pre_hook(forward(name))
        layer.register_full_backward_pre_hook(backward(name))
    return found


def weights(rank: int) -> dict[str, Any]:
    answers: dict[str, Any] = {}
    exact = network()
    for codec, (bound, fewer) in GATHERED.items():
        for reshard, dtype in WAYS if codec in ("int8", "int4") else WAYS[:1]:
            what = f"{codec}, {reshard}, {dtype}"
            model = sharded(reshard_after_forward=reshard, mp_policy=MixedPrecisionPolicy(param_dtype=dtype))
            handle = comm.register(model, "int8", gather=codec)
            found = seen_by(model)
            loss(model, rank, 0).backward()
            true = exact[0][0].weight.detach()
            near = 0.003 if dtype else 1e-7  # of bf16 weights alone
            answers[f"{what}: ranks"] = all(alike(w) for w in found.values())
            answers[f"{what}: error"] = error(found["first"].float(), true) <= bound + near
            if dtype is None and codec != "int4":
                mine = slice(151 * rank, 151 * rank + 100)  # of the shard that this rank has exactly
                answers[f"{what}: own shard, too"] = not torch.equal(found["first"][mine], true[mine])
            answers[f"{what}: norms are exact"] = torch.equal(found["norm"].float(), torch.ones(301))
            answers[f"{what}: backwards"] = torch.equal(found["first"], found["first backwards"])
            answers[f"{what}: exact shards"] = all(
                torch.equal(kept.full_tensor(), p)
                for kept, p in zip(model.state_dict().values(), exact.state_dict().values(), strict=True)
            )
            for step in range(1, 12):
                loss(model, rank, step).backward()
            ratio = handle.gathers.stats().ratio
            answers[f"{what}: bytes, {ratio:.2f}"] = ratio > fewer * (0.5 if dtype else 1.0)
    return answers


def training(rank: int) -> dict[str, tuple[float, bool]]:
    """The mean loss of the last ten steps, and whether weights were alike throughout."""
    answers = {}
    for codec in (None, "int8", "int4"):
        model = sharded()
        handle = comm.register(model, "bf16", gather=codec)
        found = seen_by(model)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1, momentum=0.9)
        losses, same = [], True
        for step in range(STEPS):
            optimizer.zero_grad()
            value = loss(model, rank, step)
            value.backward()
            optimizer.step()
            losses.append(float(value))
            if step % 8 == 0:
                same &= all(alike(w) for w in found.values())
        mean = torch.tensor(losses[-10:]).mean()
        dist.all_reduce(mean)
        answers[str(codec)] = float(mean) / 2, same
        if codec == "int4":  # what was loaded is sent exactly, not as a difference to what it replaces
            state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
            model.load_state_dict(state)
            handle.load_state_dict(handle.state_dict())
            loss(model, rank, 0)
            answers["loaded"] = 0.0, bool((found["first"] == 0).all())
    return answers


def complaints(rank: int) -> list[str]:
    messages = []

    def expect(kind: type[Exception], model: nn.Module, **options: Any) -> None:
        with pytest.raises(kind) as raised:
            comm.register(model, "int8", **options)
        messages.append(str(raised.value))

    expect(ValueError, sharded(), gather="onebit")
    expect(ValueError, sharded(), gather="int8", gather_block=100)
    mixed = network()
    mixed[3].double()
    expect(ValueError, fully_shard(mixed), gather="int8")
    expect(RuntimeError, sharded(), gather="int8" if rank else "int4")
    return messages


def everything(rank: int) -> dict[str, Any]:
    return {function.__name__: function(rank) for function in (weights, training, complaints)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return run_ranks(2, everything)


pytestmark = pytest.mark.xdist_group("two ranks of test_fsdp_gather")


def test_all_ranks_compute_with_the_same_weights_and_keep_exact_shards(found: list[dict[str, Any]]) -> None:
    for answers in (answers["weights"] for answers in found):
        assert not [what for what, good in answers.items() if not good]


def test_a_training_learns_as_with_exact_weights(found: list[dict[str, Any]]) -> None:
    for answers in (answers["training"] for answers in found):
        assert all(same for _, same in answers.values())
        true, _ = answers["None"]
        for codec in ("int8", "int4"):
            assert abs(answers[codec][0] - true) < 0.03 * true, answers


def test_what_is_wrong_is_named(found: list[dict[str, Any]]) -> None:
    words = ("gather must be one of", "gather_block", "float32, float64", "the gathering of weights differs")
    for messages in (answers["complaints"] for answers in found):
        for word, message in zip(words, messages, strict=True):
            assert word in message
