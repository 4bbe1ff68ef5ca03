"""What codecs cost in accuracy: a residual network on Fashion-MNIST, several seeds for each hook.

    python -m benchmarks.comm.convergence                                  # three seeds, two ranks: most of an hour
    python -m benchmarks.comm.convergence --hooks none int8 topk:ratio=0.1 --seeds 5
    python -m benchmarks.comm.convergence --data digits                    # scikit-learn's digits: seconds
    python -m benchmarks.comm.convergence --pipeline --hooks none int8 int4

Two processes train by DistributedDataParallel over gloo, one thread each, with the hooks that users register; "none" is
DDP's own fp32 all-reduce. With `--pipeline` they are the stages of a pipeline (1F1B) instead, hooks are the codecs of
activations and of their gradients, and the accuracy is told with the codec between the stages and with none. Nothing
but the hook differs between runs of a seed: weights, images and augmentation are the same. Prints mean and standard
deviation of the test accuracy after the last epoch, and the difference to fp32 over the same seeds. Writes JSON and a
chart.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel

from examples.images import Images, ResNet, between, cut, load, network
from pykernels import comm
from pykernels.parallel import STAGE_CODECS

WEIGHT_DECAY, WARM_UP = 5e-4, 0.15
CHUNKS = 4  # of a pipeline's batch
HOOKS = ("none", "int8", "int4", "onebit", "onebit:error_feedback=False", "topk", "topk:warmup_steps=1500")


def parse_hook(text: str) -> tuple[str, dict[str, Any]]:
    """``name:option=value,option=value`` to the name and the options: "none", or what ``comm.register`` takes."""
    name, _, rest = text.partition(":")
    if name not in ("none", *comm.HOOKS):
        raise argparse.ArgumentTypeError(f"{name!r} is not one of none, {', '.join(comm.HOOKS)}")
    try:
        return name, {key: ast.literal_eval(value) for key, value in (o.split("=") for o in rest.split(",") if o)}
    except (ValueError, SyntaxError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not name:option=value,...: {error}") from error


def hook_argument(text: str) -> str:
    """`text`, if it can be parsed."""
    parse_hook(text)
    return text


class Replicas:
    """A copy of `net` on each rank, gradients averaged through `hook`."""

    def __init__(self, net: nn.Module, hook: str) -> None:
        self.model = DistributedDataParallel(net.to(memory_format=torch.channels_last))
        self.share, self.shares = dist.get_rank(), dist.get_world_size()  # of the images
        self.handle = None
        if hook != "none":
            name, options = parse_hook(hook)
            self.handle = comm.register(self.model, name, **options)

    def backward(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        nn.functional.cross_entropy(self.model(inputs), labels).backward()

    @torch.no_grad()
    def accuracy(self, images: Images) -> dict[str, float]:
        """The share of test images that get their label, with rank 0's running statistics; each rank looks at some."""
        mine = slice(self.share, None, self.shares)
        for buffer in self.model.module.buffers():
            dist.broadcast(buffer, 0)
        self.model.eval()
        answers = [self.model.module(part).argmax(1) for part in images.test[mine].split(500)]
        right = (torch.cat(answers) == images.test_labels[mine]).sum()
        dist.all_reduce(right)
        return {"accuracy": int(right) / len(images.test)}


