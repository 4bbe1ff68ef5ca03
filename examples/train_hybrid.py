"""A pipeline and data parallelism at once, with codecs on both wires.

    torchrun --nproc-per-node 4 examples/train_hybrid.py --pp 2 --dp 2 --hook int8 --stage-codec int8

A residual network of eight layers learns Fashion-MNIST (Debian's ``dataset-fashion-mnist``), or scikit-learn's digits
where that is not installed, on the CPU over gloo. It is cut into `--pp` stages, which work on the chunks of a batch in
turn (1F1B); `--dp` replicas of each stage see other images and average their gradients. Rank r is stage r % pp of
replica r // pp. `--stage-codec` says how activations and their gradients travel between stages, `--hook` how the
gradients of parameters do between replicas.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from typing import Any

import torch
import torch.distributed as dist
from images import Images, between, cut, load, network
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from pykernels import comm
from pykernels.parallel import STAGE_CODECS

MOMENTUM, WEIGHT_DECAY, WARM_UP = 0.9, 5e-4, 0.15


class Trainer:
    """This rank's stage of its replica, and what trains it."""

    def __init__(self, options: argparse.Namespace, images: Images) -> None:
        self.options, self.images = options, images
        mesh = init_device_mesh("cpu", (options.dp, options.pp), mesh_dim_names=("dp", "pp"))
        self.replica, self.index = mesh.get_local_rank("dp"), mesh.get_local_rank("pp")
        torch.manual_seed(options.seed)  # the same weights everywhere
        parts = cut(network(images, options.width), options.pp)
        shapes = between(parts, torch.zeros(options.batch // options.chunks, *images.train.shape[1:]))
        part = parts[self.index]
        # Nothing but gradients goes between replicas while they train: one that broadcast its running statistics
        # would wait for the other amid a pipeline. They are averaged before they are used.
        self.model = DistributedDataParallel(part, process_group=mesh["dp"].get_group(), broadcast_buffers=False)
        self.hook = None if options.hook == "none" else comm.register(self.model, options.hook)
        self.group = mesh["dp"].get_group()
        self.stage = PipelineStage(
            self.model,
            self.index,
            options.pp,
            torch.device("cpu"),
            input_args=shapes[self.index],
            output_args=shapes[self.index + 1],
            group=mesh["pp"].get_group(),
        )
        self.wire = comm.register(self.stage, forward=options.stage_codec, backward=options.stage_codec)
        self.schedule = Schedule1F1B(self.stage, options.chunks, loss_fn=nn.functional.cross_entropy)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images.train) // (self.options.batch * self.options.dp)

    def run(self, images: torch.Tensor, labels: torch.Tensor, how: str) -> tuple[torch.Tensor | None, list[Any]]:
        """A batch through the pipeline; answers and losses of the chunks, where the last stage is."""
        losses: list[torch.Tensor] = []
        given = (images,) if self.stage.is_first else ()
        wanted = {"target": labels, "losses": losses} if self.stage.is_last else {}
        return getattr(self.schedule, how)(*given, **wanted), losses

    def epoch(self, number: int) -> float:
        """Train on all images once; the mean loss, on the last stage."""
        options, total = self.options, 0.0
        self.model.train()
        # All stages of a replica draw the same images, and shift them alike.
        order = torch.randperm(len(self.images.train), generator=torch.Generator().manual_seed(number))
        torch.manual_seed(1 + number * options.dp + self.replica)
        for step in range(self.steps_per_epoch):
            done = (number + step / self.steps_per_epoch) / options.epochs
            for group in self.optimizer.param_groups:  # up in a line, then down along a cosine
                group["lr"] = options.lr * min(
                    (done + 0.01) / (WARM_UP + 0.01),
                    0.5 + 0.5 * math.cos(math.pi * max(0.0, done - WARM_UP) / (1 - WARM_UP)),
                )
            begin = (step * options.dp + self.replica) * options.batch
            mine = order[begin : begin + options.batch]
            self.optimizer.zero_grad()
            _, losses = self.run(self.images.augment(self.images.train[mine]), self.images.train_labels[mine], "step")
            self.optimizer.step()
            total += sum(float(loss.detach()) for loss in losses) / options.chunks
        return total / self.steps_per_epoch

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of the test images that get their label, in whole batches; the same on all ranks."""
        for buffer in self.model.module.buffers():  # running statistics of the replicas
            if buffer.is_floating_point():
                dist.all_reduce(buffer, group=self.group)
                buffer /= self.options.dp
        self.model.eval()
        found = torch.zeros(2)  # right ones, and all
        size = self.options.batch
        for begin in range(0, len(self.images.test) - size + 1, size):
            labels = self.images.test_labels[begin : begin + size]
            answers, _ = self.run(self.images.test[begin : begin + size], labels, "eval")
            if answers is not None:
                found += torch.tensor([float((answers.argmax(1) == labels).sum()), len(labels)])
        dist.all_reduce(found)
        return float(found[0] / found[1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", type=int, default=2, help="stages of the pipeline (2)")
    parser.add_argument("--dp", type=int, default=2, help="replicas of each stage (2)")
    parser.add_argument("--hook", default="int8", choices=["none", *comm.HOOKS], help="between replicas (int8)")
    parser.add_argument("--stage-codec", default="int8", choices=STAGE_CODECS, help="between stages (int8)")
    parser.add_argument("--data", default="auto", choices=["auto", "fashion-mnist", "digits"])
    parser.add_argument("--epochs", type=int, help="as many as the images need: Fashion-MNIST 1, digits 15")
    parser.add_argument("--batch", type=int, default=64, help="images of a replica a step (64)")
    parser.add_argument("--chunks", type=int, default=4, help="that a batch is cut into (4)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage (32)")
    parser.add_argument("--lr", type=float, default=0.1, help="the highest learning rate (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("pp", "dp", "epochs", "batch", "chunks", "width"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1")
    if options.batch % options.chunks:
        parser.error(f"--chunks: {options.chunks} does not divide --batch {options.batch}")
    if options.chunks < options.pp:
        parser.error(f"--chunks: 1F1B needs at least as many as --pp, {options.pp}")
    return options


def run(options: argparse.Namespace) -> None:
    """What every rank does."""
    if dist.get_world_size() != options.pp * options.dp:
        raise ValueError(f"--pp {options.pp} x --dp {options.dp} are not the {dist.get_world_size()} ranks there are")
    images = load(options.data)
    options.epochs = options.epochs or images.epochs
    trainer = Trainer(options, images)
    tell = dist.get_rank() == options.pp - 1  # the last stage of the first replica, which has the losses
    if tell:
        print(
            f"{images.name}: {options.pp} stages x {options.dp} replicas, stages {options.stage_codec}, hook "
            f"{options.hook}, {options.epochs} epochs of {trainer.steps_per_epoch} steps",
            flush=True,
        )
    begin, accuracy = time.perf_counter(), 0.0
    for number in range(options.epochs):
        loss, accuracy = trainer.epoch(number), trainer.accuracy()
        if tell:
            seconds = time.perf_counter() - begin
            print(f"epoch {number + 1}: loss {loss:.3f}, test {accuracy:.2%}, {seconds:.0f} s", flush=True)
    sent = trainer.wire.stats()
    trainer.wire.remove()  # on all ranks, between steps
    bare = trainer.accuracy()
    if tell:
        print(f"test accuracy {accuracy:.2%}, with no codec between stages {bare:.2%}\nbetween stages: {sent}")
        if trainer.hook:
            print(f"between replicas: {trainer.hook.stats()}")


def main() -> None:
    options = arguments()
    dist.init_process_group("gloo")
    run(options)
    gc.collect()  # models go before their process groups
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
