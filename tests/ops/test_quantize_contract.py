"""The ops on bytes under the framework's contract, and every bad argument named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from int8 import LAYOUTS, assert_same, channels_last, codes, reals

from pykernels.ops import quantize as ops

X = reals((2, 6, 5, 7), torch.float32)
Q = codes((2, 6, 5, 7), torch.uint8)
S6, Z6 = torch.rand(6) + 0.1, torch.arange(6)
TOKEN = (Q, torch.rand(2, 6, 5, 1), torch.zeros(2, 6, 5, 1, dtype=torch.int32))
ARITHMETIC = (0.1, 3, 0.2, 4, 0.3, 5, torch.int8)
CALLS: dict[str, tuple[object, ...]] = {
    "quantize_per_tensor": (X, 0.1, 3, torch.uint8),
    "dequantize_per_tensor": (Q, 0.1, 3, torch.bfloat16),
    "quantize_per_channel": (X, S6, Z6, 1, torch.int8),
    "dequantize_per_channel": (Q, S6, Z6, 1, torch.float32),
    "quantize_per_token": (X, torch.uint8),
    "dequantize_per_token": (*TOKEN, torch.float32),
    "quantize_per_block": (X, 32),
    "dequantize_per_block": (Q.view(torch.int8), torch.rand(14), 32, torch.float32),
    "qadd": (Q, Q, *ARITHMETIC, "relu"),
    "qmul": (Q, codes((2, 6, 1, 1), torch.uint8), *ARITHMETIC),
    "qcat": ([Q, Q], [0.1, 0.2], [3, 4], 1, 0.1, 3, torch.uint8),
    "qlookup": (Q, codes((256,), torch.int8)),
}


def with_layout(arguments: tuple[object, ...], change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[object, ...]:
    def convert(value: object) -> object:
        if isinstance(value, list):
            return [convert(v) for v in value]
        return change(value) if isinstance(value, torch.Tensor) and value.shape == X.shape else value

    return tuple(convert(value) for value in arguments)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "strided"])
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str, layout: str) -> None:
    arguments = with_layout(CALLS[name], LAYOUTS[layout])
    torch.library.opcheck(getattr(torch.ops.pykernels, name).default, arguments)


@pytest.mark.parametrize("name", CALLS)
def test_every_public_function_has_its_op_and_compiles_whole(name: str) -> None:
    function = getattr(ops, name)
    arguments = with_layout(CALLS[name], channels_last)
    expected = function(*arguments)
    for dynamic in (False, True):
        torch.compiler.reset()
        got = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")(*arguments)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


class Round(torch.nn.Module):
    """Real to bytes, every kind of arithmetic, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", ops.lookup_table(F.hardswish, 0.05, 128, 0.05, 20))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = ops.quantize_per_tensor(x, 0.05, 128)
        q = ops.qcat([q, ops.qlookup(q, self.table)], [0.05, 0.05], [128, 20], 1, 0.05, 128)
        gate = ops.quantize_per_token(x.mean((2, 3), keepdim=True).repeat(1, 2, 1, 1))[0]
        q = ops.qmul(ops.qadd(q, q, 0.05, 128, 0.05, 128, 0.1, 128), gate, 0.1, 128, 0.01, 0, 0.1, 128)
        return ops.dequantize_per_tensor(q, 0.1, 128)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_export_with_a_dynamic_batch_and_reload(layout: str, tmp_path) -> None:
    model, x = Round(), LAYOUTS[layout](reals((2, 6, 5, 7), torch.float32))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "round.pt2")
    loaded = torch.export.load(tmp_path / "round.pt2").module()
    for batch in (2, 5):
        y = LAYOUTS[layout](reals((batch, 6, 5, 7), torch.float32, batch))
        assert_same(loaded(y), model(y))


