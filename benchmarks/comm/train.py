"""Time to accuracy over a slow link: scikit-learn's digits, a wide network, the same seed for every hook.

    python -m benchmarks.comm.train --world 2 --rate 100mbit          # in network namespaces: needs root
    torchrun --nproc-per-node 2 -m benchmarks.comm.train              # on the link there is

Every rank takes its share of each batch. The clock runs while the model trains and stops for evaluation; a hook is done
at the end of the first epoch with the target accuracy on the test images.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.comm import netns
from pykernels import comm

TEST = 360  # of 1797 images


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Images, fp32 [1797, 64] in -1 ... 1, shuffled, and their classes."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(found.data).float()[order] / 8 - 1, torch.from_numpy(found.target)[order]


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def train(hook: str, given: argparse.Namespace) -> tuple[float, int, float]:
    """Seconds of training, epochs, and the accuracy at the end."""
    rank, world = dist.get_rank(), dist.get_world_size()
    images, classes = digits()
    model = DistributedDataParallel(network(given.width), gradient_as_bucket_view=True)
    if hook != "ddp":
        comm.register(model, hook)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    order = torch.Generator().manual_seed(1)
    seconds, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < given.target and epoch < given.epochs:
        shuffled = TEST + torch.randperm(len(images) - TEST, generator=order)
        dist.barrier()
        begin = time.perf_counter()
        for batch in shuffled.split(given.batch)[:-1]:
            mine = batch[rank::world]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[mine]), classes[mine]).backward()
            optimizer.step()
        dist.barrier()
        seconds += time.perf_counter() - begin
        with torch.inference_mode():
            accuracy = float((model.module(images[:TEST]).argmax(1) == classes[:TEST]).float().mean())
        epoch += 1
    return seconds, epoch, accuracy


def worker(given: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if given.rate:
        netns.shape(given.rate)
    if dist.get_rank() == 0:
        size = sum(p.numel() for p in network(given.width).parameters())
        print(f"{given.rate or 'the link there is'}, {dist.get_world_size()} ranks, {size / 1e6:.2f} M parameters")
        print(f"{'hook':10}{'seconds':>9}{'vs ddp':>8}{'epochs':>8}{'accuracy':>10}")
    first = None
    for hook in given.hooks.split(","):
        seconds, epochs, accuracy = train(hook, given)
        if hook == "ddp":
            first = seconds
        if dist.get_rank() == 0:
            ratio = "-" if first is None else f"{first / seconds:.2f}x"
            reached = "" if accuracy >= given.target else f"  below the target, {given.target}"
            print(f"{hook:10}{seconds:9.1f}{ratio:>8}{epochs:8}{accuracy:10.4f}{reached}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, help="make network namespaces for so many ranks")
    parser.add_argument("--rate", help="of the links, like 100mbit; as they are without")
    parser.add_argument("--hooks", default="ddp,bf16,int8,int4", help='names of pykernels.comm.HOOKS; "ddp" is none')
    parser.add_argument("--target", type=float, default=0.97, help="accuracy on the test images")
    parser.add_argument("--epochs", type=int, default=30, help="at most")
    parser.add_argument("--batch", type=int, default=64, help="of all ranks together")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    given = parser.parse_args()
    if given.rate not in (None, "unshaped"):
        netns.bits_per_second(given.rate)
    if "RANK" in os.environ:
        worker(given)
        return
    netns.check_launch(parser, given.world)
    sys.exit(netns.run([sys.executable, "-m", "benchmarks.comm.train", *sys.argv[1:]], given.world, given.timeout))


if __name__ == "__main__":
    main()
