"""Models as their users write and call them: views that are written, state, regions, tuples, keywords, free sizes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from models import network
from networks import Function, Mixed, close, lively
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import pykernels as pk

X = (4, 6, 8)
PRECISIONS = ["fp32", "bf16", "int8"]


def conv(before: int = 4, after: int = 4) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1)


def optimized(model: nn.Module, *inputs: Any, precision: str = "fp32", **options: Any) -> pk.Optimized:
    calibration = [tuple(inputs)] * 2 if precision == "int8" else None
    return pk.optimize(model, inputs, precision, calibration, **options)


def write(change) -> Function:
    """A convolution whose result is changed in place through a view of it."""

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        change(y)
        return y * 2

    return Function(forward, conv=conv()).eval()


WRITES = {
    "diagonal": lambda y: y.diagonal(dim1=-2, dim2=-1).fill_(0),
    "mT": lambda y: y.mT.mul_(2),
    "unfold": lambda y: y.unfold(3, 2, 2).add_(1),
    "view_as": lambda y: y.view_as(torch.empty_like(y)).relu_(),
    "as_strided": lambda y: y.as_strided((2, 3), (5, 1)).zero_(),
    "slice": lambda y: y[:, 1:3].relu_(),
    "select": lambda y: y[0].neg_(),
    "chunk": lambda y: y.chunk(2, 1)[1].sigmoid_(),
    "transpose": lambda y: y.transpose(1, 2).mul_(y.transpose(1, 2)),
    "detach": lambda y: y.detach().add_(1),
    "dropout": lambda y: F.dropout(y, 0.5, False).add_(1),
    "type_as": lambda y: y.type_as(torch.zeros(1)).add_(1),
    "expand": lambda y: y.expand_as(y).mul_(3),
    "index": lambda y: y.__setitem__((slice(None), 0), 1.0),
    "masked": lambda y: y.view(-1).masked_fill_(y.view(-1) > 0, 0.5),
    "split of a view": lambda y: y.flatten(2).split(4, 2)[0].copy_(torch.zeros(4)),
    "plain": lambda y: y.relu_(),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_write_through_any_view_is_seen_by_what_it_views(name: str) -> None:
    model, x = write(WRITES[name]), torch.randn(2, *X)
    close(optimized(model, x, dynamic_batch=name != "as_strided"), model, x)


@pytest.mark.parametrize("stride", [(8, 1), (1, 3)])
def test_a_value_that_is_read_by_its_strides_lies_as_it_does_in_the_model(stride: tuple[int, int]) -> None:
    model = Function(lambda m, x: m.conv(x).as_strided((3, 4), stride) + 1, conv=conv()).eval()
    close(optimized(model, x := torch.randn(2, *X), dynamic_batch=False), model, x)


def test_an_in_place_sum_keeps_the_dtype_of_what_it_is_added_to() -> None:
    model = Function(lambda m, x: m.conv(x).half().add_(x), conv=conv()).eval()
    close(optimized(model, x := torch.randn(2, *X)), model, x, tolerance=1e-3)


def test_alpha_and_other_keywords_of_arithmetic_keep_their_meaning() -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return y * F.relu6(torch.add(y, 3, alpha=2)) / 6 + torch.add(m.conv(x), x, alpha=3)

    model = Function(forward, conv=conv()).eval()
    close(optimized(model, x := torch.randn(2, *X)), model, x)


# ---- state ----


class Counting(nn.Module):
    """Counts its calls in a buffer, remembers its last input in another, and answers with both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        y = self.conv(x) * self.calls + self.last.view(1, -1, 1, 1)
        self.last.copy_(x.mean((0, 2, 3)))
        return y


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_that_writes_its_buffers_keeps_them_and_so_does_what_it_became(precision: str, tmp_path) -> None:
    model = Counting().eval()
    fast = optimized(model, torch.randn(2, *X), precision=precision)
    assert model.calls == 0 and not model.last.any(), "the model is left as it was"
    assert any("calls" in note and "last" in note for note in fast.report().notes)
    fast.save(tmp_path / "net.pk")
    for net in (fast, pk.load(tmp_path / "net.pk")):
        twin = Counting().eval()
        twin.load_state_dict(model.state_dict())
        for batch in (2, 3, 2):
            close(net, twin, torch.randn(batch, *X), tolerance=1e-5 if precision == "fp32" else 0.05)
        assert twin.calls == 3


