"""Would an inverted residual gain by going through all three layers in bands of rows, its middle kept in L2?

Each block of MobileNetV2 is a network of its own, whole and as one band of rows with the rows around it that the 3x3
layer needs. The table gives the microseconds of the kernels alone, the quickest of many rounds, the networks in turn:
of the whole, and of one band times the number of bands. A band of a stride of 1 computes its border rows twice.

    python -m benchmarks.bands [--threads 1] [--rounds 100]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import pykernels as pk
from pykernels.network.plan.timing import step_seconds

BLOCKS = [  # channels in, between and out, stride, height and width
    (16, 96, 24, 2, 112),
    (24, 144, 24, 1, 56),
    (24, 144, 32, 2, 56),
    (32, 192, 32, 1, 28),
]
ROWS = (4, 7, 14, 28)  # of output
TURNS = 5


def block(before: int, between: int, after: int, stride: int) -> nn.Module:
    """Expand, depthwise, project: [N, before, H, W] -> [N, after, H / stride, W / stride]."""
    middle = nn.Conv2d(between, between, 3, stride, 1, groups=between)
    layers = nn.Conv2d(before, between, 1), nn.ReLU6(), middle, nn.ReLU6(), nn.Conv2d(between, after, 1)
    return nn.Sequential(*layers).eval()


def optimized(model: nn.Module, x: torch.Tensor, precision: str) -> pk.Optimized:
    return pk.optimize(model, (x,), precision, [(x,)] if precision == "int8" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{'block':24}{'':6}{'whole':>8}" + "".join(f"{f'{rows} rows':>10}" for rows in ROWS) + "   (us)")
    for *channels, stride, size in BLOCKS:
        model = block(*channels, stride)
        for precision in ("fp32", "bf16", "int8"):
            timed = {}
            for rows in (size // stride, *ROWS):
                height = size if rows == size // stride else rows * stride + 2
                if (size // stride) % rows == 0:
                    x = torch.randn(1, channels[0], height, size).to(memory_format=torch.channels_last)
                    timed[rows] = optimized(model, x, precision), x, size // stride // rows
            best = dict.fromkeys(timed, float("inf"))
            for _ in range(TURNS):
                for rows, (fast, x, count) in timed.items():
                    seconds = sum(step_seconds(fast.planned, [x], args.rounds // TURNS).values())
                    best[rows] = min(best[rows], 1e6 * seconds * count)
            cells = [f"{best[rows]:10.0f}" if rows in best else f"{'':>10}" for rows in ROWS]
            name = "-".join(map(str, channels)) + f" /{stride} {size}x{size}"
            print(f"{name:24}{precision:6}{best[size // stride]:8.0f}{''.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
