"""What clients see when something dies: a cluster on one machine, nginx in front, requests of 600 KB all the while.

    python -m benchmarks.serve.faults                       # every fault, one after the other
    python -m benchmarks.serve.faults --only replica proxy
    python -m benchmarks.serve.faults --protocol grpc

Over gRPC clients send again what is lost, as the grpc-client.json says that `pykernels serve --write-config` writes.

Each row: how many requests were asked while the fault happened and was mended, what became of them, the longest one,
and seconds until all was as before. Exit status 1 if a request was not answered.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

import pykernels as pk
from benchmarks.serve.cluster import DASHBOARD, Cluster, cluster, unusable, wait
from benchmarks.serve.load import Load, told
from pykernels.serve.service import Options

CLIENTS, SETTLE = 4, 5.0  # seconds of requests before and after


class Small(nn.Module):
    """A network that takes 600 KB and computes for some milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 64, 3, 2, 1), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))
        return y


def replica(made: Cluster, options: Options) -> None:
    """A replica is killed."""
    _replaced(made, lambda: os.kill(made.replicas()[0], signal.SIGKILL))


def proxy(made: Cluster, options: Options) -> None:
    """A worker's HAProxy is killed."""
    for pid in made.processes(1, "haproxy"):
        os.kill(pid, signal.SIGKILL)
    wait(lambda: made.answers(1), "the proxy")


def node(made: Cluster, options: Options) -> None:
    """A worker is lost, and comes back."""

    def lost() -> None:
        made.lose(1)
        time.sleep(SETTLE)
        made.worker(1)

    _replaced(made, lost)
    wait(lambda: made.answers(1), "the worker")


def head(made: Cluster, options: Options) -> None:
    """Ray's head is lost, and comes back with what Redis knows."""
    made.lose(0)
    time.sleep(SETTLE)
    made.head()
    wait(lambda: made.answers(0, DASHBOARD, "api/version"), "Ray's head")
    wait(lambda: all(made.answers(host) for host in made.workers), "replicas")


def redeploy(made: Cluster, options: Options) -> None:
    """Other options are deployed, replica by replica."""
    before = set(made.replicas())
    made.deploy(dataclasses.replace(options, batch=2 * options.batch), len(before))
    wait(lambda: len(now := set(made.replicas())) == len(before) and not now & before, "new replicas")


FAULTS: dict[str, Callable[[Cluster, Options], None]] = {
    "replica": replica, "proxy": proxy, "node": node, "head": head, "redeploy": redeploy,
}  # fmt: skip


def _replaced(made: Cluster, fault: Callable[[], None]) -> None:
    before = made.replicas()
    fault()
    wait(lambda: len(now := made.replicas()) == len(before) and now != before, "another replica")
    wait(lambda: all(made.answers(host) for host in made.workers), "all workers")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--protocol", choices=["http", "grpc"], default="http", help="what clients speak")
    parser.add_argument("--logs", type=pathlib.Path, help="where to keep them")
    asked_for = parser.parse_args()
    if (why := unusable()) is not None:
        print(why, file=sys.stderr)
        return 2
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    lost = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked_for.logs or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        pk.optimize(Small().eval(), (torch.from_numpy(x),)).save(folder / "net.pk")
        options = Options(models={"net": str(folder / "net.pk")}, batch=4)
        with cluster(folder, options) as made:
            print(f"{'fault':10} {'requests':>8} {'answered':>8} {'longest s':>9} {'mended s':>8}  others", flush=True)
            for name in asked_for.only:
                load = Load(
                    f"{made.address(made.edge)}:8443", "net", x, CLIENTS, asked_for.protocol, made.certificate,
                    (folder / "grpc-client.json").read_text(), host=made.hosts[made.edge],
                )  # fmt: skip
                with load.running() as asked:
                    time.sleep(SETTLE)
                    begin = time.monotonic()
                    FAULTS[name](made, options)
                    mended = time.monotonic() - begin
                    time.sleep(SETTLE)
                answers = told(asked)
                good = answers.pop(200, 0)
                longest = max(each.end - each.begin for each in asked)
                lost += len(asked) - good
                print(f"{name:10} {len(asked):8} {good:8} {longest:9.2f} {mended:8.1f}  {answers or ''}", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    raise SystemExit(main())
