"""Surgery on a CUDA device, without one: shapes, devices and no values, as fake tensors know them."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Mixed, lively
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import pykernels as pk
from pykernels.cuda import registry
from pykernels.network.devices import follow, graph_device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ERROR", None)


def devices(program: fx.GraphModule) -> set[torch.device]:
    return {tensor.device for tensor in (*program.parameters(), *program.buffers())}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_on_a_gpu_is_lowered_there(gpu: None, precision: str) -> None:
    model = Mixed()
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, t in tensors.items():
                    if t is not None:
                        there = torch.empty(t.shape, dtype=t.dtype, device=CUDA)
                        tensors[name] = nn.Parameter(there) if isinstance(t, nn.Parameter) else there
        fast = pk.optimize(model, torch.randn(2, 3, 12, 12), precision=precision, dynamic_batch=False)
        assert devices(fast.program) == {CUDA}
        assert fast.report().device == "cuda:0" and {entry.by for entry in fast.report().fused} >= {"Triton"}
        assert fast(torch.empty(2, 3, 12, 12, device=CUDA)).device == CUDA


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lowered_network_leaves_nothing_on_the_cpu(precision: str) -> None:
    """Each call of it, with its constants on a GPU, is on the GPU."""
    x = torch.randn(2, 3, 12, 12)
    program = copy.deepcopy(pk.optimize(lively(Mixed(), 3, 12, 12), x, precision=precision).program)
    with FakeTensorMode():
        for name, buffer in list(program.named_buffers()):
            program._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
        (y,) = program(torch.empty(2, 3, 12, 12, device=CUDA))
    assert y.device == CUDA and y.shape == (2, 10)


def test_calls_that_name_a_device_follow() -> None:
    class Places(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.arange(4, device=x.device) + torch.zeros(4).to(x.device)

    program = torch.export.export(Places(), (torch.randn(2, 4),)).module()
    program.register_buffer("here", torch.empty(1, device="meta"))
    assert graph_device(program) == follow(program) == torch.device("meta")
    named = [
        leaf for n in program.graph.nodes for leaf in (*n.args, *n.kwargs.values()) if isinstance(leaf, torch.device)
    ]
    assert named and set(named) == {torch.device("meta")}
