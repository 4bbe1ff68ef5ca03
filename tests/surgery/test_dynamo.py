"""``torch.compile(model, backend="pykernels")``."""

from __future__ import annotations

import pytest
import torch
from networks import Mixed, close, lively

from pykernels.surgery import Report
from pykernels.surgery.dynamo import pykernels as backend

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


def test_gradients_are_recorded_in_plain_torch_and_that_is_said() -> None:
    model, x = lively(Mixed(), *X), torch.randn(2, *X)
    fast, reports = compiled(model)
    with pytest.warns(UserWarning, match="gradients"):
        fast(x).sum().backward()
    assert model.head.weight.grad is not None and not reports


def test_bf16_is_an_option_and_unknown_options_are_named() -> None:
    model, x = lively(Mixed(), *X), torch.randn(2, *X)
    fast, reports = compiled(model, precision="bf16")
    close(fast, model, x, tolerance=2e-2)
    assert reports[0].precision == "bf16"
    with torch.no_grad(), pytest.raises(Exception, match="precission"):
        compiled(model, precission="bf16")[0](x)
    with torch.no_grad(), pytest.raises(Exception, match="fp8"):
        compiled(model, precision="fp8")[0](x)
