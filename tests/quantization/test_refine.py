"""Refinement within its bounds: which layers are rounded in parts or not at all, in what memory, and what is told."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from pykernels.graph.export import export
from pykernels.quantization import Int8Quantizer, quantize
from pykernels.quantization import refine as module
from pykernels.quantization.refine import Refinement, float_weights, refine

from .graphs import relative_error


def wide() -> nn.Module:
    """Sums of 27, 576 and 64 terms; the middle layer is the one that does not fit small bounds."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 16, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


def samples(count: int, seed: int = 1) -> torch.Tensor:
    """Images whose channels and neighbours are correlated: there is something to make up for errors with."""
    noise = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (noise.mean((1, 2, 3), keepdim=True) + noise.cumsum(2) + noise.sum(1, keepdim=True)) / 3


def converted(net: nn.Module, x: torch.Tensor) -> tuple[GraphModule, dict[str, torch.Tensor]]:
    """What `refine` takes: weights rounded to the nearest values, and the fp32 weights."""
    prepared = prepare_pt2e(export(net, (x[:2],)).program.module(), Int8Quantizer())
    prepared(x)
    weights = float_weights(prepared)
    return convert_pt2e(prepared), weights


def int8_weights(graph: GraphModule) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in graph.named_buffers() if t.dtype == torch.int8}


@pytest.mark.parametrize("bound", ["ROOM", "WORK"])
def test_a_large_layer_is_rounded_in_parts(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, bound, {"ROOM": 8 << 20, "WORK": 300 << 20}[bound])
    net, x = wide(), samples(32)
    record = quantize(net, (x[:2],), [x]).meta["pykernels_quantization"]
    assert record.refined == ["conv2d", "conv2d_1", "linear"] and not record.unrefined
    assert list(record.in_parts) == ["conv2d_1"] and 2 <= record.in_parts["conv2d_1"] <= 4


@torch.no_grad()
def test_parts_are_better_than_the_nearest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, unseen = wide(), samples(32), samples(64, seed=2)
    exact = net(unseen)
    errors = {}
    for name, room in (("whole", module.ROOM), ("parts", 8 << 20), ("nearest", 1)):
        monkeypatch.setattr(module, "ROOM", room)
        errors[name] = relative_error(quantize(net, (x[:2],), [x])(unseen), exact)
    assert errors["parts"] < errors["nearest"]


def test_a_layer_that_no_parts_make_small_enough_keeps_the_nearest_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_PART", 300)
    monkeypatch.setattr(module, "ROOM", 1 << 20)
    x = samples(32)
    graph, weights = converted(wide(), x)
    before = int8_weights(graph)
    done = refine(graph, weights, [(x,)])
    assert done.refined == ["conv2d", "linear"] and not done.in_parts
    assert done.unrefined == {
        "conv2d_1": "16 sums of 576 terms take too much memory to be rounded with compensation",
    }
    after = int8_weights(graph)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert [before[name].shape for name in changed] == [(64, 3, 3, 3), (5, 64)]
    assert "conv2d_1_corrected_bias" in dict(graph.named_buffers())


def test_all_layers_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOTAL_WORK", 800 << 20)
    monkeypatch.setattr(module, "SMALLEST_PART", 300)
    x = samples(32)
    graph, weights = converted(nn.Sequential(*wide()[:3], nn.Conv2d(16, 64, 1), nn.Conv2d(64, 16, 3)).eval(), x)
    done = refine(graph, weights, [(x,)])
    assert done.refined == ["conv2d", "conv2d_1", "conv2d_2"]
    assert "layers before it" in done.unrefined["conv2d_3"]


def test_time_is_given_as_the_reason_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORK", 1)
    x = samples(8)
    done = refine(*converted(wide(), x), [(x,)])
    assert not done.refined and all("too much time" in reason for reason in done.unrefined.values())


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that an operation makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["convolution", "grouped", "linear"])
def test_rounding_stays_within_its_room(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = {
        "convolution": (nn.Conv2d(256, 8, 3), torch.randn(2, 256, 6, 6)),
        "grouped": (nn.Conv2d(1024, 1024, 3, groups=1024), torch.randn(2, 1024, 6, 6)),
        "linear": (nn.Linear(2304, 8), torch.randn(16, 60, 2304)),
    }[kind]
    largest, small = {}, 12 << 20
    for room in (module.ROOM, small):
        monkeypatch.setattr(module, "ROOM", room)
        graph, weights = converted(net.eval(), x)
        with Largest() as seen:
            done = refine(graph, weights, [(x,)])
        largest[room] = seen.bytes
    assert next(iter(done.in_parts.values())) > 1
    assert small / 8 < largest.pop(small) < small < largest.popitem()[1]


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_parts_of_groups_are_put_back_where_they_belong(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 1 << 18)
    monkeypatch.setattr(module, "SMALLEST_PART", 9)
    torch.manual_seed(0)
    net, x = nn.Conv2d(32, 16, 3, groups=groups).eval(), torch.randn(16, 32, 6, 6)
    graph, weights = converted(net, x)
    before = int8_weights(graph)
    done = refine(graph, weights, [(x,)])
    assert done.in_parts["conv2d"] > 1
    for name, after in int8_weights(graph).items():
        # Compensation moves a weight by a step or two from its nearest value, not to where another stood.
        assert 0 < (after.int() - before[name].int()).abs().max() <= 8


def test_the_answer_is_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 8 << 20)
    net, x = wide(), samples(32)
    first, second = (quantize(net, (x[:2],), [x]).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_progress_counts_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 1 << 20)
    monkeypatch.setattr(module, "SMALLEST_PART", 300)
    x, told = samples(8), []
    done = refine(*converted(wide(), x), [(x,)], progress=lambda *step: told.append(step))
    assert isinstance(done, Refinement) and done.unrefined
    assert told == [("refining", count, 3) for count in range(4)]
