"""What pk.swap fuses is proved to follow; what it leaves alone is reported with the reason."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from residual import X, relative, trained
from torch import nn

import pykernels as pk


class Reads(nn.Module):
    """conv, then what a test says; the batch norm stands ready."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()


class TwoReaders(Reads):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class ScaledBetween(Reads):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x) * 2))


class NormUsedTwice(Reads):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(x.mean(1, keepdim=True).expand(-1, 4, -1, -1))[:, :, 2:, 2:]


class SharedConv(Reads):
    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) + self.relu(self.bn(self.conv(x * 2)))


class SharedReLU(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.next = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        y = self.relu(self.next(self.relu(self.bn(self.conv(x)))))
        return self.relu(y - 0.1)


class SharedSiLU(SharedReLU):
    """Computed twice it is another function, so a layer may not compute it in passing."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.SiLU()


class Branches(Reads):
    def forward(self, x):
        y = self.conv(x)
        if float(y.sum()) > 1e9:
            y = y * 2
        return self.relu(self.bn(y))


class OptionalMask(Reads):
    def forward(self, x, mask=None):
        y = self.conv(x)
        if mask is not None:
            y = y * mask
        return self.bn(y)


class EarlyReturn(Reads):
    def forward(self, x, features: bool = False):
        y = self.conv(x)
        return y if features else self.bn(y)


class Remembers(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        self.calls += 1
        self.last = self.conv(x)
        self.seen.append(x)
        return self.bn(self.last)


class Untraceable(nn.Module):
    """Branches on a value, with a Sequential and layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU6())
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.body(x)
        if float(y.sum()) < 0:
            return y
        return self.bn(self.conv(y))


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "fused"),
    [
        (TwoReaders, ["Conv2d"]),
        (ScaledBetween, ["Conv2d"]),
        (NormUsedTwice, ["Conv2d"]),
        (SharedConv, ["Conv2d + BatchNorm2d + ReLU"]),
        (SharedReLU, ["Conv2d + BatchNorm2d + ReLU", "Conv2d + ReLU"]),
        (SharedSiLU, ["Conv2d + BatchNorm2d", "Conv2d"]),
        (Branches, ["Conv2d"]),
        (OptionalMask, ["Conv2d"]),
        (EarlyReturn, ["Conv2d"]),
        (Untraceable, ["Conv2d + BatchNorm2d + ReLU6", "Conv2d"]),
    ],
)
def test_fusing_needs_proof(model: type[nn.Module], fused: list[str]) -> None:
    net = trained(model())
    expected = net(X)
    report = pk.swap(net)
    assert [entry.what for entry in report.fused] == fused
    assert relative(net(X), expected) < 1e-5
    if model is OptionalMask:
        assert torch.equal(net(X, torch.zeros(())), nn.BatchNorm2d.forward(net.bn, torch.zeros(2, 4, 14, 14)))
    if model in (Branches, Untraceable):
        assert any("cannot be traced" in note for note in report.notes)
        assert any(entry.where == "bn" and "cannot be traced" in entry.reason for entry in report.left)


@torch.no_grad()
def test_a_shared_relu_runs_only_where_no_layer_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net, seen, relu = trained(SharedReLU()), [], F.relu
    expected = net(X)
    pk.swap(net)
    monkeypatch.setattr(F, "relu", lambda x, inplace: seen.append(x) or relu(x, inplace))
    assert relative(net(X), expected) < 1e-5 and len(seen) == 1
    values = []
    net.relu.register_forward_pre_hook(lambda m, inputs: values.append(inputs[0].clone()))
    assert relative(net(X), expected) < 1e-5
    assert len(values) == 3 and all(value.min() < 0 for value in values), "a hook sees what it would have seen"


@torch.no_grad()
def test_finding_out_does_not_touch_the_model() -> None:
    net = Remembers().eval()
    pk.swap(net)
    assert float(net.calls) == 0 and net.seen == [] and not hasattr(net, "last")
    assert len(net(X).shape) == 4 and float(net.calls) == 1


class Custom(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: Custom(3, 4, 3), "Custom is a subclass"),
        (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode is 'reflect'"),
        (lambda: nn.Conv2d(3, 4, 3).double(), "weight is float64"),
        (lambda: nn.ConvTranspose2d(3, 4, 3), "no kernel for it"),
        (lambda: nn.Conv2d(3, 4, 3, device="meta"), "weight is on meta"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "is a subclass"),
    ],
)
def test_what_is_left_alone_is_reported(layer, reason: str) -> None:
    module = layer()
    before = type(module)
    report = pk.swap(nn.Sequential(module))
    assert type(module) is before
    assert any(reason in entry.reason for entry in report.left)
    assert report.fused == []


@torch.no_grad()
def test_a_forward_set_on_the_object_is_left_alone() -> None:
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    report = pk.swap(nn.Sequential(layer))
    assert report.left[0].reason == "the object has a forward of its own"


@torch.no_grad()
def test_a_transformer_layer_s_linears_are_swapped_alone() -> None:
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    expected = net(x)
    report = pk.swap(net)
    assert [entry.where for entry in report.fused] == ["linear1", "linear2"]
    assert relative(net(x), expected) < 1e-5


@torch.no_grad()
def test_example_inputs_catch_code_that_reaches_past_a_forward() -> None:
    class Reaches(Untraceable):
        def forward(self, x):
            y = self.body[0](x)  # not through body's own forward
            return y if float(y.sum()) > -1e9 else self.bn(y)

    net = trained(Reaches())
    expected, classes = net(X), [type(module) for module in net.modules()]
    with pytest.raises(RuntimeError, match="otherwise than its forward does"):
        pk.swap(net, example_inputs=X)
    assert [type(module) for module in net.modules()] == classes
    assert torch.equal(net(X), expected)
    pk.swap(trained(), "int8", calibration=[X], example_inputs=(X,))
