"""More than a server can answer, and clients that hang up: `pykernels serve --in-process` beside normal load.

    python -m benchmarks.serve.overload

Requests of 600 KB. Each row: requests, what became of them, the median and the longest time of those that were
answered, and the most memory that the server's process held (resident). Where `wrk` is installed it asks as well,
with as many connections and no pause after a refusal: "lost" are those that ended while it still sent what nobody reads
any more. Exit status 1 if under overload there was another answer than 200 and 429, if under normal load one was not
answered, or if memory grew by more than requests may take.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import shutil
import statistics
import tempfile
import threading
import time

import numpy as np
import torch

import pykernels as pk
from benchmarks.serve.faults import Small
from benchmarks.serve.in_process import server
from benchmarks.serve.load import Asked, Load, told
from benchmarks.serve.wrk import ask

BOUND = 1 << 30  # `pykernels serve`'s bound for requests in memory


class Memory:
    """The most bytes that a process held while the context lasted."""

    def __init__(self, pid: int) -> None:
        self._status, self._end, self.most = pathlib.Path(f"/proc/{pid}/status"), threading.Event(), 0

    def __enter__(self) -> Memory:
        self._end.clear()
        self.most = 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            (line,) = (each for each in self._status.read_text().splitlines() if each.startswith("VmRSS"))
            self.most = max(self.most, 1024 * int(line.split()[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row")
    parser.add_argument("--clients", type=int, default=500, help="that are too many")
    asked_for = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((1, 3, 224, 224), dtype=np.float32)
    rows = {
        "normal": (4, None, {200}),
        "overload": (asked_for.clients, None, {200, 429}),
        "half hang up": (asked_for.clients // 10, 0.2, {200, 429, "hung up"}),
        "normal again": (4, None, {200}),
    }
    bad, first = False, 0
    with tempfile.TemporaryDirectory() as folder:
        net = pathlib.Path(folder) / "net.pk"
        pk.optimize(Small().eval(), (torch.from_numpy(x),)).save(net)
        with server(net, "--replicas", "1", "--queue", "64") as (http, _, pid):
            print(f"{'':12} {'requests':>8} {'median ms':>9} {'longest ms':>10} {'RSS MB':>6}  answers")
            for name, (clients, hang_up, allowed) in rows.items():
                loads = [Load(http, "net", x, clients - clients // 2 * (hang_up is not None))]
                if hang_up is not None:
                    loads.append(Load(http, "net", x, clients // 2, hang_up=hang_up))
                with Memory(pid) as memory:
                    asked = _asked(loads, asked_for.seconds)
                first = first or memory.most
                answers = told(asked)
                taken = [1e3 * (each.end - each.begin) for each in asked if each.answer == 200]
                bad |= not set(answers) <= allowed or memory.most > first + BOUND
                print(
                    f"{name:12} {len(asked):8} {statistics.median(taken):9.1f} {max(taken):10.1f} "
                    f"{memory.most / 1e6:6.0f}  {answers}",
                    flush=True,
                )
            if shutil.which("wrk") is not None:
                with Memory(pid) as memory:
                    answers = ask(
                        pathlib.Path(folder), f"http://{http}", "net", x, asked_for.clients, asked_for.seconds
                    )
                bad |= not set(answers) <= {200, 429, "lost"} or 200 not in answers or memory.most > first + BOUND
                requests = sum(count for answer, count in answers.items() if answer != "lost")
                print(f"{'wrk':12} {requests:8} {'':9} {'':10} {memory.most / 1e6:6.0f}  {answers}", flush=True)
    return int(bad)


def _asked(loads: list[Load], seconds: float) -> list[Asked]:
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(load.running()) for load in loads]
        time.sleep(seconds)
    return [each for asked in found for each in asked]


if __name__ == "__main__":
    raise SystemExit(main())
