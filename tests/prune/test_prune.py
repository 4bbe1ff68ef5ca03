"""pk.prune: as quick as was asked for, the same network otherwise, told in full, done again from its recipe."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator
from typing import Any

import prunable
import pytest
import torch
from clock import ticking
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

import pykernels as pk
from pykernels.bench import zoo
from pykernels.prune.coupling import couple
from pykernels.prune.importance import taylor
from pykernels.prune.latency import Latency, lower
from pykernels.prune.prune import _tried
from pykernels.prune.recipe import recipe_of
from pykernels.prune.surgery import cut, masked

IMAGE = (3, 16, 16)


@pytest.fixture
def clock() -> Iterator[None]:
    with ticking():
        yield


def network() -> nn.Module:
    return prunable.lively(prunable.residual(), *IMAGE)


def images(count: int = 3, labels: bool = False) -> list[Any]:
    found = [torch.randn(8, *IMAGE) for _ in range(count)]
    return [(x, torch.randint(0, 5, (8,))) for x in found] if labels else found


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, dict[str, torch.Tensor], pk.Pruned, list[str]]:
    torch.manual_seed(0)
    model, stages = network(), []
    model.train()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, *IMAGE)
    options: dict[str, Any] = {"precision": "fp32", "blocks": False, "progress": lambda s, d, n: stages.append(s)}
    with ticking():
        found = pk.prune(model, (x,), latency=0.7, data=images(), **options)
    return model, before, found, stages


def test_the_model_stays_as_it_is(pruned: Any) -> None:
    model, before, found, _ = pruned
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert model.training and not model[1].training and model[2].training
    assert not any(p.grad is not None for p in model.parameters())
    assert found.model[0].training and found.model is not model


def test_it_is_smaller_trains_and_says_what_was_done(pruned: Any) -> None:
    _model, _, found, stages = pruned
    report = found.report()
    assert 0.6 < report.measured <= 0.714 and report.predicted == pytest.approx(report.measured, rel=0.02)
    assert report.operations[1] < report.operations[0] and report.weights[1] < report.weights[0]
    assert report.importance.startswith("the squared change of the outputs")
    assert report.rows and report.left == {"3.2": "no layer with weights reads them: they are the model's answer"}
    for word in (report.rows[0].layer, "left as it is: 3.2", "fp32:", "predicted"):
        assert word in str(report)
    assert {"weighing channels", "timing layers", "measuring networks"} <= set(stages)
    before = copy.deepcopy(found.model.state_dict())
    small = copy.deepcopy(found.model)
    small.train()(torch.randn(4, *IMAGE)).sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in small.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), found.model.state_dict().values(), strict=True))


def test_widths_are_multiples_of_16(pruned: Any) -> None:
    _model, _, found, _ = pruned
    for row in found.report().rows:
        for whole, left in (row.reads, row.makes):
            assert left == whole or left % 16 == 0


def test_batch_norms_follow_what_was_removed() -> None:
    """Where the statistics were those of the data, they are again; what is unpruned stays, whatever the data."""
    model, x = network(), torch.randn(64, *IMAGE)
    zoo.settle(model, x)
    groups = couple(copy.deepcopy(model), (x[:2],)).groups
    recipe = recipe_of(model, groups, {group.name: range(16) for group in groups})
    found = pk.prune(model, (x[:2],), recipe=recipe, data=[x]).model
    kept = pk.prune(model, (x[:2],), recipe=recipe).model
    expected = zoo.settle(copy.deepcopy(found), x)
    for name, norm in found.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            other = expected.get_submodule(name)
            assert torch.allclose(norm.running_mean, other.running_mean, atol=1e-4), name
            assert torch.allclose(norm.running_var, other.running_var, rtol=1e-3), name
    assert not torch.allclose(found[1].first[1].running_mean, kept[1].first[1].running_mean, atol=1e-3)
    whole = pk.prune(model, (x[:2],), recipe=recipe_of(model, [], {}), data=[torch.rand(3, *IMAGE)]).model
    for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("size", [1, 8])
def test_a_batch_of_one_sample_is_no_statistic_behind_a_global_pool(size: int) -> None:
    layers = (nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 32, 1), nn.BatchNorm2d(32), nn.Flatten(), nn.Linear(32, 5))
    model, x = nn.Sequential(prunable.conv(3, 32), *layers).eval(), torch.randn(size, *IMAGE)
    recipe = recipe_of(model, [], {})
    if size > 1:
        pk.prune(model, (x,), recipe=recipe, data=[x])
    else:
        with pytest.raises(ValueError, match="data: entry 0 cannot serve batch norms"):
            pk.prune(model, (x,), recipe=recipe, data=[x])


def test_a_recipe_is_json_and_is_done_again(pruned: Any) -> None:
    model, _, found, _ = pruned
    recipe = json.loads(json.dumps(found.recipe))
    again = pk.prune(model, (torch.randn(2, *IMAGE),), recipe=recipe)
    assert again.recipe == found.recipe and again.report().precision is None
    shapes = [p.shape for p in again.model.parameters()]
    assert shapes == [p.shape for p in found.model.parameters()]
    x = torch.randn(2, *IMAGE)
    with torch.no_grad():
        expected, answer = masked(model, recipe).eval()(x), again.model.eval()(x)
    assert (answer - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(
    "harm, message",
    [
        (lambda r: r.clear(), "version 1"),
        (lambda r: r.update(blocks=["7"]), "no block '7'"),
        (lambda r: r["layers"].update({"9.first": {"out": {"of": 4, "kept": [0]}}}), r"no layer '9\.first'"),
        (lambda r: r["layers"].update({"0": {"out": {"of": 4, "kept": [0]}}}), "cannot be removed"),
        (lambda r: r["layers"]["0.0"].update(out={"of": 31, "kept": [0]}), "for another model"),
        (lambda r: r["layers"]["0.0"].update(out={"of": 32, "kept": [0, 0]}), "must rise"),
        (lambda r: r["layers"]["0.0"].update(out={"of": 32, "kept": [0, 32]}), "from 0 to 31"),
        (lambda r: r["layers"]["0.0"].update(out={"of": 32, "kept": []}), "kept must be"),
        (lambda r: r["layers"]["0.0"].update(out={"of": 32, "kept": ["0"]}), "kept must be"),
        (lambda r: r["layers"]["0.0"].update(up={"of": 32, "kept": [0]}), "'in' or 'out'"),
        (lambda r: r["layers"].pop("0.1"), "stops with RuntimeError"),
    ],
)
def test_a_recipe_is_not_trusted(harm: Any, message: str) -> None:
    model, x = network(), torch.randn(2, *IMAGE)
    groups = couple(copy.deepcopy(model), (x,)).groups
    recipe = recipe_of(model, groups, {group.name: range(16) for group in groups})
    harm(recipe)
    with pytest.raises(ValueError, match=message):
        pk.prune(model, (x,), recipe=recipe)


@pytest.mark.parametrize("make", [prunable.depthwise, prunable.concatenation, prunable.flattened, prunable.transposed])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_latency_of_any_widths_is_predicted(make: Any, precision: str) -> None:
    """By a clock that counts: what is made at other widths takes what was predicted of it."""
    model, x = prunable.lively(make(), *IMAGE), torch.randn(1, *IMAGE)
    groups = couple(copy.deepcopy(model), (x,)).groups
    with ticking():
        lowered = lower(model, (x,), precision)
        latency = Latency(model, lowered, groups)
        latency.measure()
        whole = latency(latency.full)
        assert whole == pytest.approx(sum(lowered.steps().values()))
        state = latency.full
        for number, group in enumerate(groups):
            state = state.but(group.name, group.widths[number % len(group.widths)])
        small = cut(model, recipe_of(model, groups, {name: range(w) for name, w in state.widths.items()}))
        made = sum(lower(small, (x,), precision).steps().values())
    assert made < 0.95 * whole
    assert latency(state) == pytest.approx(made, rel=0.1)


def test_layers_are_timed() -> None:
    """By the true clock: the fewest channels take less than all."""
    model, x = prunable.lively(prunable.depthwise(), 3, 32, 32), torch.randn(1, 3, 32, 32)
    groups = couple(copy.deepcopy(model), (x,)).groups
    latency = Latency(model, lower(model, (x,), "fp32"), groups)
    latency.measure()
    narrow = latency.full
    for group in groups:
        narrow = narrow.but(group.name, 16)
    assert {step.where for step in latency.steps if step.alone is not None} >= {"expand.0", "wise.0", "project"}
    assert 0 < latency(narrow) < latency(latency.full)


@pytest.mark.usefixtures("clock")
def test_a_dropped_block_hands_on_its_input() -> None:
    torch.manual_seed(1)
    model = prunable.lively(nn.Sequential(prunable.conv(3, 32), prunable.Residual(32, 256), prunable.head(32)), *IMAGE)
    with torch.no_grad():
        model[1].second[1].weight.mul_(1e-3)
        model[1].second[1].bias.zero_()  # the block adds nearly nothing
    x = torch.randn(4, *IMAGE)
    found = pk.prune(model, (x,), latency=0.3, data=images(), precision="fp32")
    assert found.recipe["blocks"] == ["1"] and isinstance(found.model[1], nn.Identity)
    assert not any(name.startswith("1.") for name in found.recipe["layers"])
    assert "dropped: 1" in str(found.report())
    kept = pk.prune(model, (x,), latency=0.3, data=images(), precision="fp32", blocks=False)
    assert kept.recipe["blocks"] == [] and kept.report().measured is not None


@pytest.mark.usefixtures("clock")
def test_labels_a_loss_and_weights_alone_weigh_differently() -> None:
    model, x = network(), torch.randn(2, *IMAGE)
    options: dict[str, Any] = {"latency": 0.8, "precision": "fp32", "blocks": False}
    said = [
        pk.prune(model, (x,), data=images(labels=True), **options).report().importance,
        pk.prune(model, (x,), data=images(labels=True), loss=F.multi_margin_loss, **options).report().importance,
        pk.prune(model, (x,), importance="magnitude", **options).report().importance,
    ]
    for text, word in zip(said, ("cross entropy", "the loss that was given", "squared weights"), strict=True):
        assert word in text


@pytest.mark.usefixtures("clock")
def test_a_data_loader_and_16_bit_floats() -> None:
    model, x = network(), torch.randn(2, *IMAGE)
    data = TensorDataset(torch.randn(20, *IMAGE), torch.randint(0, 5, (20,)))
    found = pk.prune(model, (x,), latency=0.8, data=DataLoader(data, 8), precision="bf16", blocks=False)
    assert found.report().precision == "bf16" and "3 batches" in found.report().importance
    assert found.report().predicted == pytest.approx(found.report().measured, rel=0.05)


def test_importance_is_the_change_of_the_answer() -> None:
    """Beside masking each channel by itself: a first-order estimate ranks them alike."""
    model, x = network(), torch.randn(8, *IMAGE)
    groups = _tried(model, (x,), couple(copy.deepcopy(model), (x,)), None).groups
    found = taylor(copy.deepcopy(model), groups, [x] * 16, 1)
    group = next(g for g in groups if g.name == "1.first.0")
    with torch.no_grad():
        answer = model(x)
        true = torch.tensor(
            [
                float(
                    (masked(model, recipe_of(model, [group], {group.name: [*range(i), *range(i + 1, 48)]}))(x) - answer)
                    .square()
                    .sum()
                )
                for i in range(48)
            ]
        )
    ranks = torch.stack([found.units[group.name].float().argsort().argsort(), true.argsort().argsort()]).float()
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    assert 0.3 < float(found.units[group.name].sum() / true.sum()) < 3


class Refused:
    """Models that are refused as a whole, with what is said."""

    @staticmethod
    def hooked() -> nn.Module:
        model = network()
        model[1].first[0].register_forward_hook(lambda *_: None)
        return model

    @staticmethod
    def parametrized() -> nn.Module:
        model = network()
        parametrize.register_parametrization(model[1].first[0], "weight", nn.Identity())
        return model

    @staticmethod
    def sixteen_bits() -> nn.Module:
        return network().bfloat16()

    @staticmethod
    def narrow() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize(
    "make, message",
    [
        (Refused.hooked, r"'1\.first\.0' has hooks"),
        (Refused.parametrized, r"'1\.first\.0' has parametrizations"),
        (Refused.sixteen_bits, "weights of torch.bfloat16"),
        (lambda: torch.compile(network(), backend="eager"), r"it is compiled \(torch\.compile\): give the module"),
        (lambda: pk.optimize(network(), torch.randn(2, *IMAGE)), "it is a Optimized: give the nn.Module"),
        (nn.ReLU, "nothing of it can be pruned: it has no layer"),
        (Refused.narrow, "nothing of it can be pruned: '0' .8 channels"),
    ],
)
def test_models_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pk.prune(make(), (torch.randn(2, *IMAGE),), latency=0.5, importance="magnitude")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "latency: give a latency to reach, or a recipe"),
        ({"latency": 0.5, "recipe": {}}, ValueError, "not both"),
        ({"latency": 1.5}, ValueError, "between 0 and 1, not 1.5"),
        ({"latency": "0.5"}, ValueError, "latency: .* between 0 and 1, not '0.5'"),
        ({"latency": 0.5, "keep": "0.0"}, ValueError, "keep: a list of names of modules is needed, not '0.0'"),
        ({"latency": 0.5, "data": 5}, ValueError, "data: a loader or a list of batches is needed, not one int"),
        ({"latency": 0.5, "data": torch.randn(4, *IMAGE)}, ValueError, "data: .* not one Tensor"),
        ({"latency": 0.5, "data": [torch.randn(4, 1, 16, 16)]}, ValueError, "data: .* fails on entry 0: RuntimeError"),
        (
            {"latency": 0.5, "data": [(torch.randn(4, *IMAGE), torch.full((4,), 9))]},
            ValueError,
            "data: .* fails on entry 0: IndexError: Target 9 is out of bounds",
        ),
        ({"latency": 0.5, "data": images(labels=True), "loss": "ce"}, ValueError, "loss: expected a function"),
        (
            {"latency": 0.5, "data": images(labels=True), "loss": lambda y, _: y},
            ValueError,
            "data: .* entry 0: ValueError: it must give a scalar tensor",
        ),
        (
            {"latency": 0.5, "data": images(labels=True), "loss": lambda y, _: y.detach().sum()},
            ValueError,
            "loss: what it gives has no gradient",
        ),
        ({"latency": 0.5, "data": None}, ValueError, "data: importance 'taylor' needs some"),
        ({"latency": 0.5, "data": []}, ValueError, "data: it is empty"),
        ({"latency": 0.5, "data": iter([1])}, ValueError, "read once only"),
        ({"latency": 0.5, "data": [{"x": 1}]}, TypeError, "data: entry 0 is a dict"),
        (
            {"latency": 0.5, "data": [torch.full((8, *IMAGE), torch.nan)]},
            ValueError,
            "data: the gradients at .* not finite",
        ),
        ({"latency": 0.5, "loss": F.cross_entropy}, ValueError, "entry 0 of data has no label"),
        ({"latency": 0.5, "precision": "int4"}, ValueError, "precision: 'int4' is none of"),
        ({"latency": 0.5, "importance": "size"}, ValueError, "importance: 'size' is neither"),
        (
            {"latency": 0.01, "precision": "fp32"},
            ValueError,
            r"latency: 0\.010 cannot be reached: .* Left as it is: '3\.2'",
        ),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pk.prune(network(), (torch.randn(2, *IMAGE),), **{"data": images(), **options})


@pytest.mark.parametrize("given", [{}, {"x": 1}, None, 3, torch.randn(2, 1, 16, 16), (torch.randn(2, *IMAGE),) * 2])
def test_an_example_that_is_no_call(given: Any) -> None:
    with pytest.raises(ValueError, match=r"example_inputs: (a tensor, or a tuple|the model does not run on them)"):
        pk.prune(network(), given, latency=0.5, importance="magnitude")


@pytest.mark.usefixtures("clock")
def test_where_a_later_try_cannot_be_reached_the_earlier_one_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured time of a network stays above what is predicted, until nothing more can be removed."""
    module = sys.modules["pykernels.prune.prune"]
    monkeypatch.setattr(module, "compare", lambda *networks: [1.0, 0.9])
    with pytest.warns(UserWarning, match=r"the budget of 0\.300 was missed: the quickest of \d network.* 0\.900"):
        found = pk.prune(network(), (torch.randn(2, *IMAGE),), latency=0.3, data=images(), precision="fp32")
    assert found.report().measured == 0.9