def test_inductor_compiles_it(isa: str) -> None:
    model, x = Round(), channels_last(reals((2, 6, 5, 7), torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.inference_mode():
        assert_same(compiled(x), model(x))


# ---- bad arguments ----

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("scale", [0.0, -1.0, NAN, INF, -INF, 1e-40, 1e-300, 1e300])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        (": scale", lambda s: ops.quantize_per_tensor(X, s)),
        (": scale", lambda s: ops.dequantize_per_tensor(Q, s)),
        (": scale", lambda s: ops.quantize_per_channel(X, torch.tensor([1.0, s] * 3, dtype=torch.float64), Z6, 1)),
        (": scale", lambda s: ops.dequantize_per_channel(Q, torch.tensor([1.0, s] * 3), Z6, 1)),
        (": a_scale", lambda s: ops.qadd(Q, Q, s, 0, 1.0, 0, 1.0, 0)),
        (": b_scale", lambda s: ops.qadd(Q, Q, 1.0, 0, s, 0, 1.0, 0)),
        (": out_scale", lambda s: ops.qmul(Q, Q, 1.0, 0, 1.0, 0, s, 0)),
        (r": scales\[1\]", lambda s: ops.qcat([Q, Q], [1.0, s], [0, 0], 1, 1.0, 0)),
        (": out_scale", lambda s: ops.qcat([Q, Q], [1.0, 1.0], [0, 0], 1, s, 0)),
        (": scale", lambda s: ops.lookup_table(F.relu, s, 0, 1.0, 0)),
    ],
)
def test_a_scale_must_be_positive_and_finite(name: str, call: Callable[[float], object], scale: float) -> None:
    with pytest.raises(RuntimeError, match=f"{name} must be a positive number that fp32 holds"):
        call(scale)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        # dtype
        ("x must be float32, bfloat16 or float16, not float64", lambda: ops.quantize_per_tensor(X.double(), 0.1)),
        ("x must be float32, bfloat16 or float16, not int32", lambda: ops.quantize_per_token(X.int())),
        ("x must be float32, bfloat16 or float16, not int64", lambda: ops.quantize_per_block(X.long(), 4)),
        ("x must be float32, bfloat16 or float16, not uint8", lambda: ops.quantize_per_channel(Q, S6, Z6, 1)),
        ("x must be uint8 or int8, not float32", lambda: ops.dequantize_per_tensor(X, 0.1)),
        ("x must be uint8 or int8, not int32", lambda: ops.dequantize_per_channel(Q.int(), S6, Z6, 1)),
        ("x must be uint8 or int8, not bool", lambda: ops.dequantize_per_token(Q.bool(), *TOKEN[1:])),
        ("x must be int8, not uint8", lambda: ops.dequantize_per_block(Q, torch.rand(14), 32)),
        ("dtype must be uint8 or int8, not int32", lambda: ops.quantize_per_tensor(X, 0.1, 0, torch.int32)),
        ("dtype must be uint8 or int8, not float32", lambda: ops.quantize_per_token(X, torch.float32)),
        ("dtype must be float32, bfloat16 or float16, not uint8", lambda: ops.dequantize_per_tensor(Q, 1, 0, Q.dtype)),
        ("a must be uint8 or int8", lambda: ops.qadd(X, Q, 1.0, 0, 1.0, 0, 1.0, 0)),
        ("b must be uint8 or int8", lambda: ops.qmul(Q, X, 1.0, 0, 1.0, 0, 1.0, 0)),
        ("out_dtype must be uint8 or int8", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 0, 1.0, 0, torch.float32)),
        (r"xs\[1\] must be uint8 or int8", lambda: ops.qcat([Q, X], [1.0, 1.0], [0, 0], 1, 1.0, 0)),
        ("table must be uint8 or int8", lambda: ops.qlookup(Q, torch.zeros(256))),
        ("x must be uint8 or int8", lambda: ops.qlookup(X, torch.zeros(256, dtype=torch.uint8))),
        ("scale must be float32 or float64, not float16", lambda: ops.quantize_per_channel(X, S6.half(), Z6, 1)),
        ("zero_point must be int32 or int64, not float32", lambda: ops.quantize_per_channel(X, S6, Z6.float(), 1)),
        ("scale must be float32, not float64", lambda: ops.dequantize_per_token(Q, TOKEN[1].double(), TOKEN[2])),
        ("zero_point must be int32, not int64", lambda: ops.dequantize_per_token(Q, TOKEN[1], TOKEN[2].long())),
        ("scale must be float32", lambda: ops.dequantize_per_block(Q.view(torch.int8), torch.rand(14).half(), 32)),
        # zero points
        ("zero_point must lie in .0, 255. for uint8, not 256", lambda: ops.quantize_per_tensor(X, 0.1, 256)),
        ("zero_point must lie in .0, 255. for uint8, not -1", lambda: ops.dequantize_per_tensor(Q, 0.1, -1)),
        ("zero_point must lie in .-128, 127. for int8", lambda: ops.quantize_per_tensor(X, 0.1, 128, torch.int8)),
        ("zero_point must lie in", lambda: ops.quantize_per_tensor(X, 0.1, 2**62)),
        ("zero_point must lie in", lambda: ops.quantize_per_channel(X, S6, Z6 + 200, 1)),
        ("zero_point must lie in", lambda: ops.dequantize_per_channel(Q, S6, Z6 - 1, 1)),
        ("a_zero_point must lie in", lambda: ops.qadd(Q, Q, 1.0, -1, 1.0, 0, 1.0, 0)),
        ("b_zero_point must lie in", lambda: ops.qmul(Q, Q, 1.0, 0, 1.0, 256, 1.0, 0)),
        ("out_zero_point must lie in", lambda: ops.qadd(Q, Q, 1.0, 0, 1.0, 0, 1.0, 200, torch.int8)),
        (r"zero_points\[1\] must lie in", lambda: ops.qcat([Q, Q], [1.0, 1.0], [0, 300], 1, 1.0, 0)),
        # shapes, axes, counts
        ("axis must lie in .-4, 3. for x of shape .2, 6, 5, 7.", lambda: ops.quantize_per_channel(X, S6, Z6, 4)),
        ("axis must lie in", lambda: ops.dequantize_per_channel(Q, S6, Z6, -5)),
        ("axis must lie in", lambda: ops.quantize_per_channel(torch.tensor(1.0), S6, Z6, 0)),
        (r"scale must have shape \[5\], the size of x along axis 2", lambda: ops.quantize_per_channel(X, S6, Z6, 2)),
        ("zero_point must have shape", lambda: ops.quantize_per_channel(X, S6, Z6[:5], 1)),
        ("scale must have shape", lambda: ops.quantize_per_channel(X, S6[:, None], Z6, 1)),
        ("x must have at least 1 dimension", lambda: ops.quantize_per_token(torch.tensor(1.0))),
        ("scale must have the shape of x", lambda: ops.dequantize_per_token(Q, TOKEN[1][..., 0], TOKEN[2])),
        ("zero_point must have the shape of x", lambda: ops.dequantize_per_token(Q, TOKEN[1], TOKEN[2][:1])),
        ("block_size must be at least 1, not 0", lambda: ops.quantize_per_block(X, 0)),
        ("block_size must be at least 1, not -3", lambda: ops.dequantize_per_block(Q.view(torch.int8), S6, -3)),
        (r"scale must have shape \[14\]", lambda: ops.dequantize_per_block(Q.view(torch.int8), torch.rand(13), 32)),
        ("b must have the shape of a", lambda: ops.qadd(Q, Q[:1], 1.0, 0, 1.0, 0, 1.0, 0)),
        ("b must have the shape of a", lambda: ops.qmul(Q, Q[:, :, :1, :], 1.0, 0, 1.0, 0, 1.0, 0)),
        ("activation must be one of none, relu", lambda: ops.qadd(Q, Q, *ARITHMETIC, "swish")),
        ("xs must hold at least one tensor", lambda: ops.qcat([], [], [], 0, 1.0, 0)),
        ("scales must have 2 numbers", lambda: ops.qcat([Q, Q], [1.0], [0, 0], 1, 1.0, 0)),
        ("zero_points must have 2 numbers", lambda: ops.qcat([Q, Q], [1.0, 1.0], [0], 1, 1.0, 0)),
        ("dim must lie in", lambda: ops.qcat([Q, Q], [1.0, 1.0], [0, 0], 4, 1.0, 0)),
        (r"xs\[1\] must have the shape of xs\[0\]", lambda: ops.qcat([Q, Q[..., :3]], [1.0, 1.0], [0, 0], 1, 1.0, 0)),
        (r"xs\[1\] must have the shape of xs\[0\]", lambda: ops.qcat([Q, Q[0]], [1.0, 1.0], [0, 0], 1, 1.0, 0)),
        (r"table must have shape \[256\]", lambda: ops.qlookup(Q, torch.zeros(255, dtype=torch.uint8))),
    ],
)
def test_bad_arguments_are_named(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match=message):
        call()
