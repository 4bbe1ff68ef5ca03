"""Networks for segmentation and detection, whole in one plan, with the bits of the graph of ops."""

from __future__ import annotations

import functools
import pathlib

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

import pykernels as pk
from pykernels.bench import zoo
from pykernels.quantization import recipes
from tests.network.dense_networks import Pyramid, UNet
from tests.network.walk import Walk
from tests.networks import Function, close

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
NETWORKS = {"unet": UNet, "pyramid": Pyramid}
# Relative errors in the norm of random networks.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.05, "fp16": 0.01, "int8": 0.25}


def optimized(model: nn.Module, *inputs: torch.Tensor, precision: str = "fp32", **options) -> pk.Optimized:
    calibration = [inputs] if precision == "int8" else None
    return pk.optimize(model.eval(), inputs, precision, calibration, **options)


def whole(fast: pk.Optimized) -> None:
    """Everything is in one plan, and nothing is torch's beside it."""
    assert fast.planned is not None
    assert len(fast.planned.labels) == 1 and fast.plan().left == []


@torch.no_grad()
def same(fast: pk.Optimized, *inputs: torch.Tensor) -> None:
    assert fast.planned is not None
    for planned, expected in zip(fast.planned.program(*inputs), fast.program(*inputs), strict=True):
        assert planned.dtype == expected.dtype and torch.equal(planned, expected)


@functools.cache
def network(name: str, precision: str) -> tuple[nn.Module, pk.Optimized, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 48)
    model = zoo.settle(NETWORKS[name](), torch.randn(8, 3, 32, 48))
    return model, optimized(model, x, precision=precision), x


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_plan_with_the_bits_of_its_ops(name: str, precision: str, isa: str) -> None:
    _, fast, x = network(name, precision)
    whole(fast)
    same(fast, x)
    same(fast, torch.randn(1, *x.shape[1:]))
    same(fast, torch.randn(3, *x.shape[1:]).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_answers_are_the_models(name: str, precision: str) -> None:
    model, fast, x = network(name, precision)
    expected, got = model(x), fast(x)
    for a, b in zip(got if name == "pyramid" else [got], expected if name == "pyramid" else [expected], strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).norm() <= TOLERANCE[precision] * b.norm()


def test_int8_keeps_bytes_through_upsampling_and_phases() -> None:
    """Nothing is dequantized between the first layer and the heads."""
    for name, heads in (("unet", 1), ("pyramid", 3)):
        _, fast, _ = network(name, "int8")
        assert fast.report().conversions == 1, name
        assert len([entry for entry in fast.report().fused if entry.op == "qconv2d"]) >= 10 * heads


def test_int8_rounds_as_its_simulation_in_every_op() -> None:
    """But for single steps at a tie, see test_zoo.py."""
    model, _, x = network("unet", "int8")
    walk = Walk(recipes.quantize(model, (x,), [x], refine=False), x)
    assert not walk.report.left
    assert not [step for step in walk.steps if step.most > 1 or step.from_tie > 1e-3]
    assert walk.answer_error <= 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_any_height_and_width(name: str) -> None:
    torch.manual_seed(0)
    model = zoo.settle(NETWORKS[name](), torch.randn(4, 3, 32, 48))
    x = torch.randn(2, 3, 32, 48)
    sizes = {0: Dim("batch"), 2: 8 * Dim("rows"), 3: 8 * Dim("columns")}
    fast = optimized(model, x, dynamic_shapes=(sizes,))
    whole(fast)
    for shape in ((2, 3, 32, 48), (1, 3, 64, 40)):
        same(fast, torch.randn(shape))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_saved_and_exported(name: str, precision: str, tmp_path: pathlib.Path) -> None:
    _, fast, x = network(name, precision)
    fast.save(tmp_path / "net.pk")
    loaded = pk.load(tmp_path / "net.pk")
    exported = torch.export.export(fast, (x,)).module()
    with torch.no_grad():
        for got in (loaded(x), loaded.program(x), exported(x)):
            for a, b in zip(tree_leaves(got), tree_leaves(fast(x)), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_upsampling_to_the_size_of_another_image(mode: str) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        skip = m.first(x)
        y = F.interpolate(m.down(F.relu(skip)), size=skip.shape[2:], mode=mode)
        return m.last(torch.cat([y, skip], 1))

    layers = {"first": nn.Conv2d(3, 8, 3, 2, 1), "down": nn.Conv2d(8, 8, 3, 2, 1), "last": nn.Conv2d(16, 4, 1)}
    model, x = Function(forward, **layers), torch.randn(2, 3, 30, 22)
    fast = optimized(model, x, dynamic_shapes=(({0: Dim("n"), 2: Dim("h", min=8), 3: Dim("w", min=8)},),))
    whole(fast)
    for shape in ((2, 3, 30, 22), (1, 3, 17, 24)):
        x = torch.randn(shape)
        same(fast, x)
        close(fast, model, x)


TRANSPOSED = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": (3, 5), "stride": (2, 3), "padding": (0, 2), "output_padding": (1, 0)},
    {"kernel_size": 2, "stride": 3, "output_padding": 2},
    {"kernel_size": 3, "stride": 2, "dilation": 2, "padding": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 4},
    {"kernel_size": 3, "stride": 2, "groups": 8, "bias": False},
]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
def test_transposed_convolutions(options: dict[str, object], precision: str) -> None:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 16, **options), nn.ReLU(), nn.Conv2d(16, 4, 1)
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 7, 6)
    fast = optimized(model, x, precision=precision)
    whole(fast)
    same(fast, x)
    close(fast, model, x, tolerance=1e-5 if precision == "fp32" else 0.05)


