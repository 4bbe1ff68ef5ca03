"""What must go together, and what must stay: networks that are hard to prune."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import prunable
import pytest
import torch
from torch import nn

from pykernels.prune import tracing
from pykernels.prune.coupling import Coupling, couple
from pykernels.prune.prune import _tried
from pykernels.prune.recipe import check_recipe, recipe_of
from pykernels.prune.surgery import TOLERANCE, Mismatch, check, cut, masked
from tests.networks import Function

IMAGE = (3, 8, 8)


SHAPES = {prunable.depthwise_of_one: (1, 8, 8), prunable.depthwise_first: (20, 8, 8)}


def groups_of(model: nn.Module, *shape: int, keep: tuple[str, ...] = ()) -> Coupling:
    x = torch.randn(2, *(shape or IMAGE))
    return _tried(model, (x,), couple(copy.deepcopy(model), (x,), keep), None)


def layers(found: Coupling) -> set[str]:
    """The layers that make channels which can go."""
    return {layer for group in found.groups for layer, axis in group.axes if axis == "out"}


# network -> the convolutions and linear layers whose channels can go
CASES: dict[Callable[[], nn.Module], set[str]] = {
    prunable.residual: {"0.0", "1.first.0", "1.second.0", "2.first.0", "2.second.0"},
    prunable.concatenation: {"stem.0", "a.0", "b.0", "c.0", "after.0"},
    prunable.concatenation_and_sum: {"stem.0", "a.0", "b.0", "c.0"},
    prunable.depthwise: {"stem.0", "expand.0", "wise.0", "squeeze", "excite", "project"},
    prunable.depthwise_of_one: {"1.0", "3"},
    prunable.depthwise_first: {"1"},
    prunable.grouped: {"2.0", "3.0"},
    prunable.grouped_as_if_depthwise: {"2.0", "3.0"},
    prunable.depthwise_multiplied: {"2.0", "3.0"},
    prunable.shared: {"stem.0", "block.0", "after.0"},
    prunable.flattened: {"0.0", "1.0", "4"},
    prunable.transposed: {"0.0", "1", "4.0"},
    prunable.normalized: {"0.0", "3.0", "8"},
    prunable.tied: {"4.0"},
    prunable.returned: {"stem.0"},
    prunable.scaled: {"after.0"},
    prunable.auxiliary: {"after.0"},
    prunable.recurrent: {"first.0", "up"},
    prunable.frozen: {"0", "3"},
    prunable.untraceable: {f"1.{unit}.branch.{layer}" for unit in (0, 1, 2) for layer in ("0.0", "1.0")},
}


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_any_channels_of_any_group_can_go(make: Callable[[], nn.Module]) -> None:
    shape = SHAPES.get(make, IMAGE)
    model = prunable.lively(make(), *shape)
    found = groups_of(model, *shape)
    weighted = {n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    assert layers(found) & weighted == CASES[make]
    assert set(found.left) == weighted - CASES[make]
    before = copy.deepcopy(model.state_dict())
    for seed in range(3):
        generator = random.Random(seed)
        kept = {
            g.name: sorted(generator.sample(range(len(g.units)), generator.randint(1, len(g.units))))
            for g in found.groups
        }
        recipe = check_recipe(model, recipe_of(model, found.groups, kept))
        pruned, x = cut(model, recipe), torch.randn(2, *shape)
        check(model, pruned, recipe, (x,))
        with torch.no_grad():
            answers = [y if isinstance(y, tuple) else (y,) for y in (masked(model, recipe)(x), pruned(x))]
        for expected, answer in zip(*answers, strict=True):
            assert (answer - expected).norm() <= TOLERANCE * expected.norm()
        assert sum(p.numel() for p in pruned.parameters()) <= sum(p.numel() for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "make, layer, why",
    [
        (prunable.grouped, "1.0", "4 groups"),
        (prunable.grouped_as_if_depthwise, "0.0", "32 groups"),
        (prunable.normalized, "1", "GroupNorm normalizes over them"),
        (prunable.normalized, "6", "LayerNorm normalizes over them"),
        (prunable.tied, "1", "shares a parameter with 3"),
        (prunable.returned, "features.0", "returns"),
        (prunable.scaled, "stem.0", "parameter of the model's own"),
        (prunable.depthwise_of_one, "2", "1 channels"),
        (prunable.residual, "3.2", "the model's answer"),
        (prunable.auxiliary, "aside.2", "in evaluation it is not called"),
        (prunable.recurrent, "second.0", "gru: it is a GRU"),
        (prunable.untraceable, "2.0", "2 returns them, and torch-pruning cannot trace Sequential"),
        (prunable.auxiliary, "stem.0", "in training, the model stops with RuntimeError"),
    ],
)
def test_what_stays_is_named_with_the_reason(make: Callable[[], nn.Module], layer: str, why: str) -> None:
    shape = SHAPES.get(make, IMAGE)
    assert why in groups_of(prunable.lively(make(), *shape), *shape).left[layer]


@pytest.mark.parametrize(
    "make, layer",
    [(prunable.attention, "block.qkv"), (prunable.written_size, "features.0"), (prunable.shuffled, "stem.0")],
)
def test_sizes_in_forward_are_refused_by_name_and_can_be_kept(make: Callable[[], nn.Module], layer: str) -> None:
    model = prunable.lively(make(), *IMAGE)
    with pytest.raises(ValueError, match=rf"(?s)'{layer}'.*keep=") as error:
        groups_of(model)
    names = str(error.value).split("keep=[")[1].split("]")[0].replace("'", "").split(", ")
    found = groups_of(model, keep=tuple(names))
    assert found.groups and layer not in layers(found) and "keep" in found.left[layer]


def test_where_channels_multiply_without_end_modules_are_traced_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prunable.lively(prunable.flattened(), *IMAGE)
    monkeypatch.setattr(tracing, "_TIMES_WIDEST", 0)  # the flattening before the linear layer is too much, then
    found = groups_of(nn.Sequential(model, nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 5))))
    assert layers(found) == {"1.0"}
    assert "torch-pruning cannot trace Sequential: OverflowError: channels multiply" in found.left["0.4"]


def test_a_name_in_keep_must_exist() -> None:
    with pytest.raises(ValueError, match=r"keep: the model has no module 'stem\.7'"):
        groups_of(prunable.residual(), keep=("stem.7",))


@pytest.mark.parametrize("broken", ["answer", "weights"])
def test_a_model_whose_answers_tell_nothing_is_refused(broken: str) -> None:
    model = prunable.lively(prunable.restless() if broken == "answer" else prunable.residual(), *IMAGE)
    if broken == "weights":
        nn.init.constant_(model[0][0].weight, float("nan"))
    with pytest.raises(ValueError, match=r"model: it cannot be checked, since with nothing removed .* finite"):
        groups_of(model)


def test_of_many_layers_a_few_trials_find_the_one_that_fails() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.odd(x) + sum(m.get_submodule(name)(x) for name in names)

    names = [f"plain{i}" for i in range(30)]
    plain = {name: nn.Sequential(prunable.conv(3, 32), prunable.head(32)) for name in names}
    model = prunable.lively(Function(forward, odd=prunable.shuffled(), **plain), *IMAGE)
    x, tried = torch.randn(2, *IMAGE), []
    with pytest.raises(ValueError, match=r"removed from 'odd\.stem\.0' \(.*keep=\['odd\.stem\.0'\]"):
        _tried(model, (x,), couple(copy.deepcopy(model), (x,)), lambda _, done, total: tried.append((done, total)))
    assert tried[-1] == (32, 32) and len(tried) <= 12


def test_a_wrong_coupling_is_found() -> None:
    """The check sees that a layer reads other channels than those that are left."""
    model = prunable.lively(prunable.residual(), *IMAGE)
    x = torch.randn(2, *IMAGE)
    recipe = recipe_of(model, couple(copy.deepcopy(model), (x,)).groups, {"1.first.0": range(0, 48, 2)})
    check(model, cut(model, recipe), recipe, (x,))
    recipe["layers"]["1.second.0"]["in"]["kept"] = list(range(1, 48, 2))
    with pytest.raises(Mismatch, match="differ by"):
        check(model, cut(model, recipe), recipe, (x,))
    with pytest.raises(Mismatch, match="differ by"):  # zeros tell nothing, noise does
        check(model, cut(model, recipe), recipe, (torch.zeros(2, *IMAGE),))


def test_a_model_that_cannot_take_noise_is_checked_on_its_example() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = prunable.residual()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(x.log())

    model, x = Logarithm().eval(), torch.rand(2, *IMAGE) + 0.5
    groups = couple(copy.deepcopy(model), (x,)).groups
    recipe = recipe_of(model, groups, {group.name: range(16) for group in groups})
    check(model, cut(model, recipe), recipe, (x,))
    with pytest.raises(Mismatch, match="not finite"):
        check(model, cut(model, recipe), recipe, (x - 2,))


def test_answers_that_rounding_alone_tells_apart_are_alike() -> None:
    """Where fp32 loses the answer in cancellation, fp64 decides."""

    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.plus, self.minus = nn.Linear(8, 256), nn.Linear(256, 4), nn.Linear(256, 4)
            with torch.no_grad():
                self.minus.weight.copy_(self.plus.weight + 1e-5 * torch.randn(4, 256))
                self.minus.bias.copy_(self.plus.bias)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            return self.plus(y) - self.minus(y)

    model, x = Cancelling(), torch.randn(16, 8)
    groups = couple(copy.deepcopy(model), (x,)).groups
    recipe = recipe_of(model, groups, {"stem": range(0, 256, 3)})
    pruned, whole = cut(model, recipe), masked(model, recipe)
    with torch.no_grad():
        expected, answer = whole(x), pruned(x)
    assert (answer - expected).norm() > TOLERANCE * expected.norm()
    check(model, pruned, recipe, (x,))
