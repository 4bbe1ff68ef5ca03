"""Networks lowered as on a GPU: packed by the CUDA ops, run by their launchers in the interpreter, the CPU's answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from inputs import same
from launchers import Launchers
from torch import nn

import pykernels as pk
from benchmarks.gpu.check_networks import apart, check_networks, mobile
from pykernels.network.report import Report
from pykernels.quantization import recipes
from pykernels.tune.on_device import from_host
from tests.stand_in import Gpu

X = torch.randn(2, 3, 15, 15)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return mobile(15)


@pytest.fixture(scope="module")
def quantized(model: nn.Module) -> nn.Module:
    return recipes.quantize(model, (X,), [torch.randn(4, 3, 15, 15) for _ in range(4)], refine=False)


def packings(network: nn.Module) -> list[torch.Tensor]:
    return [buffer for name, buffer in network.named_buffers() if "packed" in name]


def as_on_a_gpu(model: nn.Module, precision: str, mode: Launchers) -> pk.Optimized:
    with mode:
        network = pk.optimize(model, X, precision=precision)
    assert packings(network) and all(len(packed) % 64 == 16 for packed in packings(network))
    network.planned = None  # plans are the CPU's
    mode.calls.clear()
    return network


def test_an_int8_network_is_the_cpus_to_the_bit(quantized: nn.Module, mode: Launchers) -> None:
    here, there = pk.optimize(quantized, X, precision="int8"), as_on_a_gpu(quantized, "int8", mode)
    assert here.report().fused == there.report().fused
    for batch in (2, 1):
        x = torch.randn(batch, 3, 15, 15)
        with mode:
            y = there(x)
        same(y, here(x))
    ours = [n.target._schema.name for n in there.program.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert mode.calls.total() == 2 * sum(name.startswith("pykernels::") for name in ours)
    assert {"qconv2d", "int8_linear", "qmul", "qcat", "max_pool2d", "quantize_per_tensor"} <= set(mode.calls)


def test_an_int8_network_called_from_the_host_answers_there(mode: Launchers, monkeypatch: pytest.MonkeyPatch) -> None:
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    small = recipes.quantize(small, (X,), [X], refine=False)
    here, there = pk.optimize(small, X, precision="int8"), as_on_a_gpu(small, "int8", mode)
    gpu = Gpu(monkeypatch)
    there.cuda_graph = False  # so every call runs the launchers
    called = from_host(there.to("cuda"))
    with mode:
        y = called(X)
    same(y, here(X))
    assert mode.calls["qconv2d"] == 1 and gpu.log[-1] == "slept"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_float_network_is_close_to_the_cpus(model: nn.Module, mode: Launchers, precision: str) -> None:
    here, there = pk.optimize(model, X, precision=precision), as_on_a_gpu(model, precision, mode)
    with mode:
        y = there(X)
    expected = here(X)
    assert (y - expected).norm() <= {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.004}[precision] * expected.norm()
    assert {"conv2d", "linear", "max_pool2d", "avg_pool2d"} <= set(mode.calls)


def test_a_network_that_comes_from_a_gpu_is_packed_again(quantized: nn.Module, mode: Launchers, tmp_path: Path) -> None:
    here, there = pk.optimize(quantized, X, precision="int8"), as_on_a_gpu(quantized, "int8", mode)
    there._report = there._report.on(torch.device("cuda"))
    there.save(tmp_path / "there.pk")
    loaded = pk.load(tmp_path / "there.pk")
    assert loaded.report().device == "cpu"
    same(loaded(X), here(X))
    moved = there.to("cpu")
    for packed, expected in zip(packings(moved), packings(here), strict=True):
        assert torch.equal(packed, expected)
    assert moved.report() == here.report()
    same(moved(X), here(X))
    moved.save(tmp_path / "network.pk")
    same(pk.load(tmp_path / "network.pk", device="cpu")(X), here(X))


def test_what_was_packed_elsewhere_is_refused_with_advice(quantized: nn.Module, mode: Launchers) -> None:
    here, there = pk.optimize(quantized, X, precision="int8"), as_on_a_gpu(quantized, "int8", mode)
    with mode, pytest.raises(RuntimeError, match="packed is refused: it was packed on the CPU"):
        here.program(X)
    with pytest.raises(RuntimeError, match="packed"):
        there(X)


def test_swapped_modules(mode: Launchers) -> None:
    model = mobile(15)
    calibration = [torch.randn(2, 3, 15, 15)]
    pk.swap(model, "int8", calibration)
    expected = model(X).detach()
    with mode, torch.no_grad():
        model.eval()
        for module in model.modules():
            if hasattr(module, "_key"):
                module._key = None  # as after a move: packed again
        y = model(X)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    assert {"qconv2d", "int8_linear", "quantize_per_tensor", "qconv2d_pack"} <= set(mode.calls)


def test_a_float16_model_in_int8(mode: Launchers) -> None:
    half, x = mobile(15).half(), X.half()
    calibration = [torch.randn(4, 3, 15, 15).half()]
    network = pk.optimize(half, x, "int8", calibration)
    with mode:
        (y,) = pk.optimize(half, x, "int8", calibration).program(x)
    assert y.dtype == torch.float16
    same(y, network(x))
    pk.swap(half, "int8", calibration)
    expected = half(x).detach()
    with mode, torch.no_grad():
        half.eval()
        for module in half.modules():
            if hasattr(module, "_key"):
                module._key = None
        y = half(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-3)


def test_the_report_says_what_runs_a_group_on_a_gpu(model: nn.Module) -> None:
    report = pk.optimize(model, X).report()
    there = report.on(torch.device("cuda", 1))
    assert there.device == "cuda:1" and Report.from_json(there.to_json()) == there
    by = {entry.op: entry.by for entry in there.fused}
    assert (
        by["conv2d"] == "cuDNN through ATen" and by["linear"] == "cuBLAS through ATen" and by["max_pool2d"] == "Triton"
    )
    assert "on cuda:1" in str(there) and "cuDNN through ATen" in str(there)
    assert there.on(torch.device("cpu")) == report and "Triton" not in str(report)


def test_a_model_must_be_on_one_device_that_we_know(model: nn.Module) -> None:
    spread = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, device="meta"))
    with pytest.raises(ValueError, match="model: it is on several devices, cpu, meta"):
        pk.optimize(spread, X)
    with pytest.raises(ValueError, match="model: it is on meta, and our kernels are for the CPU and for CUDA devices"):
        pk.optimize(nn.Conv2d(3, 4, 3, device="meta"), X)
    with pytest.raises(RuntimeError, match="device: meta cannot be used"):
        pk.load("network.pk", device="meta")
    report = pk.swap(nn.Sequential(nn.Conv2d(3, 4, 3, device="meta")))
    assert "our kernels are for the CPU and for CUDA devices" in report.left[0].reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_script_that_checks_networks_on_a_gpu() -> None:
    """Here on the CPU: it finds nothing wrong, and would."""
    found = dict(check_networks(torch.device("cpu"), 15))
    assert len(found) == 17 and set(found.values()) == {None}
    assert apart(torch.ones(3), torch.tensor([1.0, 2.0, 1.0]), "int8") == "1 numbers differ"
    assert apart(torch.ones(3), torch.zeros(3) + 1.1, "fp32").startswith("it is off by")