def test_an_input_that_the_model_writes_is_written() -> None:
    def forward(m: nn.Module, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        seen.add_(x.mean())
        return m.conv(x)

    model = Function(forward, conv=conv()).eval()
    x, seen, expected = torch.randn(2, *X), torch.zeros(3), torch.zeros(3)
    fast = optimized(model, x, torch.zeros(3), dynamic_batch=False)
    torch.testing.assert_close(fast(x, seen), model(x, expected))
    assert seen.any() and torch.equal(seen, expected)


def test_what_was_optimized_shares_no_memory_with_a_model_that_trains_on() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.LayerNorm(8), nn.Linear(8, 3)).eval()
    x = torch.randint(10, (2, 5))
    fast = optimized(model, x)
    before = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert torch.equal(fast(x), before)


# ---- regions and odd calls ----


class Autocast(nn.Module):
    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.enabled, self.conv, self.linear = enabled, conv(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled), torch.no_grad():
            y = self.linear(y) + y.float().mean()
        return F.relu(y.float())


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_region_under_autocast_is_part_of_the_graph(enabled: bool, precision: str) -> None:
    model, x = Autocast(enabled).eval(), torch.randn(2, *X)
    fast = optimized(model, x, precision=precision)
    close(fast, model, torch.randn(3, *X), tolerance=0.05 if enabled or precision != "fp32" else 1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_branch_on_data_stays_with_torch(precision: str) -> None:
    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return m.last(torch.cond(y.sum() > 0, lambda y: y.cos(), lambda y: y.sin(), (y,)))

    model, x = Function(forward, conv=conv(), last=conv()).eval(), torch.randn(2, *X)
    fast = optimized(model, x, precision=precision)
    close(fast, model, torch.randn(2, *X), tolerance=1e-5 if precision == "fp32" else 0.05)
    assert "cond" in {entry.op for entry in fast.report().left}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.conv(x).mean(),
        lambda m, x: m.conv(x).mean((2, 3), dtype=torch.float64),
        lambda m, x: m.conv(x).mean([]),
        lambda m, x: F.max_pool2d(m.conv(x), 2, stride=()),
        lambda m, x: torch.max_pool2d(m.conv(x), [2, 2], []),
        lambda m, x: F.avg_pool2d(m.conv(x), 2, stride=()),
        lambda m, x: F.max_pool2d(m.conv(x), 2, return_indices=True)[1].float(),
        lambda m, x: F.adaptive_avg_pool2d(m.conv(x), (None, 2)),
        lambda m, x: m.conv(x).sum(),
        lambda m, x: m.conv(x[0]),
    ],
)
def test_calls_in_their_less_common_forms(forward) -> None:
    model, x = Function(forward, conv=conv()).eval(), torch.randn(2, *X)
    close(optimized(model, x, dynamic_batch=False), model, x)


@pytest.mark.parametrize(
    ("op", "forward", "layer"),
    [
        ("lstm", lambda m, x: m.layer(x)[0], nn.LSTM(8, 5, batch_first=True)),
        ("gru", lambda m, x: m.layer(x)[0], nn.GRU(8, 5, batch_first=True)),
        ("topk", lambda m, x: m.layer(x).topk(2)[0], nn.Linear(8, 5)),
        ("max", lambda m, x: m.layer(x).max(1)[0], nn.Linear(8, 5)),
    ],
)
def test_what_yields_several_tensors_is_in_the_report(op: str, forward, layer: nn.Module) -> None:
    model, x = Function(forward, layer=layer).eval(), torch.randn(2, 6, 8)
    fast = optimized(model, x, dynamic_batch=op not in ("lstm", "gru"))
    assert op in {entry.op for entry in fast.report().left}
    close(fast, model, x)


