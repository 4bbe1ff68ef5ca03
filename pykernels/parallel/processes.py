"""The processes of a network's parts on this machine: started, looked after, started anew, ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from pykernels.cuda import registry
from pykernels.parallel.link import KEY
from pykernels.tune.cores import usable
from pykernels.tune.setup import DEVICE

__all__ = ["Processes", "checked_device"]


class Processes:
    """A process for each part, and what joins them: sockets in a folder of their own, and a key.

    Args:
        files: of the parts. They stay open, so that a part which is started anew gets the file that was there.
        threads: torch's, of each part; without, the cores shared out.
        silence: seconds after which a link is given up.
        devices: of each part where it runs; all on the CPU without.

    Attributes:
        first, answers: where the first part listens, and where the last one's answers go.
        key: of their links.
        running: the processes; none before `start`.

    Raises:
        ValueError: an argument is none that can be, or a device cannot be used.
        OSError: a file cannot be read.
    """

    def __init__(
        self, files: Sequence[Path], threads: int | None, silence: float, devices: Sequence[str] | None
    ) -> None:
        count = len(files)
        threads = max(1, usable().count // count) if threads is None else threads
        if type(threads) is not int or threads < 1:
            raise ValueError(f"threads: must be a whole number of at least 1, not {threads!r}")
        where = ["cpu"] * count if devices is None else devices
        if isinstance(where, str) or len(where) != count:
            raise ValueError(f"devices: one for each of the {count} parts is needed, not {where!r}")
        where = [checked_device("devices", device) for device in where]
        self.key, self.running = secrets.token_bytes(32), list[subprocess.Popen[bytes]]()
        self._environment = {**os.environ, KEY: self.key.hex()}
        with contextlib.ExitStack() as opened:
            folder = opened.enter_context(tempfile.TemporaryDirectory(prefix="pykernels-"))
            self._files = [opened.enter_context(open(file, "rb")) for file in files]
            self._opened = opened.pop_all()
        places = [str(Path(folder) / str(number)) for number in range(count + 1)]
        self.first, self.answers = places[0], places[-1]
        self._commands = [
            [
                *("--listen", here, "--next", following, "--threads", str(threads)),
                *("--silence", str(silence), "--device", device, "--with-parent"),
            ]
            for (here, following), device in zip(itertools.pairwise(places), where, strict=True)
        ]

    def start(self) -> None:
        for number in range(1, len(self._commands) + 1):
            self.running.append(self._start(number))

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        file = self._files[number - 1].fileno()
        command = [sys.executable, "-m", "pykernels.parallel.part", f"/dev/fd/{file}", *self._commands[number - 1]]
        return subprocess.Popen(command, env=self._environment, stdin=subprocess.PIPE, pass_fds=[file])

    def dead(self) -> dict[int, str]:
        """The parts that have ended, and how."""
        found = {}
        for number, process in enumerate(self.running, 1):
            if (code := process.poll()) is not None:
                found[number] = f"by signal {-code}" if code < 0 else f"with exit status {code}"
        return found

    def restart(self, number: int) -> None:
        self.end(self.running[number - 1])
        self.running[number - 1] = self._start(number)

    def end(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        process.wait()
        if process.stdin is not None:
            process.stdin.close()

    def close(self) -> None:
        """May be called again."""
        for process in self.running:
            self.end(process)
        self._opened.close()


def checked_device(argument: str, device: str) -> str:
    """Where a part runs.

    Raises:
        ValueError: it is no device, or one that cannot be used here; the message names the argument.
    """
    if not isinstance(device, str) or DEVICE.fullmatch(device) is None:
        raise ValueError(f"{argument}: must be cpu, cuda, cuda:0, cuda:1 ..., not {device!r:.80}")
    complaint = registry.unusable(torch.device(device))
    if complaint is not None:
        raise ValueError(f"{argument}: {device} cannot be used: {complaint}")
    return device
