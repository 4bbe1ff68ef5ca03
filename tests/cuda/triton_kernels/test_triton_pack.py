"""Packing for CUDA devices, which is torch operations: what comes out again, and what is refused."""

from __future__ import annotations

import pytest
import torch

from pykernels.cuda.triton import pack
from pykernels.ops import packed as packing

ops = torch.ops.pykernels
DTYPES = [torch.int8, torch.float32, torch.bfloat16, torch.float16]
# output channels, input channels of a group, kernel, groups
SHAPES = {
    "linear": (33, 50, 1, 1, 1),
    "3x3": (20, 20, 3, 3, 1),
    "runs": (20, 3, 7, 7, 1),
    "runs of one channel": (5, 1, 1, 9, 1),
    "grouped": (12, 17, 2, 3, 3),
    "depthwise": (21, 1, 3, 3, 21),
    "depthwise with multiplier": (12, 1, 3, 1, 6),
}


def made(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """weight, weight_scale, bias, groups"""
    *shape, groups = SHAPES[name]
    weight = torch.randn(shape) if dtype.is_floating_point else torch.randint(-128, 128, shape)
    return weight.to(dtype), torch.rand(shape[0]) + 0.1, torch.randn(shape[0]), groups


def packed_by(module, name: str, dtype: torch.dtype, with_bias: bool = True) -> torch.Tensor:
    weight, scale, bias, groups = made(name, dtype)
    b = bias if with_bias else None
    if name == "linear":
        weight = weight[:, :, 0, 0]
        return module.linear_pack(weight, b) if dtype != torch.int8 else module.int8_linear_pack(weight, scale, b)
    if dtype != torch.int8:
        return module.conv2d_pack(weight, b, groups)
    return module.qconv2d_pack(weight, scale, b, groups)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [*(("cuda", d) for d in DTYPES), *(("cpu", d) for d in DTYPES[:3])], ids=str
)
def test_unpacking_gives_back_what_was_packed(name: str, kind: str, dtype: torch.dtype) -> None:
    for with_bias in (True, False):
        torch.manual_seed(1)
        packed = packed_by(pack if kind == "cuda" else ops, name, dtype, with_bias)
        torch.manual_seed(1)
        weight, scale, bias, groups = made(name, dtype)
        w, s, b, g = packing.unpack(packed)
        assert torch.equal(w, weight) and w.dtype == dtype and g == groups
        assert s is None if dtype.is_floating_point else torch.equal(s, scale)
        assert torch.equal(b, bias) if with_bias else b is None
        assert packed.numel() % 64 == (16 if kind == "cuda" else 0)


