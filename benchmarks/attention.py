"""Scaled dot product attention, our step of a plan beside torch's call: heads as a linear layer leaves them.

The quickest of many rounds, in turn.

    python -m benchmarks.attention [--threads 1] [--rounds 100]
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from pykernels.network.plan.timing import step_seconds

SHAPES = [(1, 12, 197, 64), (1, 12, 128, 64), (8, 12, 128, 64), (1, 12, 512, 64), (1, 3, 49, 32)]
"""Images, heads, tokens, elements of a head: ViT-B/16, BERT-base at three sizes, a window of Swin."""


TURNS = 5


class Attention(nn.Module):
    """[N, T, 3 x H x D] -> [N, H, T, D]."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = x.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'':18}{'ours ms':>9}{'torch ms':>10}{'GFLOP/s':>9}{'ratio':>7}")
    for n, heads, tokens, depth in SHAPES:
        x = torch.randn(n, tokens, 3 * heads * depth)
        fast = pk.optimize(Attention(heads).eval(), (x,))
        q, k, v = x.unflatten(2, (3, heads, depth)).permute(2, 0, 3, 1, 4).unbind(0)
        best = [float("inf")] * 2
        for _ in range(TURNS):
            steps = step_seconds(fast.planned, [x], args.rounds // TURNS)
            best[0] = min(best[0], next(t for label, t in steps.items() if "attention" in label))
            for _ in range(args.rounds // TURNS):
                start = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v)
                best[1] = min(best[1], time.perf_counter() - start)
        rate = 4 * n * heads * tokens * tokens * depth / best[0] / 1e9
        name = f"{n}x{heads}x{tokens}x{depth}"
        print(f"{name:18}{1e3 * best[0]:9.3f}{1e3 * best[1]:10.3f}{rate:9.0f}{best[1] / best[0]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