class Stages:
    """A part of `net` on each rank; activations and their gradients travel through the codec `hook`."""

    share, shares = 0, 1  # all ranks see the same images

    def __init__(self, net: ResNet, hook: str, images: Images, batch: int) -> None:
        rank, ranks, device = dist.get_rank(), dist.get_world_size(), torch.device("cpu")
        self.batch = batch
        parts = cut(net, ranks)
        shapes = between(parts, torch.zeros(batch // CHUNKS, *images.train.shape[1:]))
        self.model = parts[rank]
        self.stage = PipelineStage(
            self.model, rank, ranks, device, input_args=shapes[rank], output_args=shapes[rank + 1]
        )
        self.handle = None
        if hook != "none":
            name, options = parse_hook(hook)
            self.handle = comm.register(self.stage, forward=name, backward=name, **options)
        self.schedule = Schedule1F1B(self.stage, CHUNKS, loss_fn=nn.functional.cross_entropy)

    def backward(self, inputs: torch.Tensor, labels: torch.Tensor) -> None:
        self.schedule.step(*([inputs] if self.stage.is_first else []), target=labels)

    @torch.no_grad()
    def accuracy(self, images: Images) -> dict[str, float]:
        """The share of test images that get their label; the same with no codec between the stages."""
        self.model.eval()
        found = {"accuracy": self._accuracy(images)}
        if self.handle is not None:
            self.handle.remove()
            found["without codec"] = self._accuracy(images)
        return found

    def _accuracy(self, images: Images) -> float:
        right = torch.zeros((), dtype=torch.int64)
        for part, labels in zip(images.test.split(self.batch), images.test_labels.split(self.batch), strict=True):
            missing = self.batch - len(part)  # stages know one size
            whole = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
            target = torch.cat([labels, labels.new_zeros(missing)])
            answers = self.schedule.eval(*([whole] if self.stage.is_first else []), target=target)
            if answers is not None:
                right += (answers[: len(part)].argmax(1) == labels).sum()
        dist.all_reduce(right)
        return int(right) / len(images.test)


def train(
    images: Images,
    learner: Replicas | Stages,
    hook: str,
    seed: int,
    epochs: int,
    batch: int,
    lr: float,
    momentum: float,
) -> dict[str, Any]:
    """Train on all ranks of the default group, on shares of `batch` images.

    Returns:
        ``accuracy`` on the test images, that of stages also ``without codec``; ``bytes`` a step that this rank sent
        (none for hook "none"); ``seconds``.
    """
    optimizer = torch.optim.SGD(learner.model.parameters(), lr, momentum, weight_decay=WEIGHT_DECAY)
    steps = len(images.train) // (batch * learner.shares)
    torch.manual_seed(1000 * seed + learner.share)  # of the augmentation
    order = torch.Generator().manual_seed(seed)
    begin = time.perf_counter()
    for epoch in range(epochs):
        chosen = torch.randperm(len(images.train), generator=order)[: steps * batch * learner.shares]
        for step, mine in enumerate(chosen[learner.share :: learner.shares].split(batch)):
            done = (epoch + step / steps) / epochs
            for group in optimizer.param_groups:  # up in a line, then down along a cosine
                group["lr"] = lr * min(
                    (done + 0.01) / (WARM_UP + 0.01),
                    0.5 + 0.5 * math.cos(math.pi * max(0.0, done - WARM_UP) / (1 - WARM_UP)),
                )
            optimizer.zero_grad()
            inputs = images.augment(images.train[mine]).contiguous(memory_format=torch.channels_last)
            learner.backward(inputs, images.train_labels[mine])
            optimizer.step()
    seconds = time.perf_counter() - begin
    stats = learner.handle.stats() if learner.handle else None
    return {
        "hook": hook,
        "seed": seed,
        **learner.accuracy(images),
        "bytes": stats.wire_bytes / stats.steps if stats else None,
        "ratio": stats.ratio if stats else 1.0,
        "seconds": seconds,
    }


def work(rank: int, options: argparse.Namespace, store: str, answers: Any) -> None:
    """What one process does: every run, one after another, with the others."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=options.ranks)
    images = load(options.data)
    if options.train_images:
        images = images.subset(options.train_images)
    for seed in range(options.seeds):
        for hook in options.hooks:
            torch.manual_seed(seed)
            net = network(images, options.width)
            learner = Stages(net, hook, images, options.batch) if options.pipeline else Replicas(net, hook)
            answer = train(images, learner, hook, seed, options.epochs, options.batch, options.lr, options.momentum)
            if rank == 0:
                answers.put({"images": images.name, "train_images": len(images.train), **answer})
    dist.destroy_process_group()


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and deviation by hook, and the mean over the seeds of the difference to fp32, in points."""
    exact = {run["seed"]: run["accuracy"] for run in runs if run["hook"] == "none"}
    bare = any("without codec" in run for run in runs)
    titles = ["hook", "seeds", "accuracy %", "sd", "minus fp32", *["codec off %"] * bare, "fewer bytes", "s a run"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for hook in dict.fromkeys(run["hook"] for run in runs):
        some = [run for run in runs if run["hook"] == hook]
        values = [100 * run["accuracy"] for run in some]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        gaps = [100 * (run["accuracy"] - exact[run["seed"]]) for run in some if run["seed"] in exact]
        gap = f"{statistics.mean(gaps):+.2f}" if gaps and hook != "none" else ""
        seconds = statistics.median(run["seconds"] for run in some)
        row = [hook, len(some), f"{statistics.mean(values):.2f}", spread, gap]
        if bare:
            row.append(f"{100 * statistics.mean(run.get('without codec', run['accuracy']) for run in some):.2f}")
        row += [f"{some[0]['ratio']:.1f}x", f"{seconds:.0f}"]
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines)


def chart(runs: list[dict[str, Any]], title: str, file: Path) -> None:
    """Every run a point, every hook a mean, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    hooks = list(dict.fromkeys(run["hook"] for run in runs))
    figure, axis = plt.subplots(figsize=(8, 0.6 * len(hooks) + 1.6), facecolor="white")
    for row, hook in enumerate(hooks):
        values = [100 * run["accuracy"] for run in runs if run["hook"] == hook]
        mean = statistics.mean(values)
        axis.scatter(values, [row] * len(values), s=28, color="#5fa8d3", zorder=3)
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color="#e4572e", linewidth=2)
        axis.annotate(f"{mean:.2f}", (mean, row - 0.34), ha="center", va="bottom", fontsize=9)
    axis.set_yticks(range(len(hooks)), hooks)
    axis.set_ylim(len(hooks) - 0.4, -0.9)
    axis.set_xlabel("test accuracy, %")
    axis.set_title(title, loc="left", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", color="#e5e8ec")
    figure.savefig(file, dpi=150, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hooks", nargs="+", type=hook_argument, default=HOOKS, metavar="HOOK[:OPTION=VALUE,...]")
    parser.add_argument("--pipeline", action="store_true", help="ranks are stages; hooks are codecs between them")
    parser.add_argument("--seeds", type=int, default=3, help="how many (3)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", default="auto", choices=["auto", "fashion-mnist", "digits"])
    parser.add_argument("--train-images", type=int, default=0, help="how many to learn from (0: all)")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32, help="images a rank and step (32)")
    parser.add_argument("--width", type=int, default=8, help="channels of the first stage (8)")
    parser.add_argument("--lr", type=float, default=0.02, help="the highest learning rate (0.02)")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=Path("out/convergence"), metavar="DIR", help="(out/convergence)")
    options = parser.parse_args()
    if min(options.seeds, options.ranks, options.epochs, options.batch, options.width) < 1:
        parser.error("--seeds, --ranks, --epochs, --batch and --width must be at least 1")
    if options.pipeline:
        if others := [hook for hook in options.hooks if parse_hook(hook)[0] not in ("none", *STAGE_CODECS)]:
            parser.error(f"--pipeline: {others[0]} is no codec of stages: {', '.join(STAGE_CODECS)}")
        if options.batch % CHUNKS or options.ranks > CHUNKS:
            parser.error(f"--pipeline: --batch must be a multiple of {CHUNKS}, --ranks at most {CHUNKS}")

    options.out.mkdir(parents=True, exist_ok=True)
    runs: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = multiprocessing.spawn(
            work, (options, f"{folder}/store", answers), nprocs=options.ranks, join=False, daemon=True
        )
        total = options.seeds * len(options.hooks)
        ended = False
        while len(runs) < total and not ended:
            ended = ranks.join(timeout=0.01)  # raises what a rank raised
            try:
                runs.append(answers.get(timeout=1))
            except queue.Empty:
                continue
            last = runs[-1]
            print(
                f"[{len(runs)}/{total}] seed {last['seed']} {last['hook']}: {last['accuracy']:.2%}, "
                f"{last['seconds']:.0f} s",
                flush=True,
            )
            settings = {key: value for key, value in vars(options).items() if key not in ("out", "hooks")}
            (options.out / "convergence.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1))
        while not ranks.join():
            pass
    title = (
        f"{runs[0]['images']}, {runs[0]['train_images']} images, width {options.width}, {options.ranks} "
        f"{'stages' if options.pipeline else 'ranks'} "
        f"x {options.batch}, {options.epochs} epochs, lr {options.lr:g}, momentum {options.momentum:g}"
    )
    print(f"\n{title}\n\n{table(runs)}")
    chart(runs, title, options.out / "convergence.png")
    print(f"\nchart: {options.out / 'convergence.png'}")


if __name__ == "__main__":
    main()