# ---- how it is called ----


class Output(OrderedDict):
    """What Hugging Face's models return: a dictionary whose keys are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


pytree.register_pytree_node(
    Output,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: Output(zip(names, values, strict=True)),
    serialized_type_name="test_models.Output",
)


class Encoder(nn.Module):
    """Tokens and a mask by keyword, an `Output` back."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.up, self.down, self.pooler = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 16)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, scale: float = 1.0
    ) -> Output:
        hidden = self.embed(input_ids)
        hidden = self.norm(hidden + self.down(F.gelu(self.up(hidden))))
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return Output(last_hidden_state=hidden, pooled=torch.tanh(self.pooler(mean)) * scale)


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, length, dtype=torch.int64)
    mask[:, length - 1] = 0
    return {"input_ids": torch.randint(20, (rows, length)), "attention_mask": mask}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("by", ["dictionary", "example_kwargs"])
def test_keyword_inputs_any_length_and_outputs_as_they_were(precision: str, by: str, tmp_path) -> None:
    model, example = Encoder().eval(), batch(2, 7)
    sizes = {0: Dim("rows"), 1: Dim("length")}
    fast = pk.optimize(
        model,
        example if by == "dictionary" else (),
        precision,
        [batch(4, 9), batch(3, 5)] if precision == "int8" else None,
        example_kwargs=None if by == "dictionary" else example,
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    )
    fast.save(tmp_path / "net.pk")
    for net in (fast, pk.load(tmp_path / "net.pk")):
        for rows, length in ((2, 7), (1, 4), (5, 11)):
            inputs = batch(rows, length)
            with torch.no_grad():
                answer, expected = net(**inputs), model(**inputs)
            assert type(answer) is Output and list(answer) == list(expected)
            for name in expected:
                error = (answer[name] - expected[name]).norm() / expected[name].norm()
                assert error <= (1e-5 if precision == "fp32" else 0.05), f"{name}: {error:.3f}"
    assert fast.dynamic


def test_calibration_that_does_not_fit_the_inputs_is_named() -> None:
    model, example = Encoder().eval(), batch(2, 7)
    with pytest.raises(TypeError, match="calibration: entry 0 has no keyword input 'attention_mask'"):
        pk.optimize(model, example, "int8", [{"input_ids": example["input_ids"]}])
    with pytest.raises(TypeError, match="calibration: entry 0"):
        pk.optimize(model, example, "int8", [3])


def test_keywords_may_come_in_any_order() -> None:
    model, example = Encoder().eval(), batch(2, 7)
    fast = pk.optimize(model, example, dynamic_batch=False)
    torch.testing.assert_close(fast(**dict(reversed(example.items())))["pooled"], model(**example)["pooled"])


def test_an_input_may_be_a_number() -> None:
    model = Function(lambda m, factor, x: m.conv(x) * factor, conv=conv()).eval()
    x = torch.randn(2, *X)
    fast = pk.optimize(model, (2.0, x), "int8", [(2.0, x), (2.0, torch.randn(3, *X))])
    close(fast, model, 2.0, x, tolerance=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_whole_networks_run_in_an_aotinductor_package(precision: str, tmp_path) -> None:
    model, x = network("resnet18")
    fast = pk.optimize(model, (x,), precision, [x] if precision == "int8" else None)
    with torch.no_grad():
        exported = torch.export.export(fast.separate(), (x,))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "net.pt2"))
        assert torch.equal(torch._inductor.aoti_load_package(path)(x), fast(x))


def test_two_instances_of_a_network_do_not_know_each_other() -> None:
    first, second = lively(Mixed(), 3, 12, 12), lively(Mixed(), 3, 12, 12)
    with torch.no_grad():
        second.head.weight.mul_(2)
    x = torch.randn(2, 3, 12, 12)
    close(optimized(first, x), first, x)
    close(optimized(second, x), second, x)
