"""Data-parallel training with compressed gradients, from beginning to end: checkpoints, restarts, figures, a chart.

    torchrun --nproc-per-node 2 examples/train_ddp.py --hook int8
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # a restart must not read the addresses of the ranks before it
    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/train_ddp.py --checkpoint-dir out/ckpt --resume

A residual network of eight layers learns Fashion-MNIST (Debian's ``dataset-fashion-mnist``), or scikit-learn's digits
where that is not installed, on the CPU over gloo. Every rank sees its share of the images; `--hook` says how gradients
travel. Runs into one `--out` folder share a chart.

A checkpoint is a folder: what all ranks share in one file and, since residuals and random numbers differ, one file a
rank. Training that is resumed by as many ranks goes on as if it had never stopped, to the same bits with "none" (two
ranks) and the dense codecs. By another number of ranks it goes on at the same image of the same epoch, with the
residuals of the ranks there are.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from images import Images, load, network
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from pykernels import comm

MOMENTUM, WEIGHT_DECAY, WARM_UP = 0.9, 5e-4, 0.15
TIMED = 5  # steps, from which it is told how long all will take
KEPT = 2  # checkpoints; the last one may have been made just before what one wants to go back behind


class ResumableSampler(DistributedSampler):  # type: ignore[type-arg]
    """A DistributedSampler that passes over the first `start` of this rank's samples."""

    start = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.start, None)


@dataclass
class Position:
    """How far training has come.

    Attributes:
        epoch: that is being trained.
        seen: images of this epoch, of all ranks together: it means the same whatever their number.
        step: optimizer steps since the beginning.
        losses: mean over the ranks, of each step.
        accuracies: on the test images, after each epoch.
    """

    epoch: int = 0
    seen: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


