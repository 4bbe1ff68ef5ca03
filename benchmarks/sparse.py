"""int8 layers whose weights have blocks of zeros, 4 inputs x 16 outputs: the time of the kernel beside the dense one's.

Each layer is a network of its own, in turn with the others: the quickest of many rounds of the product alone. "plain"
has no zeros; a column is the share of blocks that are zero, the figure how much faster that is than plain. The last
column is the share at which nothing is gained, between the measured ones.

    python -m benchmarks.sparse [--threads 1] [--rounds 200]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import pykernels as pk
from pykernels.network.plan.timing import step_seconds

LAYERS = {  # rows or pixels, K, outputs
    "1x1 256-64 56x56": (1, 256, 64, 56),
    "1x1 256-256 14x14": (1, 256, 256, 14),
    "1x1 1024-256 14x14": (1, 1024, 256, 14),
    "3x3 128-128 28x28": (3, 128, 128, 28),
    "3x3 256-256 14x14": (3, 256, 256, 14),
    "1x1 512-2048 7x7": (1, 512, 2048, 7),
}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.75, 0.9)
TURNS = 5


def sparse(weight: torch.Tensor, share: float) -> torch.Tensor:
    """The weight [O, C, kh, kw] with that share of its blocks zero, chosen at random."""
    out, channels, *kernel = weight.shape
    keep = torch.rand(out // 16, channels // 4, *kernel)
    keep = keep >= keep.flatten().kthvalue(max(1, round(share * keep.numel())))[0] if share else keep >= 0
    return weight * keep.repeat_interleave(16, 0).repeat_interleave(4, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'layer':20}{'plain us':>10}" + "".join(f"{share:>8.0%}" for share in SHARES[1:]))
    for name, (kernel, before, after, size) in LAYERS.items():
        networks = []
        x = torch.randn(1, before, size, size).to(memory_format=torch.channels_last)
        for share in SHARES:
            torch.manual_seed(0)
            layer = nn.Conv2d(before, after, kernel, 1, kernel // 2)
            with torch.no_grad():
                layer.weight.copy_(sparse(layer.weight, share))
            networks.append(pk.optimize(nn.Sequential(layer, nn.ReLU()).eval(), (x,), "int8", [(x,)]))
        best = [float("inf")] * len(SHARES)
        for _ in range(TURNS):
            for i, fast in enumerate(networks):
                steps = step_seconds(fast.planned, [x], args.rounds // TURNS)
                best[i] = min(best[i], max(steps.values()))
        print(f"{name:20}{1e6 * best[0]:10.1f}" + "".join(f"{best[0] / t:8.2f}" for t in best[1:]), flush=True)


if __name__ == "__main__":
    main()
