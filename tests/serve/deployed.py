"""What `pykernels serve` starts on Ray, seen from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import torch


class Deployed:
    """What `pykernels serve` started."""

    def __init__(self, process: subprocess.Popen[str], http: str, grpc: str) -> None:
        self.process, self.http, self.grpc = process, http, grpc

    def replicas(self) -> list[int]:
        """Processes of replicas that descend from this one."""
        from benchmarks.serve.start import replicas

        return sorted(replicas(self.process.pid))

    def parts(self) -> list[int]:
        """Processes of the parts of split networks, in the order in which they were started."""
        from benchmarks.serve.start import descendants

        return sorted(pid for pid, command in descendants(self.process.pid) if b"pykernels.parallel.part" in command)

    def ask(self, x: torch.Tensor, model: str = "line") -> torch.Tensor:
        body = json.dumps({"instances": x.tolist()}).encode()
        answer = urllib.request.urlopen(f"http://{self.http}/v1/models/{model}:predict", body, timeout=60)
        return torch.tensor(json.load(answer)["predictions"])


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def deploy(net: Path | str, *options: str) -> Iterator[Deployed]:
    """`pykernels serve NET` on Ray (NET is a file or NAME=FILE), with more options, until the context ends."""
    http, grpc = free_ports(2)
    process = subprocess.Popen(
        [sys.executable, "-m", "pykernels", "serve", str(net), "--port", str(http), "--grpc-port", str(grpc), *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        while "http://" not in (line := process.stdout.readline()):
            assert line, "it ended before it served"
        yield Deployed(process, f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
