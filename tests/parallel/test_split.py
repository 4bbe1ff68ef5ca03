"""Optimized networks cut into parts: bits, files, balance, and what is refused."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.parallel.split import Split, split
from tests.networks import lively


class Ends(nn.Module):
    """A residual, a call that no plan takes, sizes of the batch, two inputs of which one is read late, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(a, 16, 3, padding=1) for a in (3, 16, 16))
        self.norm, self.head = nn.InstanceNorm2d(16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor, late: torch.Tensor) -> dict[str, torch.Tensor]:
        y = torch.relu(self.first(x))
        y = torch.relu(self.second(y) + y)
        y = self.norm(y)
        y = torch.relu(self.third(y) + y)
        rows = y.permute(0, 2, 3, 1).reshape(y.shape[0] * 4, -1, 16).mean(1)
        return {"classes": self.head(rows), "late": late * 2 + y.mean((1, 2, 3)).unsqueeze(1)}


def example(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 3, 8, 8), torch.randn(rows, 1)


def cut_anywhere(fast: pk.Optimized, stages: int) -> Split:
    return split(fast, stages, rounds=2)


@pytest.fixture(scope="module")
def ends() -> pk.Optimized:
    torch.manual_seed(0)
    x, late = example(2)
    return pk.optimize(Ends().eval(), (x,), example_kwargs={"late": late})


@pytest.fixture(scope="module")
def quantized() -> pk.Optimized:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3 if n == 0 else 32, 32, 3, padding=1) for n in range(4)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.ReLU())), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.randn(2, 3, 16, 16)
    return pk.optimize(lively(model, 3, 16, 16), (x,), precision="int8", calibration=[x])


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_the_parts_answer_with_the_bits_of_the_whole(ends: pk.Optimized, stages: int) -> None:
    parts = cut_anywhere(ends, stages)
    assert len(parts.parts) == stages
    for rows in (1, 2, 7):
        x, late = example(rows)
        expected, found = ends(x, late=late), parts(x, late=late)
        assert list(found) == ["classes", "late"]
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_parts_have_the_sizes_that_a_compiler_is_told(ends: pk.Optimized) -> None:
    parts = cut_anywhere(ends, 3)
    given: tuple[torch.Tensor, ...] = example(5)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = tuple(mode.from_tensor(x) for x in given)
        for part in parts.parts:
            args, kwargs = part.nested(given)
            real = tuple(torch.utils._pytree.tree_leaves(part(*args, **kwargs)))
            fake = part.program(*fakes)
            assert [(y.shape, y.dtype, y.stride()) for y in fake] == [(y.shape, y.dtype, y.stride()) for y in real]
            given, fakes = real, tuple(fake)


