"""The CUDA library's private ops, each configuration against exact sums and the oracle's epilogue.

Cases are drawn here, for this command on a GPU and for the tests on the CPU, where an emulator runs the kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pykernels import _load, _tuned
from pykernels.reference.quantize import ACTIVATIONS, requantize

__all__ = ["CONVS", "DTYPES", "GEMMS", "Case", "check_conv", "check_gemm", "conv_case", "gemm_case", "variants"]

Report = dict[str, Any]
DTYPES = (torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32)
ORDERS = (None, "before", "after")  # of a residual, or none
TRANSCENDENTAL = {"silu", "sigmoid", "gelu", "tanh"}
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


@dataclass
class Case:
    """One call of a private op.

    Attributes:
        title: in words.
        given: its arguments by name, but for `config`; `out` is to be filled.
        expected: what it is to be filled with, as rows [m, n], on the CPU.
        activation: by name.
    """

    title: str
    given: dict[str, Any]
    expected: torch.Tensor
    activation: str

    def complaint(self) -> str | None:
        """What is wrong with `out`, or None."""
        out = self.given["out"]
        actual = out.movedim(1, -1).reshape(self.expected.shape).cpu()
        far = (actual.double() - self.expected.double()).abs()
        if self.activation in TRANSCENDENTAL:  # torch's own are other approximations, an ulp or two away
            most = 1e-2 * max(1.0, float(self.expected.double().abs().max())) if out.is_floating_point() else 1
            good = bool(far.max() <= most)
        else:
            good = torch.equal(actual, self.expected)
        return None if good else f"{int((far > 0).sum())} of {far.numel()} elements differ, by {far.max():.3g}"


def _finished(acc: torch.Tensor, dtype: torch.dtype, given: dict[str, Any]) -> torch.Tensor:
    """The oracle's answer for exact sums [m, n], in torch operations, each of which rounds by itself."""
    rows = given.get("row_scale")
    scale = rows[:, None] if rows is not None else torch.tensor(given["x_scale"], device=acc.device)
    f = acc.float() * (scale.float() * given["column_scale"]) + given["bias"]
    r = given["residual"]
    if r is not None:
        r = r.movedim(1, -1).reshape(acc.shape)
        if not r.is_floating_point():
            r = (r.int() - given["residual_zero_point"]).float() * torch.tensor(given["residual_scale"]).to(r.device)
    if r is not None and given["residual_order"] == "before":
        f = f + r.float()
    f = ACTIVATIONS[given["activation"]](f)
    if r is not None and given["residual_order"] == "after":
        f = f + r.float()
    return requantize(f.cpu(), given["out_scale"], given["out_zero_point"], dtype)


def _finishing(out: torch.Tensor, sums: torch.Tensor, order: str | None, activation: str) -> dict[str, Any]:
    """Arguments of an epilogue, drawn; `sums`: of the weights of each column."""
    byte, device = not out.is_floating_point(), out.device
    residual = None
    if order is not None:
        drawn = torch.randn(out.shape, device=device).mul(40 if byte else 1).clamp(0, 100).to(out.dtype)
        residual = torch.empty_like(out).copy_(drawn)
    return {
        "out": out,
        "column_scale": torch.rand(len(sums), device=device) * 1e-3 + 1e-4,
        "column_sum": sums,
        "bias": torch.randn(len(sums), device=device),
        "x_scale": 0.37,
        "out_scale": 0.11,
        "out_zero_point": 5 if byte else 0,
        "activation": activation,
        "residual": residual,
        "residual_scale": 0.07,
        "residual_zero_point": 9 if byte else 0,
        "residual_order": order or "before",
    }


def gemm_case(
    size: tuple[int, int, int], dtype: torch.dtype, order: str | None, activation: str, device: str = "cuda"
) -> Case:
    """Of `_cuda_int8_gemm`, rows with scales and zero points of their own where m + n is even."""
    m, n, k = size
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device=device)
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    rows = (m + n) % 2 == 0
    row_zero_point = torch.randint(0, 256, (m,), dtype=torch.int32, device=device) if rows else None
    out = torch.empty(m, n, dtype=dtype, device=device)
    given = {
        "a": a,
        "b": b,
        **_finishing(out, b.sum(1, dtype=torch.int32), order, activation),
        "row_scale": torch.rand(m, device=device) + 0.01 if rows else None,
        "row_zero_point": row_zero_point,
        "x_zero_point": 131,
    }
    zero = 131 if row_zero_point is None else row_zero_point[:, None]
    acc = ((a.double() - zero) @ b.double().t()).to(torch.int32)
    return Case(f"{m}x{n}x{k} {dtype} residual {order} {activation}", given, _finished(acc, dtype, given), activation)


def conv_case(
    size: tuple[Any, ...], dtype: torch.dtype, order: str | None, activation: str, device: str = "cuda"
) -> Case:
    """Of `_cuda_int8_conv`, for an entry of `CONVS`; without padding the zero point is not 0."""
    images, n, kernel, stride, padding, dilation = size
    c, nhwc = images[1], torch.channels_last
    x = torch.randint(0, 256, images, dtype=torch.uint8, device=device).to(memory_format=nhwc)
    w = torch.randint(-128, 128, (n, c, *kernel), dtype=torch.int8, device=device)
    zero_point = 0 if any(padding) else 131
    real = F.pad(x.double() - zero_point, padding)
    acc = F.conv2d(real, w.double(), None, stride, 0, dilation).round().to(torch.int32)
    given = {
        "x": x,
        "w": w.permute(0, 2, 3, 1).reshape(n, -1).contiguous(),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        **_finishing(
            torch.empty(acc.shape, dtype=dtype, device=device, memory_format=nhwc),
            w.sum((1, 2, 3), dtype=torch.int32),
            order,
            activation,
        ),
        "x_zero_point": zero_point,
    }
    expected = _finished(acc.movedim(1, -1).reshape(-1, n), dtype, given)
    return Case(f"{images} by {w.shape}/{stride} {dtype} residual {order} {activation}", given, expected, activation)


def variants(sizes: tuple[Any, ...], swapped: bool) -> Iterator[tuple[Any, torch.dtype, str | None, str]]:
    """Sizes by dtypes by residuals, activations in turn. Swapped configurations take no residual."""
    orders = (None,) if swapped else ORDERS
    return (
        (*variant, activation)
        for variant, activation in zip(
            itertools.product(sizes, DTYPES, orders), itertools.cycle(ACTIVATIONS), strict=False
        )
    )


def _check(op: str, sizes: tuple[Any, ...], make: Callable[..., Case]) -> Report:
    torch.manual_seed(0)
    configurations = _tuned.configurations(op)
    if not configurations:
        return {"looked_at": 0, "wrong": {}, "skipped": f"no CUDA library: {_load.CUDA_ERROR}"}
    capability = torch.cuda.get_device_capability()
    wrong: dict[str, str] = {}
    looked_at = 0
    for name, (index, needed) in configurations.items():
        if not _tuned.runs(needed, capability):
            continue
        for variant in variants(sizes, name.endswith("swapped")):
            case = make(*variant)
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
    found = _check("int8_gemm", GEMMS, gemm_case)
    if "skipped" in found:
        return found
    errors = check_gemm_errors()
    return {"looked_at": found["looked_at"] + errors["looked_at"], "wrong": found["wrong"] | errors["wrong"]}


def check_conv() -> Report:
    """Every configuration of the convolution."""
    return _check("int8_conv", CONVS, conv_case)


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
