"""A service: networks, threads and bounds, whatever protocol asks."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch

from pykernels.cuda import registry
from pykernels.serve.batching import Scheduler
from pykernels.serve.budget import Budget
from pykernels.serve.errors import Denied, Invalid, Refused
from pykernels.serve.files import source_of
from pykernels.serve.model import Limits, Model
from pykernels.serve.repository import Repository
from pykernels.serve.runner import Runner
from pykernels.tune import Setup, Workers
from pykernels.tune.setup import DEVICE

__all__ = ["Options", "Service", "Token", "on_a_gpu"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What is served, and how.

    Attributes:
        models: a folder of ``name/version/net.pk``, or files by name; in place of a file, a folder of parts.
        threads, instances: threads of one call; calls at once in one process. Each thread has a core of its own.
        parts: how many the network that is split most has. Each is a process of `threads` threads.
        batch: the most rows of one call.
        p99_ms: milliseconds in which answers are wanted; requests wait for each other no longer. None where clients'
            own time limits are all there is.
        queue: how many requests of a model may wait; more are refused.
        request_bytes: the most of one request, decompressed.
        memory_bytes: the most of all requests that are being read or answered.
        mapped_bytes: the most of the files that are mapped, or of the weights on a CUDA device.
        device: where networks run: ``cpu``, ``cuda``, or in one process ``cuda:N``.
        gpus: how much of one a process takes on Ray, where `device` is ``cuda``; less than 1 where several share it.
        batch_error: how far an answer to a batch may be from those to its rows, in parts of the largest value; 0 wants
            the same bits.
        refresh: seconds between two looks into the folder.
        token_file: holds the token that every request but those for health must bring; None for no token.
        control: whether clients may load and unload models.
        jobs: address of the Redis that holds jobs, ``redis://HOST:PORT/NUMBER``; None for no jobs.

    Raises:
        ValueError: a number is out of range.
    """

    models: str | Mapping[str, str]
    threads: int = 1
    instances: int = 1
    parts: int = 1
    batch: int = 16
    p99_ms: float | None = None
    queue: int = 256
    request_bytes: int = 1 << 26
    memory_bytes: int = 1 << 30
    mapped_bytes: int = 1 << 34
    device: str = "cpu"
    gpus: float = 1.0
    batch_error: float = 0.0
    refresh: float = 5.0
    token_file: str | None = None
    control: bool = False
    jobs: str | None = None

    def __post_init__(self) -> None:
        counts = ("threads", "instances", "parts", "batch", "queue")
        for name in (*counts, "request_bytes", "memory_bytes", "mapped_bytes"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 1 << 62:
                raise ValueError(f"{name}: must be a whole number of at least 1, not {value!r}")
        for name in ("p99_ms", "refresh"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: must be a finite number above 0, not {value!r}")
        if not isinstance(self.device, str) or DEVICE.fullmatch(self.device) is None:
            raise ValueError(f"device: must be cpu, cuda or cuda:N, not {self.device!r:.80}")
        on_a_gpu(self.gpus)
        if not 0 <= self.batch_error < 1:
            raise ValueError(f"batch_error: must be at least 0, and less than 1, not {self.batch_error!r}")
        if self.jobs is not None:
            address = urlsplit(self.jobs)
            if address.scheme not in ("redis", "rediss") or not address.hostname:
                raise ValueError(f"jobs: must be redis://HOST:PORT/NUMBER, not {self.jobs!r:.80}")
        if not self.models:
            raise ValueError("models: there are none")

    @property
    def cores(self) -> int:
        """How many one process, with those of the parts, is given."""
        return self.threads * max(self.instances, self.parts)


def on_a_gpu(gpus: float) -> int:
    """How many processes that take so much of a GPU share one.

    Raises:
        ValueError: it is not above 0, or more than 1.
    """
    if not 0 < gpus <= 1:
        raise ValueError(f"gpus: must be above 0, and at most 1, not {gpus!r}")
    return int(1 / gpus + 1e-9)  # three of 1 / 3


class Token:
    """What clients must bring.

    Args:
        path: of a file that holds it, blanks at the ends aside; None for no token.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is empty, or holds what no header can.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._expected: bytes | None = None
        if path is not None:
            token = Path(path).read_bytes().strip()
            if not token or not all(33 <= byte < 127 for byte in token):
                raise ValueError(f"token_file: {path} must hold one word of ASCII")
            self._expected = b"Bearer " + token

    def check(self, authorization: bytes | None) -> None:
        """Whether a request's authorization is right.

        Raises:
            Denied: it is not; the time that this takes does not tell by how much.
        """
        if self._expected is not None and not hmac.compare_digest(authorization or b"", self._expected):
            raise Denied("the request needs the header 'Authorization: Bearer' with this service's token")


class Service:
    """Networks that answer requests. Made, started, used and closed on one event loop, whose thread, as every new one
    of this process, is left with one of torch's threads.

    Args:
        options: what is served, and how.

    Raises:
        OSError: the token's file cannot be read.
        ValueError: there are not so many cores, the device cannot be used, or the token is none.
    """

    def __init__(self, options: Options) -> None:
        complaint = registry.unusable(torch.device(options.device))
        if complaint is not None:
            raise ValueError(f"device: {options.device} cannot be used: {complaint}")
        self.options = options
        self.token = Token(options.token_file)
        self.budget = Budget(options.request_bytes, options.memory_bytes)
        # The event loop copies a little here and there; OpenMP's threads would take cores from the instances for that.
        torch.set_num_threads(1)
        self.workers = Workers(Setup(options.threads, options.instances, options.batch))
        self.runner = Runner(self.workers, options.instances)
        self.scheduler = Scheduler()
        target = None if options.p99_ms is None else options.p99_ms / 1e3
        self.repository = Repository(
            source_of(options.models),
            self.runner,
            Limits(options.batch, options.queue, target, options.threads, options.device, options.batch_error),
            options.mapped_bytes,
        )
        self.started = False
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Map the networks and make them ready.

        Raises:
            ValueError: there is none, or one that was named cannot be served.
            FileNotFoundError: a file that was named is not there.
        """
        await self.repository.start()
        self._watch = asyncio.create_task(self.repository.watch(self.options.refresh))
        self.started = True

    async def close(self) -> None:
        """Refuse what comes, answer what is there, end the threads."""
        await self.scheduler.drain()
        await self.repository.close()
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await asyncio.to_thread(self.workers.close)

    @property
    def live(self) -> bool:
        """Whether it can answer at all; if not, it must be started again."""
        return self.runner.death is None

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.started and self.live and not self.scheduler.stopping

    async def infer(
        self, model: Model, inputs: Mapping[str, torch.Tensor], seconds: float = math.inf
    ) -> dict[str, torch.Tensor]:
        """A network's answer by names of outputs.

        Args:
            inputs: by name.
            seconds: after which nobody wants the answer any more.

        Raises:
            Refused: in one of its kinds; the message names the input that is wrong.
        """
        request = model.request(inputs)
        try:
            outputs = await self.scheduler.answer(model.queue, request, time.monotonic() + seconds)
        except Refused:
            raise
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            text = str(error).partition("\n")[0]
            raise Invalid(f"model {model.name!r} cannot compute these inputs: {text:.500}") from error
        return {spec.name: y for spec, y in zip(model.signature.outputs, outputs, strict=True)}
