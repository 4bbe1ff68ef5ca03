"""Every op of the library by its CUDA launcher, interpreted: dtypes, shapes, strides and values are the CPU op's."""

from __future__ import annotations

import pytest
import torch
from contract import CPU_ONLY, Sample, samples
from launchers import Launchers
from torch.utils._pytree import tree_leaves

from pykernels.cuda import registry

# Sums of floats, in another order; what bf16 keeps of them.
SUMS = {"linear", "conv2d", "conv_bn_act", "avg_pool2d", "adaptive_avg_pool2d", "int8_linear", "softmax", "layer_norm"}
SUMS |= {"attention"}


def launched() -> list[Sample]:
    """Samples of the ops that have launchers, made anew: weights are packed where they are made."""
    return [sample for sample in samples() if sample.op not in CPU_ONLY]


NAMES = [sample.name for sample in launched()]


def test_every_op_has_a_launcher_and_a_sample() -> None:
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("pykernels::")}
    public = {name.removeprefix("pykernels::") for name in names if not name.startswith("pykernels::_")}
    assert public - CPU_ONLY == set(registry.KERNELS) == {sample.op for sample in launched()}


def drawn(index: int) -> tuple[Sample, dict[str, torch.Tensor]]:
    """The same numbers each time; weights are packed here."""
    torch.manual_seed(0)
    sample = launched()[index]
    return sample, sample.make(3)


def check_call(mode: Launchers, index: int) -> None:
    """A sample's results by its op's launcher, and nothing else of the library, are the CPU's."""
    sample, tensors = drawn(index)
    expected = tree_leaves(sample.call(**tensors))
    with mode:
        sample, tensors = drawn(index)
        mode.calls.clear()
        actual = tree_leaves(sample.call(**tensors))
    assert mode.calls == {sample.op: 1}
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        if sample.op.endswith("_pack"):  # in a layout of its own
            assert len(a) % 64 == 16 and len(e) % 64 == 0
            continue
        assert a.shape == e.shape and a.stride() == e.stride()
        if sample.op in SUMS and a.is_floating_point():
            tolerance = 2e-5 if a.dtype == torch.float32 else 2**-6
            torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)
        else:
            torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize("index", range(len(NAMES)), ids=NAMES)
def test_a_call_is_the_cpus(mode: Launchers, index: int) -> None:
    check_call(mode, index)
