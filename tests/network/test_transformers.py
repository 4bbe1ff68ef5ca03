"""Transformers: attention is a step of a plan, with whatever mask; what it cannot be is said."""

from __future__ import annotations

import functools
import pathlib

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

import pykernels as pk

PRECISIONS = ("fp32", "bf16", "fp16", "int8")
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.005, "int8": 0.1}  # relative, in the norm
WIDTH, HEADS, TOKENS = 48, 4, 13


class Block(nn.Module):
    """Norm, attention, norm, two linear layers; keys and values have `share` heads."""

    def __init__(self, share: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.share, self.causal = share, causal
        depth = WIDTH // HEADS
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.both = nn.Linear(WIDTH, 2 * share * depth)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        n, tokens, _ = x.shape
        y = self.norm1(x)
        q = self.query(y).view(n, tokens, HEADS, -1).transpose(1, 2)
        k, v = self.both(y).view(n, tokens, 2, self.share, -1).permute(2, 0, 3, 1, 4).unbind(0)
        grouped = self.share != HEADS
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).reshape(n, tokens, WIDTH))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Two blocks that see the same tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        mask = seen[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        for block in self.blocks:
            x = block(x, mask)
        return x


def tokens(n: int = 2, count: int = TOKENS) -> torch.Tensor:
    return torch.randn(n, count, WIDTH)


@functools.cache
def network(name: str, precision: str) -> tuple[nn.Module, pk.Optimized, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    model: nn.Module = {"plain": Block, "grouped": lambda: Block(2), "causal": lambda: Block(causal=True)}.get(
        name, Encoder
    )()
    inputs: tuple[torch.Tensor, ...] = (tokens(),)
    if name == "masked":
        inputs += (torch.arange(TOKENS) < torch.tensor([[TOKENS], [5]]),)
    calibration = [inputs] if precision == "int8" else None
    return model.eval(), pk.optimize(model, inputs, precision, calibration), inputs


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["plain", "grouped", "causal", "masked"])
@torch.no_grad()
def test_plan_ops_and_model_agree(name: str, precision: str, isa: str) -> None:
    model, fast, inputs = network(name, precision)
    got, expected = fast(*inputs), model(*inputs)
    assert (got - expected).norm() <= TOLERANCE[precision] * expected.norm()
    assert fast.planned is not None
    for batch in (inputs, tuple(x[:1] for x in inputs)):
        for planned, by_ops in zip(fast.planned.program(*batch), fast.program(*batch), strict=True):
            assert torch.equal(planned, by_ops)


@pytest.mark.parametrize("name", ["plain", "grouped", "causal", "masked"])
def test_attention_is_part_of_one_plan(name: str) -> None:
    for precision in PRECISIONS:
        _, fast, _ = network(name, precision)
        report = fast.report()
        assert [entry.op for entry in report.fused].count("attention") == (2 if name == "masked" else 1)
        assert len(fast.planned.labels) == 1
        assert "scaled_dot_product_attention" not in {entry.op for entry in report.left}


class PostNorm(nn.Module):
    """As in BERT, norms stand behind the sums: what they yield is read in 8 bits, and added as a float."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(2):
            x = self.norm(x + self.down(F.gelu(self.up(x))))
        return x


def steps(fast: pk.Optimized) -> list[str]:
    """What the kernel calls of the plan stand for, without the modules, and what runs as another call than its name."""
    rows = [(row.step.rpartition(": ")[2], row.kernel) for row in fast.plan().rows]
    return [step if kernel in ("product", step) else f"{step}: {kernel}" for step, kernel in rows]


def test_norms_of_int8_blocks_write_8_bits_where_nobody_reads_floats() -> None:
    attention = ["scaled_dot_product_attention: attention", "quantize"]
    mlp = ["linear + gelu + quantize", "linear", "add"]
    norm = "layer_norm + quantize: layer_norm"
    _, pre, _ = network("plain", "int8")
    assert steps(pre) == [norm, "linear", "linear", *attention, "linear", "add", norm, *mlp]
    torch.manual_seed(0)
    x = tokens()
    post = pk.optimize(PostNorm().eval(), (x,), "int8", [(x,)])
    assert steps(post) == ["quantize", *mlp, "layer_norm", "quantize", *mlp, "layer_norm"]
    assert torch.equal(post(x), post.program(x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_int8_blocks_of_16_bit_floats_round_where_the_ops_do(dtype: torch.dtype, isa: str) -> None:
    x = tokens().to(dtype)
    fast = pk.optimize(Block().eval().to(dtype), (x,), "int8", [(x,)])
    assert steps(fast).count("layer_norm + quantize: layer_norm") == 2
    assert torch.equal(fast(x), fast.program(x)[0])


def test_tokens_and_images_may_vary() -> None:
    model = Block().eval()
    shapes = {"x": {0: Dim("n", max=8), 1: Dim("t", max=64)}}
    fast = pk.optimize(model, (tokens(),), dynamic_shapes=shapes)
    for n, count in ((1, 1), (3, 40), (8, 64)):
        x = tokens(n, count)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


def test_multihead_attention_of_torch() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Attends().eval(), tokens()
    fast = pk.optimize(model, (x,))
    assert "attention" in {entry.op for entry in fast.report().fused}
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("without a dimension for images", lambda q: F.scaled_dot_product_attention(q[0], q[0], q[0])),
        ("spread over one another", lambda q: F.scaled_dot_product_attention(q, q[:, :1], q[:, :1])),
        ("mask of attention", lambda q: F.scaled_dot_product_attention(q, q, q, torch.zeros(q.shape[2], 1))),
    ],
)
def test_what_stays_torchs_says_why(reason: str, call) -> None:
    class Calls(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(x.relu())

    x = torch.randn(2, 3, 5, 8)
    fast = pk.optimize(Calls(), (x,))
    left = [entry for entry in fast.report().left if entry.op == "scaled_dot_product_attention"]
    assert len(left) == 1 and reason in left[0].reason
    torch.testing.assert_close(fast(x), call(x.relu()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_masks_of_two_conditions_are_saved(tmp_path: pathlib.Path) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            places = torch.arange(x.shape[1])
            return self.block(x, (places[:, None] >= places) & seen[:, None, None, :])

    inputs = tokens(), torch.rand(2, TOKENS) < 0.8
    fast = pk.optimize(Decoder().eval(), inputs)
    fast.save(tmp_path / "net.pk")
    assert torch.equal(pk.load(tmp_path / "net.pk")(*inputs), fast(*inputs))


@pytest.mark.parametrize("kind", ["truth", "numbers"])
@torch.no_grad()
def test_a_mask_that_is_a_buffer_is_a_constant_of_the_plan(kind: str, tmp_path: pathlib.Path) -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()
            seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
            self.register_buffer("mask", seen if kind == "truth" else torch.zeros(seen.shape).masked_fill(~seen, -9e9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x, self.mask)

    model, x = Decoder().eval(), tokens()
    fast = pk.optimize(model, (x,))
    assert fast.planned is not None and len(fast.planned.labels) == 1 and fast.plan().left == []
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    fast.save(tmp_path / "net.pk")
    assert torch.equal(pk.load(tmp_path / "net.pk")(x), fast(x))
