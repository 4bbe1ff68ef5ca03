"""The CUDA library's private ops on a GPU: each configuration against exact sums and the oracle's epilogue."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from pykernels.cuda import tables
from pykernels.ops import _load

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))
import library_calls

__all__ = ["check_conv", "check_gemm"]

Report = dict[str, Any]
# m, n, k that fill no tile.
GEMMS = ((1, 16, 16), (7, 48, 32), (16, 256, 512), (65, 272, 144), (130, 320, 272), (513, 1040, 1552), (300, 64, 16384))
# Images, output channels, kernel, stride, padding (left, right, top, bottom), dilation.
CONVS = (
    ((1, 16, 5, 4), 16, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((2, 48, 13, 9), 80, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2)),
    ((3, 64, 14, 14), 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((2, 144, 17, 11), 272, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    ((5, 256, 7, 7), 512, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    ((1, 32, 40, 33), 96, (7, 5), (3, 2), (0, 0, 0, 0), (2, 3)),
)


def _check(op: str, sizes: tuple[Any, ...], make: Callable[..., library_calls.Case]) -> Report:
    torch.manual_seed(0)
    configurations = tables.configurations(op)
    if not configurations:
        return {"looked_at": 0, "wrong": {}, "skipped": f"no CUDA library: {_load.CUDA_ERROR}"}
    capability = torch.cuda.get_device_capability()
    wrong: dict[str, str] = {}
    looked_at = 0
    for name, (index, needed) in configurations.items():
        if not tables.runs(needed, capability):
            continue
        for variant in library_calls.variants(sizes, name.endswith("swapped")):
            case = make(*variant, "cuda")
            looked_at += 1
            try:
                getattr(torch.ops.pykernels, f"_cuda_{op}")(**case.given, config=index)
                complaint = case.complaint()
            except RuntimeError as error:
                complaint = str(error).splitlines()[0][:300]
            if complaint is not None:
                wrong[f"{name}: {case.title}"] = complaint
    return {"looked_at": looked_at, "wrong": wrong}


def check_gemm() -> Report:
    """Every configuration of the GEMM, over sizes that fill no tile; and errors."""
    found = _check("int8_gemm", GEMMS, library_calls.gemm_case)
    if "skipped" in found:
        return found
    errors = check_gemm_errors()
    return {"looked_at": found["looked_at"] + errors["looked_at"], "wrong": found["wrong"] | errors["wrong"]}


def check_conv() -> Report:
    """Every configuration of the convolution."""
    return _check("int8_conv", CONVS, library_calls.conv_case)


def check_gemm_errors() -> Report:
    """Whether bad arguments of the private op are refused by name, before anything runs."""
    m, n, k = 32, 48, 64
    numbers = torch.ones(n, device="cuda")
    good = {
        "a": torch.zeros(m, k, dtype=torch.uint8, device="cuda"),
        "b": torch.zeros(n, k, dtype=torch.int8, device="cuda"),
        "out": torch.empty(m, n, device="cuda"),
        "column_scale": numbers,
        "column_sum": numbers.int(),
        "bias": numbers,
        **dict.fromkeys(["row_scale", "row_zero_point", "residual"]),
        **dict.fromkeys(["x_scale", "out_scale", "residual_scale"], 1.0),
        **dict.fromkeys(["x_zero_point", "out_zero_point", "residual_zero_point", "config"], 0),
        "activation": "none",
        "residual_order": "before",
    }
    bad: list[tuple[str, Any]] = [
        ("a", good["a"].char()),
        ("b", good["b"].byte()),
        ("b", good["b"][:, :16].contiguous()),
        ("b", good["b"].cpu()),
        ("out", good["out"].double()),
        ("out", good["out"][:5]),
        ("column_scale", numbers[1:]),
        ("column_sum", numbers),
        ("bias", numbers.cpu()),
        ("row_scale", numbers),
        ("x_scale", 0.0),
        ("x_zero_point", 256),
        ("activation", "softplus"),
        ("residual", good["out"].half()),
        ("residual_order", "beside"),
        ("config", -1),
    ]
    wrong: dict[str, str] = {}
    for i, (name, value) in enumerate(bad):
        try:
            torch.ops.pykernels._cuda_int8_gemm(**{**good, name: value})
            wrong[f"bad {name} ({i})"] = "not refused"
        except RuntimeError as error:
            if f"_cuda_int8_gemm: {name}" not in str(error):
                wrong[f"bad {name} ({i})"] = str(error).splitlines()[0][:300]
    return {"looked_at": len(bad), "wrong": wrong}