class Trainer:
    """A model, what trains it, and what a checkpoint holds of both."""

    def __init__(self, options: argparse.Namespace, images: Images) -> None:
        self.options, self.images = options, images
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(options.seed)  # the same weights everywhere
        self.model = DistributedDataParallel(network(images, options.width).to(memory_format=torch.channels_last))
        self.handle = None if options.hook == "none" else comm.register(self.model, options.hook)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        self.sampler = ResumableSampler(images.train, seed=options.seed)
        self.batches = DataLoader(
            TensorDataset(images.train, images.train_labels),
            options.batch,
            sampler=self.sampler,
            drop_last=True,
            generator=torch.Generator(),  # its own: how often it is asked must not disturb the augmentation
        )
        self.position = Position()
        self._losses: list[torch.Tensor] = []  # of this rank, since they were last averaged
        self._seed_augmentation()

    def _seed_augmentation(self) -> None:
        """Other random numbers for each rank, and for each point where the number of ranks changed."""
        torch.manual_seed(hash((self.options.seed, self.rank, self.world, self.position.step)) % 2**63)

    # ---- training ----

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.num_samples // self.options.batch

    def learning_rate(self) -> float:
        """Up in a line, then down along a cosine: of the images seen, so that there is no state to save."""
        done = (self.position.epoch + self.position.seen / len(self.images.train)) / self.options.epochs
        if done < WARM_UP:
            return self.options.lr * (done + 0.01) / (WARM_UP + 0.01)
        return 0.5 * self.options.lr * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))

    def train(self, advance: Callable[[], object]) -> None:
        """Train to the end, from where `position` is."""
        while self.position.epoch < self.options.epochs:
            self.sampler.set_epoch(self.position.epoch)
            self.sampler.start = self.position.seen // self.world
            self.model.train()
            for images, labels in self.batches:
                self.step(images, labels)
                advance()
                if self.options.checkpoint_dir and self.position.step % self.options.checkpoint_every == 0:
                    self.save()
                if self.position.step == self.options.kill_at:
                    self.die_once()
            self.average_losses()
            self.position.accuracies.append(self.accuracy())
            self.position.epoch, self.position.seen = self.position.epoch + 1, 0
        if self.options.checkpoint_dir:
            self.save()

    def die_once(self) -> None:
        """To see a restart: the last rank, on the first attempt, as the kernel ends one that is out of memory."""
        if self.rank == self.world - 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        inputs = self.images.augment(images).contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(self.model(inputs), labels)
        loss.backward()  # the hook works here; if a peer is lost or sends garbage, this raises
        self.optimizer.step()
        self._losses.append(loss.detach())
        self.position.step += 1
        self.position.seen += self.world * len(labels)

    def average_losses(self) -> None:
        """The losses of the steps since the last call, averaged over the ranks in one go."""
        if self._losses:
            losses = torch.stack(self._losses)
            dist.all_reduce(losses)
            self.position.losses += (losses / self.world).tolist()
            self._losses.clear()

    @torch.no_grad()
    def accuracy(self) -> float:
        """The share of the test images that get their label; each rank looks at some of them."""
        for buffer in self.model.module.buffers():  # running statistics differ by rank until the next forward pass
            dist.broadcast(buffer, 0)
        self.model.eval()
        mine = slice(self.rank, None, self.world)
        right = torch.zeros(())
        for images, labels in zip(
            self.images.test[mine].split(500), self.images.test_labels[mine].split(500), strict=True
        ):
            right += (self.model.module(images).argmax(1) == labels).sum()
        dist.all_reduce(right)
        return float(right) / len(self.images.test)

    # ---- checkpoints ----

    def save(self) -> None:
        """Write a checkpoint. It gets its name when all of its files are on the disk: what has a name is whole."""
        folder: Path = self.options.checkpoint_dir
        self.average_losses()
        writing = folder / "writing"
        if self.rank == 0:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)
        dist.barrier()
        mine = {"comm": self.handle.state_dict() if self.handle else None, "random": torch.get_rng_state()}
        write(mine, writing / f"rank-{self.rank}.pt")
        if self.rank == 0:
            shared = {
                "hook": self.options.hook,
                "world": self.world,
                "position": vars(self.position),
                "model": self.model.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            write(shared, writing / "shared.pt")
        dist.barrier()
        if self.rank == 0:
            writing.rename(folder / f"step-{self.position.step:08}")
            for old in checkpoints(folder)[:-KEPT]:
                shutil.rmtree(old)

    def resume(self, folder: Path) -> None:
        """Take over the checkpoint in `folder`."""
        shared = torch.load(folder / "shared.pt", weights_only=True)
        if shared["hook"] != self.options.hook:
            raise ValueError(f"--hook: {folder} was trained with {shared['hook']}, not {self.options.hook}")
        self.model.module.load_state_dict(shared["model"])
        self.optimizer.load_state_dict(shared["optimizer"])
        self.position = Position(**shared["position"])
        known = self.rank < shared["world"]
        mine = torch.load(folder / f"rank-{self.rank if known else 0}.pt", weights_only=True)
        if self.handle:
            state = mine["comm"] if known else {**mine["comm"], "worker": {}}  # a new rank owes nothing yet
            self.handle.load_state_dict(state)
        if shared["world"] == self.world:
            torch.set_rng_state(mine["random"])
        else:
            self._seed_augmentation()


def write(content: dict[str, Any], file: Path) -> None:
    """Save to a file that is on the disk afterwards."""
    with file.open("wb") as out:
        torch.save(content, out)
        out.flush()
        os.fsync(out.fileno())


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    return sorted(folder.glob("step-*"))


# ---- what came of it ----


def traffic(trainer: Trainer) -> tuple[str, float]:
    """What went over the wire, in words, and bytes a step and rank."""
    if trainer.handle:
        stats = trainer.handle.stats()
        return str(stats), stats.wire_bytes / max(1, stats.steps)
    size = 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    sent = 2 * (trainer.world - 1) / trainer.world * size
    return f"{sent / 1e6:.2f} MB a step on the wire for a ring all-reduce (computed, not measured)", sent


def chart(folder: Path) -> Path:
    """Loss and accuracy of every run in `folder`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), facecolor="white")
    for run in runs:
        losses = torch.tensor(run["losses"])
        window = max(1, len(losses) // 50)
        smooth = losses.unfold(0, window, 1).mean(1)
        left.plot(range(window, len(losses) + 1), smooth, label=run["hook"], linewidth=1.4)
        accuracy = 100 * run["accuracies"][-1]
        bar = right.barh(f"{run['hook']}\n{run['bytes_per_step'] / 1e6:.2f} MB a step", accuracy, height=0.6)
        right.bar_label(bar, [f" {accuracy:.2f} %"])
    left.set_yscale("log")
    left.set_xlabel("step")
    left.set_title(f"Training loss, mean of {runs[0]['ranks']} ranks, smoothed", loc="left", fontsize=11)
    left.legend(frameon=False)
    right.set_xlim(0, 115)
    right.set_xticks([])
    right.invert_yaxis()
    right.set_title("Test accuracy; sent by a rank", loc="left", fontsize=11)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    right.spines["bottom"].set_visible(False)
    figure.suptitle(f"{runs[0]['images']}, {runs[0]['parameters']:,} parameters", x=0.125, ha="left", weight="bold")
    file = folder / "training.png"
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)
    return file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hook", default="int8", choices=["none", *comm.HOOKS], help="how gradients travel (int8)")
    parser.add_argument("--data", default="auto", choices=["auto", "fashion-mnist", "digits"])
    parser.add_argument("--train-images", type=int, help="how many to learn from (all)")
    parser.add_argument("--width", type=int, default=32, help="channels of the first stage (32)")
    parser.add_argument("--epochs", type=int, help="as many as the images need: Fashion-MNIST 1, digits 15")
    parser.add_argument("--batch", type=int, default=64, help="images a rank and step (64)")
    parser.add_argument("--lr", type=float, default=0.1, help="the highest learning rate (0.1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint-dir", type=Path, metavar="DIR", help="a folder that all ranks see")
    parser.add_argument("--checkpoint-every", type=int, default=100, metavar="STEPS", help="(100)")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR, if there is one"
    )
    parser.add_argument("--kill-at", type=int, metavar="STEP", help="try it out: the last rank dies here, once")
    parser.add_argument(
        "--out", type=Path, default=Path("out/train"), metavar="DIR", help="figures and chart (out/train)"
    )
    options = parser.parse_args()
    for name in ("epochs", "batch", "checkpoint_every", "width"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.resume and not options.checkpoint_dir:
        parser.error("--resume needs --checkpoint-dir")
    if options.checkpoint_dir and not options.resume and checkpoints(options.checkpoint_dir):
        parser.error(f"{options.checkpoint_dir} holds checkpoints: give --resume, or another --checkpoint-dir")
    return options


def run(options: argparse.Namespace) -> None:
    """What every rank does."""
    images = load(options.data)
    if options.train_images:
        images = images.subset(options.train_images)
    options.epochs = options.epochs or images.epochs
    trainer = Trainer(options, images)
    console = Console(quiet=trainer.rank != 0)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    console.print(
        f"[bold]{images.name}[/]: {len(images.train)} images to learn from, {len(images.test)} to be judged by; "
        f"{parameters:,} parameters, {trainer.world} ranks x {options.batch} images a step, "
        f"hook [bold]{options.hook}[/], {options.epochs} epoch{'s' * (options.epochs > 1)}"
    )
    if trainer.steps_per_epoch < 1:
        raise ValueError(f"--batch: {trainer.world} ranks x {options.batch} are more than {len(images.train)} images")
    if options.resume and (found := checkpoints(options.checkpoint_dir)):
        trainer.resume(found[-1])
        console.print(f"resumed from {found[-1]}")
    total, first = options.epochs * trainer.steps_per_epoch, trainer.position.step
    begin = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:  # on rank 0; the others' console is quiet
        task = bar.add_task("steps", total=total, completed=first)

        def advance() -> None:
            bar.advance(task)
            if trainer.position.step == first + TIMED < total:
                left = (time.perf_counter() - begin) / TIMED * (total - first - TIMED)
                console.print(f"{total - first} steps: some {left:.0f} seconds more")

        trainer.train(advance)
    seconds = time.perf_counter() - begin
    words, sent = traffic(trainer)
    if trainer.rank == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        report = {
            "hook": options.hook,
            "images": images.name,
            "parameters": parameters,
            "ranks": trainer.world,
            "bytes_per_step": sent,
            **vars(trainer.position),
        }
        (options.out / f"{options.hook}.json").write_text(json.dumps(report))
        torch.save(trainer.model.module.state_dict(), options.out / f"{options.hook}.pt")
        console.print(f"test accuracy [bold]{trainer.position.accuracies[-1]:.2%}[/], epochs: {options.epochs}")
        console.print(f"{trainer.position.step - first} steps in {seconds:.1f} s, evaluation included; {words}")
        console.print(f"chart: [bold]{chart(options.out)}[/]")


def main() -> None:
    options = arguments()
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo")
    run(options)
    gc.collect()  # the model must be gone before its process group: the other way round torch may wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
