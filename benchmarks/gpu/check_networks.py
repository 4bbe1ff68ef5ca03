"""Whole networks on a GPU: optimized, swapped, moved, saved, replayed as CUDA graphs. Do they answer as on the CPU?

    python -m benchmarks.gpu.check_networks [--device cuda]

Leaves with status 1 when an answer is wrong. int8 must be the CPU's to the bit. With --device cpu the script itself is
tried, but for what only a GPU has.
"""

from __future__ import annotations

import argparse
import copy
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import pykernels as pk
from benchmarks.gpu.side_by_side import Findings, share_of
from pykernels.network.dynamo import pykernels as backend
from pykernels.quantization import recipes

BATCHES = (1, 2, 5)
# Relative error in the norm: fp32 without TF32, sums in another order; bf16 and fp16 rounded at other places.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}


class Mobile(nn.Module):
    """Convolution with batch norm, depthwise, residual, gate, concatenation, pools, linear head: [N, 3, H, W] in."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.expand = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        y = F.hardswish(self.depthwise(x))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = F.relu(self.expand(y) + x)
        y = torch.cat([y, F.avg_pool2d(x, 3, 1, 1)], 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def mobile(size: int) -> Mobile:
    """With statistics of data in its batch norm, in evaluation."""
    torch.manual_seed(0)
    model = Mobile()
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def apart(actual: torch.Tensor, expected: torch.Tensor, precision: str) -> str | None:
    """What is wrong with an answer, or None."""
    actual, expected = actual.detach().cpu().float(), expected.float()
    if precision == "int8":
        return None if torch.equal(actual, expected) else f"{int((actual != expected).sum())} numbers differ"
    error = float((actual - expected).norm() / expected.norm())
    return None if error <= TOLERANCE[precision] else f"it is off by {error:.2g}"


class Networks:
    """The same network for the CPU and for `device`."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device, self.size = device, size
        self.model = mobile(size)
        calibration = [torch.randn(4, 3, size, size) for _ in range(4)]
        self.quantized = recipes.quantize(self.model, (self.x(2),), calibration)
        self.calibration = calibration

    def x(self, batch: int) -> torch.Tensor:
        return torch.randn(batch, 3, self.size, self.size, generator=torch.Generator().manual_seed(batch))

    def here(self, precision: str) -> pk.Optimized:
        return pk.optimize(self.quantized if precision == "int8" else self.model, self.x(2), precision)

    def there(self, precision: str) -> pk.Optimized:
        """Lowered on the CPU and moved: what it computes must not depend on where the calibration ran."""
        return self.here(precision).to(self.device)

    def wrong(self, network: Callable[..., Any], precision: str, expected: Callable[..., Any]) -> str | None:
        for batch in BATCHES * 2:  # the second time with the graphs of the first
            x = self.x(batch)
            with torch.no_grad():
                found = apart(network(x.to(self.device)), expected(x), precision)
            if found is not None:
                return f"{found} at batch {batch}"
        return None


def checks(networks: Networks) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """Each with a name: what is wrong, or None."""
    device = networks.device

    def lowered_there(precision: str) -> str | None:
        calibration = networks.calibration if precision == "int8" else None
        model = copy.deepcopy(networks.model).to(device)
        network = pk.optimize(model, networks.x(2), precision, calibration)
        if network.report().device != str(next(model.parameters()).device):
            return f"its report says that it is on {network.report().device}"
        if precision == "int8":  # ranges found on another device may differ in the last bit
            with torch.no_grad():
                y, expected = network(networks.x(2).to(device)).cpu(), networks.model(networks.x(2))
            return apart(y, expected, "bf16")
        return networks.wrong(network, precision, networks.here(precision))

    def saved() -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "network.pk"
            networks.there("int8").save(path)
            return networks.wrong(pk.load(path, device=device), "int8", networks.here("int8"))

    def swapped(precision: str) -> str | None:
        here, there = copy.deepcopy(networks.model), copy.deepcopy(networks.model)
        for model in (here, there):
            pk.swap(model, precision, networks.calibration if precision == "int8" else None)
        return networks.wrong(there.to(device), "bf16" if precision == "int8" else precision, here)

    def half() -> str | None:
        """A float16 model: int8 inside, float16 in and out; and its swapped layers."""
        here = copy.deepcopy(networks.model).half()
        there = copy.deepcopy(here).to(device)
        x = networks.x(2).half()
        network = pk.optimize(there, x, "int8", networks.calibration)
        pk.swap(there, "int8", [batch.half() for batch in networks.calibration])
        with torch.no_grad():
            expected = networks.model(networks.x(2))
            answers = {"optimized": network(x.to(device)), "swapped": there(x.to(device))}
        for name, y in answers.items():
            found = f"it is {y.dtype}" if y.dtype != torch.float16 else apart(y, expected, "bf16")
            if found is not None:
                return f"{name}: {found}"
        return None

    def compiled(mode: str | None) -> str | None:
        torch._dynamo.reset()
        model = copy.deepcopy(networks.model).to(device)
        return networks.wrong(torch.compile(model, backend=backend, mode=mode), "fp32", networks.model)

    for precision in ("int8", "fp32", "bf16", "fp16"):
        yield f"moved there, {precision}", lambda p=precision: networks.wrong(networks.there(p), p, networks.here(p))
        yield f"lowered there, {precision}", lambda p=precision: lowered_there(p)
        yield f"swapped, {precision}", lambda p=precision: swapped(p)
    yield "saved and loaded", saved
    yield (
        "moved back",
        lambda: apart(networks.there("int8").to("cpu")(networks.x(2)), networks.here("int8")(networks.x(2)), "int8"),
    )
    yield "a float16 model in int8", half
    yield "torch.compile", lambda: compiled(None)
    yield "torch.compile with CUDA graphs", lambda: compiled("reduce-overhead")
    if device.type == "cuda":
        yield from gpu_checks(networks)


