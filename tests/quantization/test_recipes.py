"""From a model to an int8 graph: accuracy, batches, calibration data, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pykernels.graph.export import NotExportable
from pykernels.quantization import quantize
from pykernels.quantization.refine import round_with_compensation, round_with_few_inputs

from .graphs import aten, calls, relative_error


@pytest.fixture
def net() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10, bias=False),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.3, 2)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.weight, 0.2, 3)
    return net.eval()


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16)


@torch.no_grad()
def test_refinement_brings_unseen_inputs_closer_to_fp32(net: nn.Module) -> None:
    seen, unseen = images(64), images(64)
    plain = quantize(net, (seen[:2],), seen.split(16), refine=False)
    refined = quantize(net, (seen[:2],), seen.split(16))
    exact = net(unseen)
    assert relative_error(refined(unseen), exact) < relative_error(plain(unseen), exact)
    assert len(refined.meta["pykernels_quantization"].refined) == 4


@torch.no_grad()
def test_the_batch_stays_dynamic(net: nn.Module) -> None:
    x = images(1)
    graph = quantize(net, (x,), [images(8), images(3)])
    for size in (1, 2, 7):
        assert graph(images(size)).shape == (size, 10)


def test_a_model_bound_to_its_batch_size_is_captured_as_it_is_with_a_warning() -> None:
    class Bound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.reshape(4, 8))

    x = torch.randn(4, 2, 4)
    with pytest.warns(UserWarning, match="batch size is fixed"):
        graph = quantize(Bound(), (x,), [x])
    record = graph.meta["pykernels_quantization"]
    assert graph(x).shape == (4, 3) and not record.dynamic and "batch size is fixed" in record.notes[0]


def test_a_fixed_batch_size_can_be_asked_for(net: nn.Module) -> None:
    graph = quantize(net, (images(2),), [images(2)], dynamic_batch=False)
    record = graph.meta["pykernels_quantization"]
    assert not record.notes and not record.dynamic


def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(NotExportable, match=r"Branching as one graph: \w+"):
        quantize(Branching(), (images(2),), [images(2)])


def test_the_model_itself_is_unchanged(net: nn.Module) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.train()
    net[1].eval()
    quantize(net, (images(2),), [images(4)])
    assert net.training and not net[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_loader_of_images_and_labels_serves_as_calibration(net: nn.Module) -> None:
    loader = [[images(4), torch.zeros(4)] for _ in range(3)]
    assert quantize(net, (images(2),), loader).meta["pykernels_quantization"].samples == 12


def test_an_exported_program_is_accepted(net: nn.Module) -> None:
    x = images(2)
    program = torch.export.export(net, (x,))
    assert calls(quantize(program, (x,), [x]), aten.linear.default)


def test_without_calibration_a_warning_says_what_it_costs(net: nn.Module) -> None:
    with pytest.warns(UserWarning, match="calibration"):
        graph = quantize(net, (images(4),))
    record = graph.meta["pykernels_quantization"]
    assert record.data_free and record.notes and not record.refined


@pytest.mark.parametrize(
    ("calibration", "error"),
    [
        ([], ValueError), ([3], TypeError), ([()], TypeError), ([torch.full((1, 3, 16, 16), torch.nan)], ValueError),
        (3, TypeError), (torch.randn(4, 3, 16, 16), TypeError), ([{"x": torch.randn(1, 3, 16, 16)}], TypeError),
    ],
    ids=["empty", "not a tensor", "too few inputs", "nan", "no iterable", "one batch itself", "keywords"],
)  # fmt: skip
def test_bad_calibration_is_named(net: nn.Module, calibration: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="calibration"):
        quantize(net, (images(2),), calibration)


def test_example_inputs_must_hold_a_tensor(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="example_inputs"):
        quantize(net, (), [images(2)])


@pytest.mark.parametrize(("groups", "rows", "size"), [(1, 8, 40), (6, 1, 9), (2, 4, 130)])
def test_rounding_with_compensation_beats_rounding_to_nearest(groups: int, rows: int, size: int) -> None:
    weight = torch.randn(groups, rows, size)
    mixing = torch.randn(groups, size, size) + 2
    covariance = mixing @ mixing.transpose(1, 2) / size
    scale = weight.abs().amax(2).flatten() / 20
    step = scale.reshape(groups, rows, 1)

    def error(rounded: torch.Tensor) -> torch.Tensor:
        wrong = rounded * step - weight
        return (wrong @ covariance * wrong).sum()

    rounded = round_with_compensation(weight, covariance, scale)
    assert torch.equal(rounded, rounded.round()) and rounded.abs().max() <= 127
    assert error(rounded) < 0.7 * error(torch.round(weight / step))


@pytest.mark.parametrize(("groups", "rows", "size", "samples"), [(1, 8, 40, 3), (6, 1, 9, 1), (2, 4, 300, 20)])
def test_few_inputs_round_as_their_covariance_does(groups: int, rows: int, size: int, samples: int) -> None:
    weight, inputs = torch.randn(groups, rows, size), torch.randn(groups, samples, size)
    variance, scale = torch.rand(groups, size), torch.full((groups * rows,), 0.1)
    covariance = torch.diag_embed(variance) + inputs.transpose(1, 2) @ inputs
    few, all_ = (
        round_with_few_inputs(weight, variance, inputs, scale),
        round_with_compensation(weight, covariance, scale),
    )
    assert (few != all_).float().mean() < 0.01, "but for ties"
    assert (few != torch.round(weight / 0.1).clamp(-127, 127)).float().mean() > 0.05, "and not to the nearest"