@pytest.mark.parametrize("name", SHAPES)
def test_the_layout_is_as_documented(name: str) -> None:
    weight, scale, bias, groups = made(name, torch.int8)
    packed = pack.qconv2d_pack(weight, scale, bias, groups)
    layout, has_bias = packing.read(packed)
    assert has_bias and layout.cuda and layout.weights_at == 128
    o, k, kh, kw = weight.shape
    raw = packed[128 : 128 + layout.weight_bytes].view(torch.int8)
    row = {"runs": 32, "runs of one channel": 16, "depthwise": 4 * 32}.get(name) or -(-k // 16) * 16
    rows = kh if layout.depthwise else o * kh if layout.runs else o * kh * kw
    if layout.runs:
        expected = torch.zeros(o, kh, row, dtype=torch.int8)
        expected[..., : kw * k] = weight.permute(0, 2, 3, 1).reshape(o, kh, kw * k)
    elif layout.depthwise:
        expected = torch.zeros(kh, row // 4, 4, dtype=torch.int8)
        expected[:, :o, :kw] = weight[:, 0].transpose(0, 1)
    else:
        expected = torch.zeros(o, kh * kw, row, dtype=torch.int8)
        expected[..., :k] = weight.permute(0, 2, 3, 1).reshape(o, kh * kw, k)
    assert torch.equal(raw[: rows * row], expected.flatten()) and not raw[rows * row :].any()
    sums = packed[layout.sums_at : layout.sums_at + 4 * o].view(torch.int32)
    assert torch.equal(sums, weight.sum((1, 2, 3), dtype=torch.int32))
    assert layout.sums_at % 64 == layout.scales_at % 64 == layout.biases_at % 64 == 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_fake_knows_the_size_on_either_device(name: str, dtype: torch.dtype) -> None:
    weight, _, _, groups = made(name, dtype)
    with torch._subclasses.FakeTensorMode():
        size = packing.packed_bytes(torch.empty(weight.shape, dtype=dtype, device="cuda"), groups)
    assert size == packed_by(pack, name, dtype).numel()
    assert packing.packed_bytes(weight, groups) == packed_by(ops, name, dtype).numel()


@pytest.mark.parametrize(
    ("shape", "run"),  # input channels, width; what a kernel row takes, or None where each tap is padded to 16
    [((3, 7), 32), ((3, 3), 16), ((1, 2), 16), ((5, 3), 16), ((8, 3), 32), ((11, 3), None), ((9, 11), 128),
     ((15, 15), None), ((3, 1), None), ((16, 3), None)],
)  # fmt: skip
def test_few_channels_are_packed_as_runs_where_these_are_shorter(shape: tuple[int, int], run: int | None) -> None:
    k, kw = shape
    layout = packing.Layout(True, torch.int8, 1, 8, k, 3, kw)
    assert layout.row == (run or 16) and layout.rows == (3 if run else 3 * kw)
    assert layout.weight_bytes == 8 * layout.rows * layout.row <= 8 * 3 * kw * 16
    others = [packing.Layout(True, torch.int8, 2, 8, k, 3, kw), packing.Layout(True, torch.float32, 1, 8, k, 3, kw)]
    assert not any(at.runs for at in others)


def test_weights_of_other_shapes_have_other_sizes() -> None:
    """Of those that would be as many bytes, since K is padded or the shape turned around."""
    shapes = [(8, k, 1, 1) for k in range(33, 49)], [(8, 16, 1, 3), (8, 16, 3, 1)], [(4, 32, 1, 1), (8, 16, 1, 1)]
    for alike in shapes:
        layouts = [packing.Layout(True, torch.int8, 1, *shape) for shape in alike]
        assert len({at.size for at in layouts}) == len(alike) and all(at.size % 64 == 16 for at in layouts)


def test_shape_functions_follow_the_device() -> None:
    """What torch.compile sees of CUDA tensors, packing and all."""
    weight, scale, bias, groups = made("grouped", torch.int8)
    with torch._subclasses.FakeTensorMode():
        w, s, b = (torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in (weight, scale, bias))
        packed = ops.qconv2d_pack(w, s, b, groups)
        x = torch.empty(2, 51, 9, 8, dtype=torch.uint8, device="cuda")
        y = ops.qconv2d(x, packed, 12, [2, 3], [1, 1], [0, 0, 0, 0], [1, 1], groups, 0.1, 0, 0.1, 0, torch.uint8)
        assert y.device.type == "cuda" and y.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == (2, 12, 8, 6) and packed.numel() % 64 == 16
        q = ops.int8_linear_pack(w.view(12, -1), s)
        assert ops.int8_linear(torch.empty(3, 102, device="cuda"), q, 12).device.type == "cuda"


def test_a_cpu_packing_repacks_to_the_same_bytes() -> None:
    """Through what a CUDA device would hold."""
    for name in SHAPES:
        torch.manual_seed(2)
        cpu = packed_by(ops, name, torch.int8)
        torch.manual_seed(2)
        cuda = packed_by(pack, name, torch.int8)
        assert torch.equal(packing.repack(cuda, "cpu"), cpu)
        assert packing.repack(cpu, "cpu") is cpu


class TestRefused:
    def test_by_the_cpu_s_ops(self) -> None:
        packed = pack.linear_pack(torch.randn(4, 8))
        with pytest.raises(RuntimeError, match="packed on a CUDA device: pack the weights on the CPU"):
            ops.linear(torch.randn(2, 8), packed, 4)

    def test_by_size(self) -> None:
        x, layout = torch.randn(2, 8), packing.Layout(True, torch.float32, 1, 4, 8)
        packed = pack.linear_pack(torch.randn(4, 8))
        parts = pack.checked_packed("linear", packed, x, layout)
        assert parts.weight.numel() == 32 and parts.biases.numel() == 4
        with pytest.raises(RuntimeError, match="it was packed on the CPU, or is truncated"):
            pack.checked_packed("linear", ops.linear_pack(torch.randn(4, 8)), x, layout)
        with pytest.raises(RuntimeError, match=r"it has \d+ bytes, but float32 weights of 1 groups of 4 output and 8"):
            pack.checked_packed("linear", pack.linear_pack(torch.randn(4, 24)), x, layout)
        with pytest.raises(RuntimeError, match="contiguous 1-D uint8"):
            pack.checked_packed("linear", packed.view(torch.int8), x, layout)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda p: p[:-1], "truncated"),
            (lambda p: p[:60], "1-D uint8"),
            (lambda p: torch.zeros_like(p), "not made by"),
            (lambda p: torch.cat([p[:20], p[20:21] + 1, p[21:]]), "header is damaged"),
        ],
    )
    def test_by_unpack(self, damage, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            packing.unpack(damage(pack.linear_pack(torch.randn(4, 8))))


def test_bad_arguments_are_named() -> None:
    weight, scale, bias, _ = made("3x3", torch.int8)
    with pytest.raises(RuntimeError, match="weight must be int8, not float32"):
        pack.qconv2d_pack(weight.float(), scale)
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16, not int8"):
        pack.conv2d_pack(weight)
    with pytest.raises(RuntimeError, match="weight must have 4 dimensions"):
        pack.qconv2d_pack(weight[0], scale)
    with pytest.raises(RuntimeError, match="weight must not be empty"):
        pack.qconv2d_pack(weight[:, :0], scale)
    with pytest.raises(RuntimeError, match="groups is 3, which does not divide the 20"):
        pack.qconv2d_pack(weight, scale, None, 3)
    with pytest.raises(RuntimeError, match=r"weight_scale must have shape \[20\]"):
        pack.qconv2d_pack(weight, scale[:3])
    with pytest.raises(RuntimeError, match="weight_scale must be a positive number that fp32 holds, not -1"):
        pack.qconv2d_pack(weight, scale.index_fill(0, torch.tensor([7]), -1.0))
    with pytest.raises(RuntimeError, match=r"bias must have shape \[20\]"):
        pack.qconv2d_pack(weight, scale, bias[:3])
    with pytest.raises(RuntimeError, match="s32 cannot hold"):
        pack.int8_linear_pack(torch.ones(1, 70_000, dtype=torch.int8), torch.ones(1))
