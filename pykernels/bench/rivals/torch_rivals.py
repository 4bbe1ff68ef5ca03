"""What torch itself offers: eager, torch.compile, PT2E with inductor, `_int_mm`, dynamically quantized linears."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from pykernels.bench.case import Case, QDQLayer, pairs_saturate
from pykernels.bench.rivals.base import Absent, Rival, Run, calibration_parts, cast, require, require_floats

_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FLOAT = frozenset({"linear", "conv", "pool", "network"})
_BYTES = frozenset({"pool", "quantize"})


def module_of(case: Case, precision: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The case's module and inputs in `precision`, 4-D weights channels_last. Layers of bytes come as they are."""
    if precision == "int8" and case.model is not None:
        return case.model, case.inputs
    model = copy.deepcopy(require_floats(case)).to(_DTYPE[precision]).eval()
    if any(x.dim() == 4 for x in case.inputs):
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, cast(case.inputs, _DTYPE[precision])


def compiled(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Run:
    """torch.compile with freezing, the whole graph in one piece, already compiled on return."""
    from torch._inductor import config  # seconds, which other commands need not wait for

    fast = torch.compile(model, fullgraph=True)

    def run() -> Any:
        with torch.no_grad():  # freezing is refused where gradients could be wanted, also in inference_mode
            return fast(*inputs)

    # Not as an option of torch.compile: Dynamo asks the global setting whether weights are constants.
    with warnings.catch_warnings(), config.patch(freezing=True):
        warnings.simplefilter("ignore")
        run()
    return run


class Eager(Rival):
    """The module as it is, channels_last, without gradients."""

    name = "eager"

    def __init__(self, precision: str) -> None:
        super().__init__(precision)
        self.families = _BYTES if precision == "int8" else _FLOAT

    def prepare(self, case: Case) -> Run:
        model, inputs = module_of(case, self.precision)

        def run() -> Any:
            with torch.inference_mode():
                return model(*inputs)

        return run


class Compiled(Eager):
    """torch.compile (inductor) with freezing, channels_last."""

    name = "torch.compile"

    def prepare(self, case: Case) -> Run:
        return compiled(*module_of(case, self.precision))


class InductorInt8(Rival):
    """PT2E with X86InductorQuantizer and inductor: oneDNN's int8 kernels. A layer is given in its Q/DQ form,
    bytes in."""

    name = "PT2E"
    families = frozenset({"gemm", "conv", "network"})

    def __init__(self) -> None:
        super().__init__("int8")

    def prepare(self, case: Case) -> Run:
        passes = require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", "torchao")
        if case.family == "network":
            assert case.model is not None
            return compiled(self._quantize(passes, case), case.inputs)
        if case.quantized is None:
            raise Absent("the case has no int8 form")
        # Inductor's patterns want the exported form, where every operator is an aten one.
        exported = torch.export.export(QDQLayer(case.quantized).eval(), (case.quantized.x,), strict=True).module()
        return compiled(exported, (case.quantized.x,))

    @staticmethod
    def _quantize(passes: Any, case: Case) -> nn.Module:
        pt2e = require("torchao.quantization.pt2e.quantize_pt2e", "torchao")
        assert case.model is not None
        exported = torch.export.export(copy.deepcopy(case.model), case.inputs, strict=True).module()
        quantizer = passes.X86InductorQuantizer().set_global(
            passes.get_default_x86_inductor_quantization_config(reduce_range=pairs_saturate())
        )
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = pt2e.prepare_pt2e(exported, quantizer)
            for batch in calibration_parts(case):
                prepared(batch)
            return pt2e.convert_pt2e(prepared)


class IntMM(Rival):
    """`torch._int_mm`: s8 x s8 -> s32, no scales applied: less work than the others' fp32 answer."""

    name = "torch._int_mm"
    families = frozenset({"gemm"})

    def __init__(self) -> None:
        super().__init__("int8")

    def prepare(self, case: Case) -> Run:
        if case.quantized is None or case.quantized.is_conv:
            raise Absent("it multiplies matrices only")
        layer = case.quantized
        # Its operands are signed: x - 128 and the zero point with it, which leaves the sums of x - zero_point the same
        # when the zero point is 128.
        if layer.x_zero_point != 128:
            raise Absent("it has no zero point")
        a, b = (
            (layer.x.to(torch.int16) - 128).to(torch.int8),
            layer.weight.t(),
        )  # [K, N] over [N, K]: its fastest layout

        def run() -> Any:
            return torch._int_mm(a, b)

        return run


class DynamicLinear(Rival):
    """`torch.ao.quantization.quantize_dynamic` of an nn.Linear: fp32 in and out, quantized inside, per tensor."""

    name = "torch dynamic"
    families = frozenset({"linear"})

    def __init__(self) -> None:
        super().__init__("int8")

    def prepare(self, case: Case) -> Run:
        model, inputs = module_of(case, "fp32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            quantized = torch.ao.quantization.quantize_dynamic(
                model, {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
            )

        def run() -> Any:
            with torch.inference_mode():
                return quantized(*inputs)

        return run


class TorchaoLinear(Rival):
    """torchao's Int8DynamicActivationInt8WeightConfig (per token, as ours), compiled."""

    name = "torchao"
    families = frozenset({"linear"})

    def __init__(self) -> None:
        super().__init__("int8")

    def prepare(self, case: Case) -> Run:
        torchao = require("torchao.quantization", "torchao")
        model, inputs = module_of(case, "fp32")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torchao.quantize_(model, torchao.Int8DynamicActivationInt8WeightConfig())
        return compiled(model, inputs)
