"""A small language model, trained for seconds, over two ranks with compressed sums: what it loses."""

from __future__ import annotations

import math

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from pykernels.comm import tensor_parallel

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 32, 64, 128, 2, 4


class Layer(nn.Module):
    """A transformer's, with its heads side by side; what is split along them is local."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        heads = [
            layer(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        attended = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.Sequential(*(Layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.words(words) + self.places.weight[: words.shape[1]])))


def text(seed: int, rows: int) -> torch.Tensor:
    """Of a language whose next word follows from the last two, mostly: [rows, context + 1]."""
    rules = torch.Generator().manual_seed(0)
    likely = torch.randint(0, VOCABULARY, (VOCABULARY, 4), generator=rules)
    chance = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, VOCABULARY, (rows,), generator=chance) for _ in range(2)]
    for _ in range(CONTEXT - 1):
        choice = (torch.randint(0, 3, (rows,), generator=chance) + words[-2]) % 4
        words.append(likely[words[-1], choice])
    return torch.stack(words, 1)


def loss(model: nn.Module, words: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())


def trained() -> nn.Module:
    torch.manual_seed(0)
    model = Language()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(100):
        optimizer.zero_grad()
        loss(model, text(step + 1, 32)).backward()
        optimizer.step()
    return model.eval()


def perplexities(rank: int) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (2,))
    state, held_out = trained().state_dict(), text(10**6, 64)
    plan = {f"layers.{n}.{name}": "colwise" for n in range(LAYERS) for name in ("query", "key", "value", "up")}
    plan |= {f"layers.{n}.{name}": "rowwise" for n in range(LAYERS) for name in ("out", "down")}
    found = {}
    with torch.no_grad():
        for codec in ("fp32", "int8", "int4", "int2"):
            model = Language().eval()
            model.load_state_dict(state)
            parallelize_module(model, mesh, tensor_parallel(plan, codec, least=0))
            found[codec] = math.exp(float(loss(model, held_out)))
    return found


@pytest.mark.slow
def test_int8_sums_cost_a_language_model_half_a_percent_of_perplexity_at_most() -> None:
    one, other = run_ranks(2, perplexities)
    assert one == other  # the ranks have the same bits
    assert one["fp32"] < 8  # of 32 words: it has learnt something, which can be lost
    assert one["int8"] < 1.005 * one["fp32"]
    assert one["int4"] > one["int8"]  # the codec was there
    assert one["int2"] > 1.005 * one["fp32"]  # the bound is one that a codec can miss
