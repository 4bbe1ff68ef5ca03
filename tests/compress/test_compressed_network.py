"""`pk.compress`, all of it real but the clock: network, model, recipe, and a search that is cut off."""

from __future__ import annotations

import copy
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.compress import Interrupted, search
from tests.prune.clock import ticking
from tests.prune.prunable import conv, head, lively

IMAGE = (3, 8, 8)
BUDGET = {"latency": 0.7}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return lively(nn.Sequential(conv(3, 48), conv(48, 64), head(64)), *IMAGE)


def images(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, *IMAGE, generator=generator) for _ in range(count)]


def compressed(model: nn.Module, **options: Any) -> pk.Compressed:
    options = {"data": images(4), "train": images(3, seed=2), "steps": 6, "budget": BUDGET, "rounds": 1, **options}
    with ticking():
        return pk.compress(model, (torch.zeros(1, *IMAGE),), **options)


@pytest.fixture(scope="module")
def found() -> tuple[nn.Module, dict[str, torch.Tensor], pk.Compressed]:
    model = network()
    before = copy.deepcopy(model.state_dict())
    return model, before, compressed(model)


def test_the_model_stays_as_it_is(found: Any) -> None:
    model, before, _ = found
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert not any(p.grad is not None for p in model.parameters())


def test_network_and_smaller_model_answer_alike_and_the_model_trains(found: Any) -> None:
    model, _, result = found
    assert isinstance(result.network, pk.Optimized) and result.network.report().precision == "int8"
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    x = images(1, seed=3)[0]
    with torch.no_grad():
        y = copy.deepcopy(result.model).eval()(x)
    assert (result.network(x) - y).norm() < 0.1 * y.norm()
    small = copy.deepcopy(result.model).train()
    small(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_it_was_trained(found: Any) -> None:
    model, _, result = found
    cut = pk.prune(model, (torch.zeros(1, *IMAGE),), recipe=result.recipe["prune"]).model
    weights = zip(cut.parameters(), result.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in weights)


def test_the_report_tells_every_stage(found: Any, tmp_path: pathlib.Path) -> None:
    report = found[2].report()
    names = [row.name for row in report.rows]
    assert names[:2] == ["original, fp32", "original, int8"] and names[2].startswith("pruned to 0.")
    assert names[2].endswith(", fp32") and names[3].endswith(", distilled 6 steps, int8") and len(names) == 4
    assert report.measure == "agreement" and report.rows[0].quality == 1.0 and report.rows[0].latency == 1.0
    assert report.rows[3].latency <= 1.02 * 0.7 and report.rows[3].bytes < report.rows[1].bytes < report.rows[0].bytes
    assert report.chosen == 3 and "[4]" in str(report) and "agreement" in str(report)
    assert report.draw(tmp_path / "chart.png").stat().st_size > 1000


def test_the_recipe_is_json_and_is_done_again(found: Any) -> None:
    model, _, result = found
    recipe = json.loads(json.dumps(result.recipe))
    again = compressed(model, budget=None, recipe=recipe, steps=None)
    assert again.recipe == result.recipe
    assert [p.shape for p in again.model.parameters()] == [p.shape for p in result.model.parameters()]
    assert [row.verdict for row in again.report().rows] == ["the original", "chosen"]


# ---- interrupted and resumed -----------------------------------------------------------------------------------------
class Watch:
    """Progress, and an interrupt at one of its stages."""

    def __init__(self, stage: str = "", at: int = 0) -> None:
        self.stage, self.at, self.seen = stage, at, []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.seen.append((stage.split(": ")[-1], done))
        if self.stage and self.seen[-1] == (self.stage, self.at):
            raise KeyboardInterrupt


@pytest.fixture
def often() -> Iterator[None]:
    """What is distilled is written down at every other step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "_CHUNK", 2)
        patch.setattr(search, "_SECONDS", 0.0)
        yield


@pytest.mark.usefixtures("often")
def test_a_search_that_is_cut_off_goes_on(tmp_path: pathlib.Path) -> None:
    """Interrupted while it distils: it goes on at the last step that was written down. Done, it does nothing again."""
    model, first = network(), Watch("distilling", 5)
    with pytest.raises(KeyboardInterrupt) as caught:
        compressed(model, checkpoint=tmp_path, progress=first)
    assert isinstance(caught.value, Interrupted) and caught.value.result.recipe["precision"] in ("fp32", "int8")
    second = Watch()
    with pytest.raises(ValueError, match=r"checkpoint: .* holds another search \(its steps differ\)"):
        compressed(model, checkpoint=tmp_path, steps=7)
    with pytest.raises(ValueError, match=r"checkpoint: .* holds another search \(its model differ\)"):
        compressed(network(seed=3), checkpoint=tmp_path)
    result = compressed(model, checkpoint=tmp_path, progress=second)
    assert [done for stage, done in second.seen if stage == "distilling"] == [5, 6]
    assert not any(stage == "weighing channels" for stage, _ in second.seen)
    third = Watch()
    again = compressed(model, checkpoint=tmp_path, progress=third)
    assert {stage for stage, _ in third.seen} <= {"calibrating"} and again.recipe == result.recipe
    assert again.report() == result.report()
    x = images(1)[0]
    assert torch.equal(again.network(x), result.network(x))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), result.model.parameters(), strict=True))


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "identity": 3}'])
def test_a_checkpoint_is_not_trusted(tmp_path: pathlib.Path, content: str) -> None:
    (tmp_path / "search.json").write_text(content)
    with pytest.raises(ValueError, match=r"checkpoint: .*search\.json cannot be read"):
        compressed(network(), checkpoint=tmp_path)