def gpu_checks(networks: Networks) -> Iterator[tuple[str, Callable[[], str | None]]]:
    device = networks.device
    expected = networks.here("int8")

    def graphs() -> str | None:
        network = networks.there("int8")
        found = networks.wrong(network, "int8", expected)
        if found is None and (network._graphs is None or len(network._graphs) != len(BATCHES)):
            found = f"not one graph for each of {len(BATCHES)} batch sizes"
        network.cuda_graph = False
        return found or networks.wrong(network, "int8", expected)

    def streams() -> str | None:
        network, x = networks.there("int8"), [networks.x(n).to(device) for n in BATCHES]
        torch.cuda.synchronize()
        sides = [torch.cuda.Stream(device) for _ in range(2)]
        answers = []
        for i in range(30):
            with torch.cuda.stream(sides[i % 2]):
                answers.append((i % len(x), network(x[i % len(x)])))
        torch.cuda.synchronize()
        right = [expected(networks.x(n)) for n in BATCHES]
        return next((found for i, y in answers if (found := apart(y, right[i], "int8"))), None)

    def captured() -> str | None:
        network, x = networks.there("int8"), networks.x(2).to(device)
        network(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = network(x)
        x.copy_(networks.x(2).flip(0))
        graph.replay()
        return apart(y, expected(networks.x(2).flip(0)), "int8")

    def second() -> str | None:
        other = torch.device("cuda", 1)
        network = networks.there("int8")
        network(networks.x(2).to(device))
        return apart(network.to(other)(networks.x(2).to(other)), expected(networks.x(2)), "int8")

    def from_the_host() -> str | None:
        """Two threads on streams of their own; a copy is made of the network on the CPU."""
        here = networks.here("int8")
        with pk.Instances(here, pk.Setup(1, 2, device=str(device))) as instances:
            calls = [(batch, instances.submit(networks.x(batch))) for batch in BATCHES * 20]
            answers = [(batch, call.result()) for batch, call in calls]
        right = {batch: here(networks.x(batch)) for batch in BATCHES}
        elsewhere = next((str(y.device) for _, y in answers if y.device.type != "cpu"), None)
        if elsewhere is not None:
            return f"an answer is on {elsewhere}"
        return next((found for batch, y in answers if (found := apart(y, right[batch], "int8"))), None)

    def tuned() -> str | None:
        devices = ["cpu", str(device)]
        network, x = networks.here("int8"), networks.x(2)
        setup = pk.tune(network, x, latency_ms=1e3, seconds=10.0, batches=[2], devices=devices)
        tried = {trial.device for trial in setup.tried}
        return None if tried == set(devices) and setup.gpu else f"tried were {tried}, on {setup.gpu}"

    yield "CUDA graphs", graphs
    yield "called from the host", from_the_host
    yield "tuned", tuned
    yield "two streams", streams
    yield "in the caller's CUDA graph", captured
    if torch.cuda.device_count() > 1:
        yield "on the second GPU", second


@contextmanager
def exact() -> Iterator[None]:
    """fp32 is fp32, not TF32."""
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = flags


def check_networks(device: torch.device, size: int = 64, number: int = 0, of: int = 1) -> Findings:
    """The names of the checks of share `number`, and what is wrong or None. `size`: pixels of a side of the images."""
    with exact():
        for name, check in share_of(list(checks(Networks(device, size))), number, of):
            try:
                wrong = check()
            except Exception as error:  # all are tried
                wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            yield name, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    found = dict(check_networks(parser.parse_args().device))
    table = Table("network", "answer")
    for name, wrong in found.items():
        table.add_row(name, "[green]right[/]" if wrong is None else f"[red]{wrong}[/]")
    Console(width=110).print(table)
    sys.exit(any(wrong is not None for wrong in found.values()))


if __name__ == "__main__":
    main()