@pytest.mark.usefixtures("clock")
def test_channels_that_nobody_can_take_away_are_refused_by_name() -> None:
    model = prunable.lively(prunable.attention(), *IMAGE)
    with pytest.raises(ValueError, match=r"channels cannot be removed from 'block\.qkv'.*keep=\['block\.qkv'\]"):
        pk.prune(model, (torch.randn(2, *IMAGE),), latency=0.9, importance="magnitude")
    found = pk.prune(
        model, (torch.randn(2, *IMAGE),), latency=0.97, importance="magnitude", precision="fp32", keep=["block.qkv"]
    )
    assert {row.layer for row in found.report().rows} == {"block.up", "block.down"}


def test_without_torch_pruning_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ModuleNotFoundError, match=r"pykernels\[compress\]"):
        pk.prune(network(), (torch.randn(2, *IMAGE),), latency=0.5, data=images())


def test_cutting_does_not_share_tensors_with_the_model() -> None:
    model, x = network(), torch.randn(2, *IMAGE)
    groups = couple(copy.deepcopy(model), (x,)).groups
    small = cut(model, recipe_of(model, groups, {groups[0].name: range(16)}))
    ours = {t.data_ptr() for t in (*small.parameters(), *small.buffers()) if t.numel()}
    assert not ours & {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
