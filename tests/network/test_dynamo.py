"""``torch.compile(model, backend="pykernels")``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import Function, Mixed, close, lively
from stand_in import Cuda, Network, graphs

from pykernels.network import Report, dynamo
from pykernels.network.dynamo import pykernels as backend

X = (3, 12, 12)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def compiled(model: torch.nn.Module, **options: object) -> tuple[torch.nn.Module, list[Report]]:
    reports: list[Report] = []
    return torch.compile(model, backend=backend, options={"on_report": reports.append, **options}), reports


def test_a_compiled_model_runs_on_our_kernels_for_any_batch_size() -> None:
    model = lively(Mixed(), *X)
    fast, reports = compiled(model)
    for batch in (2, 3, 4, 1):
        close(fast, model, torch.randn(batch, *X))
    assert len(reports) <= 3, "fixed, dynamic, and a batch of one"
    assert [entry.where for entry in reports[0].fused][:2] == ["stem.0", "depthwise"]


def test_a_changed_weight_is_packed_again() -> None:
    model, x = lively(Mixed(), *X), torch.randn(2, *X)
    fast, reports = compiled(model)
    close(fast, model, x)
    with torch.no_grad():
        model.head.weight.mul_(3)
        model.stem[1].running_mean.add_(1)
    close(fast, model, x)
    assert len(reports) == 2


def test_instances_of_one_class_are_lowered_once_each() -> None:
    models, x, reports = [lively(Mixed(), *X) for _ in range(3)], torch.randn(2, *X), []
    with torch.no_grad():
        for factor, model in enumerate(models, start=1):
            model.head.weight.mul_(factor)
    options = {"on_report": reports.append}
    fast = [torch.compile(model, backend=backend, options=options) for model in models]
    for _ in range(3):
        for model, network in zip(models, fast, strict=True):
            close(network, model, x)
    assert len(reports) == 3


def test_a_tensor_that_took_the_place_of_a_dead_one_is_not_taken_for_it() -> None:
    lowered, graph = [], torch.fx.symbolic_trace(lambda w, x: x * w)
    program = dynamo._Compiled(graph, ["w", None], "fp32", False, lowered.append)
    for value in range(20):  # the allocator gives the same address, and the object the same id, again and again
        weight = torch.full((3,), float(value))
        assert torch.equal(program(weight, torch.ones(3)), torch.full((3,), float(value)))
        del weight
    assert len(lowered) == 20 and len(program._lowered) <= dynamo.KEPT


def test_threads_that_come_together_lower_once() -> None:
    traced, reports = torch.fx.symbolic_trace(lambda w, x: torch.nn.functional.linear(x, w)), []
    weight, x = torch.randn(3, 4), torch.randn(2, 4)
    program = dynamo._Compiled(traced, ["w", None], "fp32", False, reports.append)
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        answers = list(pool.map(lambda _: program(weight, x), range(8)))
    assert len(reports) == 1 and all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_model_that_writes_its_buffers_runs_in_plain_torch() -> None:
    class Counting(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.layer(x) * self.calls

    model, x = Counting().eval(), torch.randn(2, 4)
    fast, reports = compiled(model)
    with torch.no_grad():
        for count in (1, 2, 3):
            torch.testing.assert_close(fast(x), model.layer(x) * count)
    assert model.calls == 3 and "buffers of the model" in str(reports[0])


def test_gradients_are_recorded_in_plain_torch_and_that_is_said() -> None:
    model, x = lively(Mixed(), *X), torch.randn(2, *X)
    fast, reports = compiled(model)
    with pytest.warns(UserWarning, match="gradients"):
        fast(x).sum().backward()
    assert model.head.weight.grad is not None and not reports


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 3e-3)])
def test_16_bit_floats_are_an_option(precision: str, tolerance: float) -> None:
    model, x = lively(Mixed(), *X), torch.randn(2, *X)
    fast, reports = compiled(model, precision=precision)
    close(fast, model, x, tolerance=tolerance)
    assert reports[0].precision == precision


def test_unknown_options_and_modes_are_named() -> None:
    model, x = lively(Mixed(), *X), torch.randn(2, *X)
    with torch.no_grad(), pytest.raises(Exception, match="precission"):
        compiled(model, precission="bf16")[0](x)
    with torch.no_grad(), pytest.raises(Exception, match="fp8"):
        compiled(model, precision="fp8")[0](x)
    with torch.no_grad(), pytest.raises(Exception, match="mode: 'max-autotune' is neither default nor reduce-overhead"):
        torch.compile(model, backend=backend, mode="max-autotune")(x)


# ---- CUDA graphs ----


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Cuda]:
    """CUDA graphs of lowered graphs, by a stand-in for torch.cuda: one of these for each lowered graph."""
    found: list[Cuda] = []

    def stand_in(program: torch.nn.Module) -> object:
        call, _, cuda = graphs(network=Network(program))
        found.append(cuda)
        return call

    monkeypatch.setattr(dynamo, "CudaGraphs", stand_in)
    return found


@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"options": {"cuda_graph": True}}], ids=str)
def test_a_graph_is_captured_and_replayed(captured: list[Cuda], how: dict[str, object]) -> None:
    model = lively(Mixed(), *X)
    fast = torch.compile(model, backend=backend, **how)
    for _ in range(3):
        close(fast, model, torch.randn(2, *X))
    (cuda,) = captured
    assert cuda.log.count("captured") == 1 and cuda.log.count("replay") == 3
    with torch.no_grad():
        model.head.weight.mul_(3)
    close(fast, model, torch.randn(2, *X))
    assert len(captured) == 2, "a changed weight is packed and captured again"


@pytest.mark.parametrize("how", [{}, {"mode": "default"}, {"options": {"cuda_graph": False}}], ids=str)
def test_none_is_captured_unless_asked_for(captured: list[Cuda], how: dict[str, object]) -> None:
    model = lively(Mixed(), *X)
    close(torch.compile(model, backend=backend, **how), model, torch.randn(2, *X))
    assert not captured


def test_outputs_are_nested_as_the_model_nests_them(captured: list[Cuda]) -> None:
    layer = torch.nn.Linear(4, 3)
    model = Function(lambda m, x: {"y": m.layer(x), "rest": [x + 1, (m.layer(x).relu(), 5)]}, layer=layer)
    fast, x = torch.compile(model, backend=backend, mode="reduce-overhead"), torch.randn(2, 4)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast(x), model(x))
    assert captured[0].log.count("replay") == 2


def test_a_graph_that_writes_into_its_inputs_runs_in_plain_torch(captured: list[Cuda]) -> None:
    model = Function(lambda m, x, seen: m.layer(x) + seen.add_(1), layer=torch.nn.Linear(4, 4))
    fast, reports = compiled(model, cuda_graph=True)
    x, seen = torch.randn(2, 4), torch.zeros(2, 4)
    with torch.no_grad():
        for count in (1, 2):
            torch.testing.assert_close(fast(x, seen), model.layer(x) + count)
    assert seen.eq(2).all() and not captured
    assert "it writes into its inputs" in str(reports[0])