class Sentences(nn.Module):
    """Token ids and what counts of them, [batch, length], to classes of each token; the length matters in all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(50, 32), nn.Parameter(torch.randn(40, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.blocks, self.head = nn.ModuleList(copy.deepcopy(layer) for _ in range(2)), nn.Linear(32, 10)

    def forward(self, ids: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x * counts[..., None])


def words(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 50, (rows, length)), torch.rand(rows, length)


@pytest.mark.parametrize("stages", [2, 4])
def test_any_length_goes_through_as_any_batch_does(stages: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch, length = torch.export.Dim("batch", max=8), torch.export.Dim("length", max=40)
    fast = pk.optimize(Sentences().eval(), words(2, 7), dynamic_shapes=({0: batch, 1: length},) * 2)
    parts = cut_anywhere(fast, stages)
    assert all({0, 1} <= {d for free in part.free for d in free} for part in parts.parts)
    parts.save(tmp_path)
    for found in (parts, Split.load(tmp_path)):
        for rows, tokens in ((2, 7), (1, 1), (7, 7), (3, 40), (8, 5)):
            given = words(rows, tokens)
            assert torch.equal(found(*given), fast(*given))


def test_images_of_any_height_and_width_go_through(tmp_path: Path) -> None:
    layers = [nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(3)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Upsample(scale_factor=2.0), layers[2])
    free = {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}
    fast = pk.optimize(model.eval(), (torch.randn(1, 3, 8, 8),), dynamic_shapes=(free,))
    parts = cut_anywhere(fast, 3)
    for height, width in ((8, 8), (4, 64), (13, 5)):
        x = torch.randn(1, 3, height, width)
        assert torch.equal(parts(x), fast(x))


def test_bytes_cross_as_bytes(quantized: pk.Optimized) -> None:
    parts = cut_anywhere(quantized, 3)
    x = torch.randn(3, 3, 16, 16)
    between = parts.parts[0](x)
    assert [y.dtype for y in between] == [torch.uint8]
    assert parts.crossing == (2 * 32 * 16 * 16,) * 2  # of the example's two images
    assert torch.equal(parts(x), quantized(x))


def test_a_part_holds_its_own_weights_alone(quantized: pk.Optimized) -> None:
    whole = quantized.report().bytes_after
    parts = [part.report().bytes_after for part in cut_anywhere(quantized, 4).parts]
    assert max(parts) < 0.6 * whole and sum(parts) < 1.3 * whole


def test_parts_are_files_that_load_again(quantized: pk.Optimized, tmp_path: Path) -> None:
    parts = cut_anywhere(quantized, 3)
    names = [path.name for path in parts.save(tmp_path / "new")]
    assert names == ["part-1-of-3.pk", "part-2-of-3.pk", "part-3-of-3.pk"]
    x = torch.randn(2, 3, 16, 16)
    loaded = Split.load(tmp_path / "new")
    assert torch.equal(loaded(x), quantized(x))
    assert "part 2 of 3" in str(loaded.parts[1].report())
    assert loaded.parts[1].plan().rows  # tables, profiles and tuning work on a part as on any network
    copied = copy.deepcopy(parts.parts[1])
    between = parts.parts[0](x)
    assert torch.equal(copied(*between)[0], parts.parts[1](*between)[0])

    cut_anywhere(quantized, 3).save(tmp_path / "other")
    for file in ("part-2-of-3.pk", "part-1-of-3.pk"):  # of another split; or named otherwise
        mixed = tmp_path / file
        shutil.copytree(tmp_path / "new", mixed)
        shutil.copy(tmp_path / ("other" if file == "part-2-of-3.pk" else "new") / "part-2-of-3.pk", mixed / file)
        with pytest.raises(
            ValueError, match=r"folder: the parts of one split in order are needed, not part \d of 3 of"
        ):
            Split.load(mixed)
    quantized.save(tmp_path / "new" / "part-2-of-3.pk")
    with pytest.raises(ValueError, match="network: it is no part of one that was split"):
        Split.load(tmp_path / "new")
    (tmp_path / "new" / "part-2-of-3.pk").unlink()
    with pytest.raises(ValueError, match=r"all parts of one network are needed.*part-1-of-3.pk, part-3-of-3.pk"):
        Split.load(tmp_path / "new")


def test_the_slowest_part_is_made_as_quick_as_can_be(quantized: pk.Optimized, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four convolutions of equal time, between cheap ends, are shared out evenly; a slow link is spared the bytes."""
    from pykernels.network.plan import cut

    def times(planned: object, inputs: object, rounds: int) -> dict[str, list[float]]:
        assert quantized.planned is not None
        (labels,) = quantized.planned.labels.values()
        return {
            name: [1.0 if "conv2d" in label else 0.01 for label in labels] + [0.0] for name in quantized.planned.labels
        }

    monkeypatch.setattr(cut, "record_seconds", times)
    assert split(quantized, 2).seconds == pytest.approx((2.0, 2.0), abs=0.1)
    assert split(quantized, 4).seconds == pytest.approx((1.0,) * 4, abs=0.1)
    pooled = split(quantized, 2, rate=8.0 * 200)  # 16 kB would take 80 s; behind the pool there are 64 bytes
    assert pooled.seconds[0] > 3.9 and pooled.crossing[0] <= 256


def test_what_cannot_be_split_is_refused_by_name(quantized: pk.Optimized) -> None:
    with pytest.raises(TypeError, match="network: an Optimized network"):
        split(nn.Linear(2, 2), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="stages: must be a whole number"):
        split(quantized, 0)
    for rate in (0, -1.0, float("nan"), float("inf"), "1gbit"):
        with pytest.raises(ValueError, match="rate: must be bits per second, above 0"):
            split(quantized, 2, rate=rate)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds: must be a whole number"):
        split(quantized, 2, rounds=0)
    with pytest.raises(ValueError, match=r"stages: the network can be cut into \d+ parts at most, not 99"):
        split(quantized, 99, rounds=1)
    with pytest.raises(ValueError, match="inputs: 1 tensors are needed, not 2"):
        split(quantized, 2, [torch.randn(1, 3, 16, 16)] * 2)
    with pytest.raises(ValueError, match="inputs: the network does not take them: "):
        split(quantized, 2, [torch.randn(1, 4, 16, 16)])
    size = torch.export.Dim("size", min=8, max=64)
    narrower = nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3)))  # sizes in it are no multiples of what is free
    free = pk.optimize(narrower, (torch.randn(2, 3, 16, 8),), dynamic_shapes=({2: size},))
    with pytest.raises(ValueError, match="stages: the network can be cut into 1 parts at most, not 2"):
        split(free, 2)

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return self.layer(x) + self.calls

    with pytest.raises(ValueError, match="its calls write into"):
        split(pk.optimize(Counting(), (torch.randn(2, 3, 8, 8),)), 2)
