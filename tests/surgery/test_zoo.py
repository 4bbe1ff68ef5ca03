"""Whole networks answer as eager does, in every precision, for another batch size than the example's."""

from __future__ import annotations

import pytest
import torch
from models import ZOO, network
from networks import close

import pykernels as pk

QUICK = {"unet", "squeezenet1_1", "mobilenet_v3_small"}
SLOW = pytest.mark.slow
# What each leaves to torch, as {op}; all else must run on our kernels.
LEFT = {
    "mobilenet_v3_small": {"mul"},
    "squeezenet1_1": {"cat"},
    "densenet121": {"cat"},
    "googlenet": {"cat", "mul", "add"},
    "shufflenet_v2_x0_5": {"cat"},
    "unet": {"cat", "conv_transpose2d", "upsample_nearest2d"},
}
LEFT_INT8 = {"googlenet": {"mul", "add"}, "unet": {"conv_transpose2d"}}


def other_batch(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x[:1].flip(-1)])


@pytest.mark.parametrize("name", ZOO)
def test_float_answers_match_eager(name: str) -> None:
    model, x = network(name)
    fast = pk.optimize(model, (x,))
    assert fast.dynamic and not fast.report().notes
    assert {entry.op for entry in fast.report().left} == LEFT.get(name, set())
    close(fast, model, other_batch(x), tolerance=1e-4)


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in ZOO])
def test_bf16_errs_no_more_than_torch_in_bf16(name: str) -> None:
    model, x = network(name)
    x = other_batch(x)
    fast = pk.optimize(model, (x,), precision="bf16")
    with torch.no_grad():
        exact, ours = model(x), fast(x)
        torchs = model.to(torch.bfloat16)(x.to(torch.bfloat16)).float()
    error, allowed = (ours - exact).norm() / exact.norm(), (torchs - exact).norm() / exact.norm()
    assert error <= 1.2 * allowed + 1e-3, f"{error:.3f}, torch's own {allowed:.3f}"


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=SLOW) for name in ZOO])
def test_int8_is_int8_throughout_and_close_to_its_simulation_and_to_fp32(name: str) -> None:
    from pykernels.quantization import recipes

    model, x = network(name)
    data = torch.cat([x, torch.randn(14, *x.shape[1:])])
    simulated = recipes.quantize(model, (x,), [data], refine=False)  # the lowering is on trial, not the rounding
    fast = pk.optimize(simulated, (x,), precision="int8")
    assert {entry.op for entry in fast.report().left} == LEFT_INT8.get(name, set())
    # The two round alike but for ties broken by fp32 sums in another order. A quantum early is many at the end of a
    # deep random network. So they are compared by what they lose: lowering must not add to the error of quantization.
    x = other_batch(x)
    with torch.no_grad():
        exact, expected, answer = model(x), simulated(x), fast(x)
    quantization, lowering = (expected - exact).norm(), (answer - expected).norm()
    assert lowering <= 0.5 * quantization, (
        f"{lowering / exact.norm():.3f}, quantization {quantization / exact.norm():.3f}"
    )
    assert (answer - exact).norm() <= 1.05 * quantization + 1e-3 * exact.norm()
    assert quantization <= 0.25 * exact.norm()
