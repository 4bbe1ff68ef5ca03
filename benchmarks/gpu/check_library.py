"""The CUDA library's private ops on a GPU: each configuration against exact sums and the oracle's epilogue."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.side_by_side import Findings, Skipped, share_of
from pykernels.cuda import tables
from pykernels.ops import _load

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "tests"))
import library_calls

__all__ = ["check_conv", "check_few_channels", "check_gemm"]

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

# Likewise, of kernels of few channels.
FEWS = (
    ((2, 3, 224, 224), 64, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    ((3, 3, 97, 150), 32, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    ((1, 2, 3, 290), 16, (3, 2), (1, 1), (4, 3, 3, 5), (1, 1)),
    ((3, 1, 14, 21), 96, (5, 5), (2, 1), (0, 0, 0, 0), (1, 1)),
    ((1, 4, 19, 9), 48, (4, 5), (1, 2), (2, 1, 0, 2), (1, 1)),
    ((2, 3, 34, 37), 128, (7, 7), (1, 1), (3, 3, 3, 3), (1, 1)),
    ((1, 3, 7, 6), 80, (1, 6), (1, 1), (3, 2, 0, 0), (1, 1)),
)


def _check(op: str, sizes: tuple[Any, ...], make: Callable[..., library_calls.Case], number: int, of: int) -> Findings:
    torch.manual_seed(0)
    if not tables.configurations(op):
        raise Skipped(f"no CUDA library: {_load.CUDA_ERROR}")
    capability = torch.cuda.get_device_capability()
    for name, (index, needed) in share_of(list(tables.configurations(op).items()), number, of):
        if not tables.runs(needed, capability):
            continue
        fit = [size for size in sizes if op != "int8_few_channels" or name in tables.few_channels_fit(size[2], size[1])]
        for variant in library_calls.variants(fit, name.endswith("swapped")):
            case = make(*variant, "cuda")
            try:
                getattr(torch.ops.pykernels, f"_cuda_{op}")(**case.given, config=index)
                complaint = case.complaint()
            except RuntimeError as error:
                complaint = str(error).splitlines()[0][:300]
            yield f"{name}: {case.title}", complaint


def check_gemm(number: int = 0, of: int = 1) -> Findings:
    """Every configuration of the GEMM, over sizes that fill no tile; and errors."""
    yield from _check("int8_gemm", GEMMS, library_calls.gemm_case, number, of)
    if number == 0:
        yield from check_gemm_errors()


def check_conv(number: int = 0, of: int = 1) -> Findings:
    """Every configuration of the convolution."""
    yield from _check("int8_conv", CONVS, library_calls.conv_case, number, of)


def check_few_channels(number: int = 0, of: int = 1) -> Findings:
    """Every configuration of the convolution of few channels, on the layers that it is for."""
    yield from _check("int8_few_channels", FEWS, library_calls.few_channels_case, number, of)


def check_gemm_errors() -> Findings:
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
    for i, (name, value) in enumerate(bad):
        complaint: str | None = "not refused"
        try:
            torch.ops.pykernels._cuda_int8_gemm(**{**good, name: value})
        except RuntimeError as error:
            refused = f"_cuda_int8_gemm: {name}" in str(error)
            complaint = None if refused else str(error).splitlines()[0][:300]
        yield f"bad {name} ({i})", complaint
