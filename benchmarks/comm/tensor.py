"""Tensor-parallel layers by codec: prefill (many tokens) and decode (one), every codec in the same processes.

    python -m benchmarks.comm.tensor --world 2 --rates 100mbit,1gbit     # in network namespaces: needs root

A stack of residual blocks, each a norm, a layer split by columns, GELU, and one split by rows, whose sum is exchanged:
one all-reduce of [tokens, width] a block. Layers are narrow inside (`--inner`), so that the wire binds and not the two
cores that all ranks share. Rounds go through the codecs in turn; a time is the median over the rounds of the slowest
rank's. Decode exchanges fewer elements than are compressed, so there fp32 goes whatever the codec is. To show that it
is not slower the noise must be smaller than the difference that counts: many short rounds, and of each the ratio to
fp32's time in the same round; printed are their median and its standard error.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from benchmarks.comm import netns
from pykernels.comm import tensor_parallel

CODECS = ("fp32", "bf16", "int8", "int4")  # the first is what the others are compared with
CALLS = 4  # of a decode, a round


class Block(nn.Module):
    """x + down(gelu(up(norm(x)))), x [tokens, width]."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def stack(blocks: int, width: int, inner: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(width, inner) for _ in range(blocks))).eval()


def measure(models: dict[str, nn.Module], x: torch.Tensor, rounds: int, calls: int) -> torch.Tensor:
    """Seconds of a call on the slowest rank, [rounds, models]."""
    times = torch.zeros(rounds, len(models), dtype=torch.float64)
    for model in models.values():
        model(x)
    order = list(enumerate(models.values()))
    for times_of_round in times:
        order.append(order.pop(0))  # none is always the first behind a pause
        for place, model in order:
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(calls):
                model(x)
            times_of_round[place] = (time.perf_counter() - begin) / calls
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return times


def compared(times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Times over those of the first model in the same round: the median, and its standard error (of normal noise)."""
    ratios = times / times[:, :1]
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=times.dtype), 0)
    return middle, 1.253 * (high - low) / 1.349 / len(times) ** 0.5


def worker(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=given.timeout))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {
        f"{n}.{name}": style for n in range(given.blocks) for name, style in (("up", "colwise"), ("down", "rowwise"))
    }
    models: dict[str, nn.Module] = {
        codec: parallelize_module(stack(given.blocks, given.width, given.inner), mesh, tensor_parallel(plan, codec))
        for codec in CODECS
    }
    true = stack(given.blocks, given.width, given.inner)
    first = dist.get_rank() == 0
    for rate in given.rates:
        if rate != "asis":
            dist.barrier()
            netns.shape(rate)
            dist.barrier()
        for name, tokens, rounds, calls in (
            ("prefill", given.tokens, given.rounds, 1),
            ("decode", 1, -(-given.decoded // CALLS), CALLS),
        ):
            x = torch.randn(tokens, given.width, generator=torch.Generator().manual_seed(1))
            times = measure(models, x, rounds, calls)
            ratio, deviation = compared(times)
            expected = true(x)
            for place, (codec, model) in enumerate(models.items()):
                error = float((model(x) - expected).norm() / expected.norm())
                if first:
                    print(
                        f"{rate}, {name} of {tokens} tokens, {codec}: {1e3 * float(times[:, place].median()):.2f} ms, "
                        f"{float(ratio[place]):.3f} of fp32's time (+- {float(deviation[place]):.3f}), "
                        f"{1 / float(ratio[place]):.2f} times its speed, error {error:.4f}",
                        flush=True,
                    )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, help="make network namespaces for so many ranks")
    parser.add_argument("--rates", help="of the links: 100mbit,1gbit,10gbit,unshaped; as they are without")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256, help="of a prefill")
    parser.add_argument("--rounds", type=int, default=9, help="of a prefill")
    parser.add_argument("--decoded", type=int, default=800, help="tokens that each codec decodes")
    parser.add_argument("--threads", type=int, default=1, help="a rank")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds, of all")
    given = parser.parse_args()
    given.rates = netns.rates(given.rates)
    if "RANK" in os.environ:
        worker(given)
        return
    netns.check_launch(parser, given.world)
    command = [sys.executable, "-m", "benchmarks.comm.tensor", *sys.argv[1:]]
    sys.exit(netns.run(command, given.world, given.timeout))


if __name__ == "__main__":
    main()
