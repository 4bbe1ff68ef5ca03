"""Slow links on one machine: a network namespace for each rank, joined by a bridge, each with a shaped way out.

    python -m benchmarks.comm.netns --world 4 -- python -m benchmarks.comm.step --rates 100mbit,1gbit

runs the command once for each rank, with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME set, and
removes the namespaces when it is done, interrupted or failed. Needs root, `ip` and `tc`. A rank shapes its own way out,
with `shape`, so that one run can measure several rates; a program that does not is given rates of its ranks,

    python -m benchmarks.comm.netns --world 11 --rates unshaped,10mbit -- python examples/federated.py

here that of rank 0, and that of all others.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

INTERFACE = "eth0"
NETWORK = "10.213.0"
PORT = 29500


def unusable() -> str | None:
    """Why namespaces cannot be made here; None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (package iproute2)"
    probe = f"pk{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def bits_per_second(rate: str) -> float:
    """Of "100mbit" or "10gbit".

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(k|m|g)bit", rate)
    if match is None:
        raise ValueError(f"rate: {rate!r} is not like 100mbit or 10gbit")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def shape(rate: str, namespace: str | None = None) -> None:
    """Limit what leaves this namespace, or another one, to `rate` ("100mbit" ...); "unshaped" lifts the limit."""
    there = ["ip", "netns", "exec", namespace] if namespace else []
    subprocess.run([*there, "tc", "qdisc", "del", "dev", INTERFACE, "root"], capture_output=True)
    if rate == "unshaped":
        return
    burst = max(256 * 1024, int(bits_per_second(rate) / 8 * 1e-3))  # what the kernel's timer can hand out at once
    limit = f"tc qdisc add dev {INTERFACE} root tbf rate {rate} burst {burst} latency 50ms".split()
    subprocess.run([*there, *limit], check=True)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def namespaces(world: int) -> Iterator[list[str]]:
    """The names of `world` namespaces; rank r has the address NETWORK.(r + 1). They are gone at the end."""
    ranks = [f"pk{os.getpid()}r{rank}" for rank in range(world)]
    bridge = f"pk{os.getpid()}br"
    try:
        for name in (bridge, *ranks):
            _ip("netns", "add", name)
        _ip("-n", bridge, "link", "add", "br0", "type", "bridge")
        _ip("-n", bridge, "link", "set", "br0", "up")
        for rank, name in enumerate(ranks):
            _ip("-n", bridge, "link", "add", f"v{rank}", "type", "veth", "peer", "name", INTERFACE, "netns", name)
            _ip("-n", bridge, "link", "set", f"v{rank}", "master", "br0", "up")
            _ip("-n", name, "addr", "add", f"{NETWORK}.{rank + 1}/24", "dev", INTERFACE)
            _ip("-n", name, "link", "set", INTERFACE, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield ranks
    finally:
        for name in (*ranks, bridge):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def run(command: Sequence[str], world: int, timeout: float, limits: Sequence[str] = ()) -> int:
    """Run `command` for each rank and return 0, or the first status that is not; 124 after `timeout` seconds, 130 when
    interrupted. `limits`: rates of the first ranks' links, of which the last one is all others', too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was made is removed
    try:
        status = _run(command, world, timeout, limits)
    except KeyboardInterrupt:
        status = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    if status == 124:
        print(f"stopped after {timeout:.0f} s", file=sys.stderr)
    return status


def _run(command: Sequence[str], world: int, timeout: float, limits: Sequence[str]) -> int:
    with namespaces(world) as names:
        for name, rate in zip(
            names, itertools.chain(limits, itertools.repeat(limits[-1])) if limits else (), strict=False
        ):
            shape(rate, name)
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, name in enumerate(names):
                environment = os.environ | {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": f"{NETWORK}.1",
                    "MASTER_PORT": str(PORT),
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                    "TORCH_CPP_LOG_LEVEL": "ERROR",  # the addresses have no names, which torch would warn of
                    "BENCHMARK_ADDRESS": f"{NETWORK}.{rank + 1}",
                }
                ranks.append(
                    subprocess.Popen(["ip", "netns", "exec", name, *command], env=environment, start_new_session=True)
                )
            end = time.monotonic() + timeout
            while any(rank.poll() is None for rank in ranks):
                failed = [rank.returncode for rank in ranks if rank.returncode]
                if failed:
                    return int(failed[0])
                if time.monotonic() > end:
                    return 124
                time.sleep(0.05)
            return next((int(rank.returncode) for rank in ranks if rank.returncode), 0)
        finally:
            for rank in ranks:  # each leads a process group of its own
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.pid, signal.SIGKILL)
            for rank in ranks:
                rank.wait()


def rates(text: str | None) -> list[str]:
    """Rates by commas, ``100mbit,1gbit,unshaped``; without any the links as they are, ``asis``.

    Raises:
        ValueError: one of them is no rate.
    """
    found = text.split(",") if text else ["asis"]
    for rate in found:
        if rate not in ("asis", "unshaped"):
            bits_per_second(rate)
    return found


def check_launch(parser: argparse.ArgumentParser, world: int | None) -> None:
    """Leave the program where `run` cannot start its ranks: nobody said how many, or there are no namespaces here."""
    if world is None:
        parser.error("give --world, or run under torchrun")
    reason = unusable()
    if reason is not None:
        sys.exit(f"skipped: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=2, help="ranks")
    parser.add_argument(
        "--rates", help="of the links of rank 0, rank 1, ...: 100mbit,1gbit; the last one's for the rest"
    )
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args()
    try:
        limits = rates(given.rates) if given.rates else []
    except ValueError as error:
        parser.error(str(error))
    reason = unusable()
    if reason is not None:
        sys.exit(f"skipped: {reason}")
    sys.exit(run(given.command, given.world, given.timeout, limits))


if __name__ == "__main__":
    main()
