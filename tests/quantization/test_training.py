"""Quantization on scikit-learn's digits: a small residual network keeps its accuracy, after training and with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pykernels.quantization import convert_qat, eval_mode, prepare_qat, quantize, train_mode

from .graphs import aten, calls, is_int8, relative_error

datasets = pytest.importorskip("sklearn.datasets")
TRAINED_ON = 1300
Digits = tuple[torch.Tensor, torch.Tensor]  # images fp32 [N, 1, 8, 8], labels [N]


class Block(nn.Module):
    """Expand, depthwise, add; epsilons unlike torch's default, as in the networks that come from TensorFlow."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs, eps=1e-3),
            nn.ReLU6(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False), nn.BatchNorm2d(outputs, eps=1e-3),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.skip(x))


@pytest.fixture(scope="module")
def digits() -> Digits:
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)


def train(model: Callable[..., torch.Tensor], parameters: object, digits: Digits, epochs: int, rate: float) -> None:
    images, labels = digits
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(TRAINED_ON).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: Callable[..., torch.Tensor], digits: Digits) -> float:
    images, labels = digits
    return float((model(images[TRAINED_ON:]).argmax(1) == labels[TRAINED_ON:]).float().mean())


@pytest.fixture(scope="module")
def net(digits: Digits) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        Block(1, 12),
        nn.MaxPool2d(2),
        Block(12, 24),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(24, 10),
    )
    train(net, net.parameters(), digits, epochs=8, rate=5e-3)
    return net.eval()


def test_accuracy_survives_post_training_quantization(net: nn.Module, digits: Digits) -> None:
    graph = quantize(net, (digits[0][:2],), digits[0][:300].split(50))
    assert accuracy(graph, digits) >= accuracy(net, digits) - 0.01


def test_accuracy_survives_quantization_aware_training(net: nn.Module, digits: Digits) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    prepared = prepare_qat(net, (digits[0][:2],))
    train(prepared, prepared.parameters(), digits, epochs=2, rate=5e-4)
    with torch.no_grad():
        simulated = eval_mode(prepared)(digits[0][TRAINED_ON:])
        graph = convert_qat(prepared)
        converted = graph(digits[0][TRAINED_ON:])
    assert accuracy(graph, digits) >= accuracy(net, digits) - 0.01
    assert relative_error(converted, simulated) < 0.05, "conversion keeps what training simulated"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), "the module is untouched"
    assert not calls(graph, aten.batch_norm.default), "batch norms are folded"
    for call in calls(graph, aten.conv2d.default) + calls(graph, aten.linear.default):
        assert is_int8(call.args[0]) and is_int8(call.args[1])


def test_switching_modes_keeps_dropout_rate_and_epsilon(net: nn.Module, digits: Digits) -> None:
    prepared = prepare_qat(net, (digits[0][:2],))
    train_mode(eval_mode(prepared))
    (dropout,) = calls(prepared, aten.dropout.default)
    assert dropout.args[1:] == (0.1, True)
    assert sorted({node.args[7] for node in calls(prepared, aten.batch_norm.default)}) == [1e-5, 1e-3]
