"""A cluster on one machine: network namespaces as hosts, Ray on each, Redis for the head's memory, nginx in front.

Host 0 is Ray's head, which runs no replica; the last one is nginx's and the clients'; those between are workers. Needs
root, `ip`, curl, nginx, openssl and redis-server.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from benchmarks.comm import netns
from pykernels.serve import manifests
from pykernels.serve.environment import ENVIRONMENT
from pykernels.serve.service import Options

__all__ = ["DASHBOARD", "Cluster", "cluster", "unusable"]

PORT, GRPC_PORT, REDIS, HEAD, DASHBOARD = 8000, 8001, 7000, 6380, 8265
PATIENCE = 300.0  # seconds for anything to happen on a busy machine


def unusable() -> str | None:
    """Why there can be no cluster here; None if there can."""
    missing = [tool for tool in ("curl", "nginx", "openssl", "redis-server") if shutil.which(tool) is None]
    return f"{', '.join(missing)} not installed" if missing else netns.unusable()


def wait(until: Callable[[], bool], what: str, seconds: float = PATIENCE) -> float:
    """Seconds until it is so.

    Raises:
        TimeoutError: it is not.
    """
    begin = time.monotonic()
    while not until():
        if time.monotonic() - begin > seconds:
            raise TimeoutError(f"{what}: not within {seconds:.0f} seconds")
        time.sleep(0.1)
    return time.monotonic() - begin


class Cluster:
    """Hosts by number; what runs on them.

    Args:
        hosts: names of the namespaces.
        folder: for configurations and logs.
        cores: of each worker.
    """

    def __init__(self, hosts: Sequence[str], folder: pathlib.Path, cores: int) -> None:
        self.hosts, self.folder, self.cores = hosts, folder, cores
        self.workers = range(1, len(hosts) - 1)
        self.edge = len(hosts) - 1
        self.certificate = folder / "nginx/certs/server.crt"
        self.token = secrets.token_hex(32)
        path = os.pathsep.join([str(pathlib.Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": path,
            "RAY_REDIS_ADDRESS": f"{self.address(self.edge)}:{REDIS}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
        }
        self._started: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def address(host: int) -> str:
        return f"{netns.NETWORK}.{host + 1}"

    def start(self, host: int, *command: str, directory: pathlib.Path | None = None) -> subprocess.Popen[bytes]:
        """A command on a host, which lives until the cluster's end; it sees no processes but its own."""
        log = (self.folder / f"host{host}.log").open("ab")
        alone = ["unshare", "--pid", "--fork", "--mount-proc"]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.hosts[host], *alone, *command],
            env=self.environment,
            cwd=directory,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        self._started.append(process)
        return process

    def said(self, host: int, text: str) -> bool:
        """Whether something that was started on a host has printed this."""
        return text in (self.folder / f"host{host}.log").read_text(errors="replace")

    def run(self, host: int, *command: str) -> str:
        """What a command printed on a host."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.hosts[host], *command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def processes(self, host: int, name: str = "") -> list[int]:
        """Of a host, those whose command line holds `name`."""
        found = []
        for pid in self.run(host, "ip", "netns", "pids", self.hosts[host]).split():
            with contextlib.suppress(OSError):
                if name.encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found

    def replicas(self) -> list[int]:
        return [pid for host in self.workers for pid in self.processes(host, "ray::ServeReplica:pykernels")]

    def lose(self, host: int) -> None:
        """A host loses its power."""
        while found := self.processes(host):
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def head(self) -> None:
        """Start Ray's head."""
        self.start(
            0, sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats",
            f"--node-ip-address={self.address(0)}", f"--port={HEAD}", "--num-cpus=0", "--dashboard-host=0.0.0.0",
            f"--dashboard-port={DASHBOARD}", "--object-store-memory=100000000",
        )  # fmt: skip

    def worker(self, host: int) -> None:
        """Start Ray on a worker."""
        self.start(
            host, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            f"--address={self.address(0)}:{HEAD}", f"--node-ip-address={self.address(host)}",
            f"--num-cpus={self.cores}", "--object-store-memory=100000000",
        )  # fmt: skip

    def deploy(self, options: Options, replicas: int) -> None:
        """What ``serve deploy serve.yaml`` does, with the file that `pykernels serve --write-config` writes."""
        manifests.write(self.folder, options, replicas, PORT, GRPC_PORT)
        self.run(
            0, sys.executable, "-m", "ray.serve.scripts", "deploy", str(self.folder / "serve.yaml"),
            "-a", f"http://{self.address(0)}:{DASHBOARD}",
        )  # fmt: skip

    def answers(self, host: int, port: int = PORT, path: str = "v2/health/ready") -> bool:
        """Whether a host answers: by default, whether a worker's proxy finds a replica that is ready."""
        url = f"http://{self.address(host)}:{port}/{path}"
        command = ["curl", "-sf", "-m", "5", "-o", "/dev/null", "-H", f"Authorization: Bearer {self.token}", url]
        return not subprocess.run(["ip", "netns", "exec", self.hosts[self.edge], *command]).returncode

    def nginx(self, options: Options) -> None:
        """Start nginx, as `pykernels serve --write-config` configures it, in front of the workers."""
        place = self.folder / "nginx"
        (place / "certs").mkdir(parents=True)
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
             "-keyout", place / "certs/server.key", "-out", self.certificate],
            check=True, capture_output=True,
        )  # fmt: skip
        nodes = [self.address(host) for host in self.workers]
        (place / "nginx.conf").write_text(manifests.nginx(options, nodes, PORT, GRPC_PORT))
        self.start(self.edge, "nginx", "-p", str(place), "-c", str(place / "nginx.conf"), "-g", "daemon off;")

    def end(self) -> None:
        for host in range(len(self.hosts)):
            self.lose(host)
        for process in self._started:
            process.wait()


@contextlib.contextmanager
def cluster(folder: pathlib.Path, options: Options, workers: int = 2, cores: int = 1) -> Iterator[Cluster]:
    """A cluster that serves: a replica of ``options.threads`` cores on each worker.

    Raises:
        RuntimeError, TimeoutError: it does not start.
    """
    with netns.namespaces(workers + 2) as hosts:
        made = Cluster(hosts, folder, cores)
        try:
            made.start(made.edge, "redis-server", "--port", str(REDIS), "--bind", "0.0.0.0", "--protected-mode", "no",
                       "--save", "", directory=folder)  # fmt: skip
            made.head()
            wait(lambda: made.answers(0, DASHBOARD, "api/version"), "Ray's head")
            for host in made.workers:  # one after the other: Ray gives a node's start half a minute
                made.worker(host)
                wait(lambda host=host: made.said(host, "Ray runtime started"), f"worker {host}")  # type: ignore[misc]
            made.deploy(options, workers)
            wait(lambda: all(made.answers(host) for host in made.workers), "replicas")
            made.nginx(options)
            yield made
        finally:
            made.end()