def test_a_transposed_convolution_with_its_padding_beyond_its_kernel_is_torchs() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 4, 2, 1, padding=2)), torch.randn(1, 3, 9, 9)
    fast = optimized(model, x)
    assert [entry.op for entry in fast.report().left] == ["conv_transpose2d"]
    close(fast, model, x)


def _upsampled(**options: object):
    layers = {"first": nn.Conv2d(3, 8, 3, padding=1), "last": nn.Conv2d(8, 4, 1)}
    return Function(lambda m, x: m.last(F.interpolate(F.relu(m.first(x)), **options)), **layers)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2.0},
        {"size": (13, 5)},
        {"scale_factor": (1.5, 3.0), "mode": "bilinear"},
        {"size": (20, 20), "mode": "bilinear", "align_corners": True},
        {"size": 1, "mode": "bilinear", "align_corners": True},
    ],
    ids=str,
)
def test_upsampling(options: dict[str, object], precision: str) -> None:
    torch.manual_seed(0)
    model, x = _upsampled(**options), torch.randn(2, 3, 9, 8)
    fast = optimized(model, x, precision=precision)
    whole(fast)
    same(fast, x)
    close(fast, model, x, tolerance=TOLERANCE[precision])


FLOATS = {
    "leaky relu": lambda m, x: m.last(F.leaky_relu(m.first(x), 0.1)),
    "relu after a sum": lambda m, x: F.relu(m.first(x).transpose(2, 3).contiguous() + x.transpose(2, 3)),
    "relu after a gate": lambda m, x: F.relu(x + F.adaptive_avg_pool2d(m.first(x), 1)),
    "silu after a concatenation": lambda m, x: m.last(F.silu(torch.cat([m.first(x), x], 1))[:, :8]),
    "gelu alone": lambda m, x: F.gelu(x),
    "tanh of a slice": lambda m, x: torch.tanh(m.first(x)[:, :4]),
    "hardswish before a pool": lambda m, x: F.max_pool2d(F.hardswish(m.first(x) * x), 2),
    "softmax over channels": lambda m, x: torch.softmax(m.first(x), 1),
    "softmax of features": lambda m, x: torch.softmax(m.first(x).flatten(2), -1),
    "layer norm of channels": lambda m, x: m.norm(m.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
    "a slice in another size": lambda m, x: F.interpolate(m.first(x)[:, 4:], scale_factor=2.0),
    "sum of pieces": lambda m, x: m.first(x).view(x.shape[0], 2, 4, *x.shape[2:]).sum(1),
    "product of pieces": (
        lambda m, x: m.first(x).view(x.shape[0], 2, 4, *x.shape[2:]) * x.mean((2, 3)).view(x.shape[0], 2, 4, 1, 1)
    ),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", FLOATS)
def test_what_stands_alone_among_floats(what: str, precision: str) -> None:
    torch.manual_seed(0)
    layers = {"first": nn.Conv2d(8, 8, 3, padding=1), "last": nn.Conv2d(8, 4, 1), "norm": nn.LayerNorm(8)}
    model, x = Function(FLOATS[what], **layers), torch.randn(2, 8, 6, 10)
    fast = optimized(model, x, precision=precision)
    whole(fast)
    same(fast, x)
    close(fast, model, x, tolerance=TOLERANCE[precision])
