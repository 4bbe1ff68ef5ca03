"""A network that is ready to serve: mapped, checked, its calls timed by batch size."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from pykernels.cuda import graphs
from pykernels.optimized import load
from pykernels.serve.batching import Counts, Queue
from pykernels.serve.costs import Costs, sizes
from pykernels.serve.files import Files
from pykernels.serve.linked import Linked
from pykernels.serve.runner import Runner
from pykernels.serve.signature import Network, Request, Signature, examples
from pykernels.tune.instances import check
from pykernels.tune.on_device import OnDevice, calls_to_warm_up, from_host

__all__ = ["UNTRIED", "Limits", "Model", "ready", "try_batches"]

SLICE, CALLS = 0.02, 30  # each size is timed for so many seconds on each instance, once at least, and so often at most
UNTRIED = "its batches have not been tried yet"
PATIENCE = 600.0  # seconds for one size: whoever takes longer hangs


@dataclass(frozen=True)
class Limits:
    """How the requests of a model are treated.

    Attributes:
        batch: the most rows of one call.
        queue: how many requests may wait.
        target: seconds in which answers are wanted; None where nobody said.
        threads: of each part of a network that is split.
        device: where networks run.
        batch_error: how far an answer to a batch may be from that to its rows, in parts of the largest value; 0 wants
            the same bits.
    """

    batch: int = 16
    queue: int = 256
    target: float | None = None
    threads: int = 1
    device: str = "cpu"
    batch_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Model:
    """A network and what is known of it.

    Attributes:
        name, version: what clients call it.
        network: on the CPU, mapped; on a CUDA device; or a pipeline of processes.
        signature: its inputs and outputs.
        queue: the requests that wait for it, and what its calls cost.
        apart: why its requests are not put together; None where they are.
        bytes: of its files; on a CUDA device, of its weights there.
    """

    name: str
    version: int
    network: Network
    signature: Signature
    queue: Queue
    apart: str | None
    bytes: int

    @property
    def lost(self) -> bool:
        """Whether its processes are gone for good."""
        return isinstance(self.network, Linked) and self.network.lost

    def close(self) -> None:
        """End its processes, if it has any, when all that was asked is answered."""
        if isinstance(self.network, Linked):
            self.network.close()

    def request(self, given: Mapping[str, torch.Tensor]) -> Request:
        """Inputs by name as a request for the queue.

        Raises:
            Invalid: they do not fit; the message names the input.
        """
        request = self.signature.request(given)
        if self.apart is None:
            return request
        return request._replace(rows=None, key=tuple(tuple(x.shape) for x in request.inputs))


async def ready(
    name: str, version: int, files: Files, runner: Runner, limits: Limits, counts: Counts, tried: bool = True
) -> Model:
    """Map a network, or bring it to its device, or start the processes of its parts; check that it can be served, and
    make it ready on every instance: for every batch size (`try_batches`), or for single rows alone, with requests that
    stay apart, where it is not to be `tried`. On a CUDA device its graphs have been captured then.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no network of ours, its calls write into something, or its inputs or outputs are no tensors.
        RuntimeError: the device cannot be used.
        PartError: a part cannot be started.
    """
    network = await asyncio.to_thread(_load, files.path, limits)
    runner = network.runner if isinstance(network, Linked) else runner
    signature = await asyncio.wrap_future(runner.submit(Signature.of, network))
    apart, costs = await _measure(network, signature, runner, limits.batch if tried else 0, limits.batch_error)
    queue = Queue(network, costs, limits.queue, limits.target, runner, counts)
    held = network.bytes if isinstance(network, OnDevice) else files.bytes
    return Model(name, version, network, signature, queue, apart, held)


async def try_batches(model: Model, limits: Limits) -> Model:
    """The same model, its plans ready for every batch size, with a queue that puts requests together.

    That happens only where a batch gave the bits that its rows gave one by one, for random inputs of each size, or what
    is as close as `limits` ask: parts of a network that are left to torch need not, and a network may look at its whole
    batch.
    """
    runner = model.queue.runner
    apart, costs = await _measure(model.network, model.signature, runner, limits.batch, limits.batch_error)
    old = model.queue
    queue = Queue(model.network, costs, limits.queue, limits.target, runner, old.counts)
    return replace(model, queue=queue, apart=apart)


def _load(path: Path, limits: Limits) -> Network:
    if path.is_dir():
        return Linked(path, limits.threads, limits.device)
    network = load(path, limits.device)
    check(network)
    return from_host(network)


async def _measure(
    network: Network, signature: Signature, runner: Runner, most: int, error: float
) -> tuple[str | None, Costs]:
    """Why requests must stay apart, if they must, and seconds a call by batch size, up to `most`; 0 tries nothing."""
    if not signature.batched:
        seconds, _ = await _timed(network, examples(network, ones=signature.ones), runner)
        return "its batch size is not free", Costs({1: seconds})
    if any(spec.shape[:1] != (-1,) for spec in signature.outputs):
        seconds, _ = await _timed(network, examples(network, 1, ones=signature.ones), runner)
        return "an output does not have the batch's rows", Costs({1: seconds})
    if not most:
        seconds, _ = await _timed(network, examples(network, 1, ones=signature.ones), runner)
        return UNTRIED, Costs({1: seconds})
    rows = await asyncio.to_thread(examples, network, max(most, 2), ones=signature.ones)
    single: list[list[torch.Tensor]] = []
    costs: dict[int, float] = {}
    for size in sizes(max(most, 2)):  # where single rows are wanted, larger requests are cut
        seconds, answers = await _timed(network, [x[:size].contiguous() for x in rows], runner)
        costs[size] = seconds
        while len(single) < size:
            row = [x[len(single) : len(single) + 1].contiguous() for x in rows]
            single.append(await asyncio.wrap_future(runner.submit(_call, network, row)))
        if not await asyncio.to_thread(_joined, answers, single[:size], error):
            fault = "does not give the bits" if not error else f"is more than {error:g} of its largest value off those"
            return f"a batch of {size} {fault} of its rows one by one", Costs({1: costs[1]})
    return None, Costs({size: seconds for size, seconds in costs.items() if size <= most})


async def _timed(
    network: Network, inputs: Sequence[torch.Tensor], runner: Runner
) -> tuple[float, list[list[torch.Tensor]]]:
    """Seconds of a call while all instances run one (the median of the instances' quickest ones), and their answers."""
    together = threading.Barrier(runner.at_once)
    warm_up = graphs.PATIENCE if isinstance(network, Linked) and network.gpus else calls_to_warm_up(network)

    def one() -> tuple[float, list[torch.Tensor]]:
        try:
            together.wait(PATIENCE)
            for _ in range(warm_up - 1):
                _call(network, inputs)
            begin = time.perf_counter()
            answer = _call(network, inputs)  # the plans are made ready, which is next to nothing in a long call
            times = [time.perf_counter() - begin]
            together.wait(PATIENCE)
            while sum(times) < SLICE and len(times) < CALLS:
                begin = time.perf_counter()
                _call(network, inputs)
                times.append(time.perf_counter() - begin)
        except BaseException:
            together.abort()  # or the others would wait for this one
            raise
        return min(times), answer

    # Queued at once, so that no other call stands between them.
    calls = [asyncio.wrap_future(runner.submit(one)) for _ in range(runner.at_once)]
    done = await asyncio.gather(*calls, return_exceptions=True)
    errors = [found for found in done if isinstance(found, BaseException)]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    found = [pair for pair in done if not isinstance(pair, BaseException)]
    return statistics.median(seconds for seconds, _ in found), [answer for _, answer in found]


def _call(network: Network, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    args, kwargs = network.nested(inputs)
    return pytree.tree_leaves(network(*args, **kwargs))


def _joined(answers: Sequence[Sequence[torch.Tensor]], single: Sequence[Sequence[torch.Tensor]], error: float) -> bool:
    """Whether each of the answers to a batch is that to its rows one by one."""
    expected = [torch.cat(ys) for ys in zip(*single, strict=True)]
    return all(
        y.shape == e.shape and (_same(y, e) or _close(y, e, error))
        for answer in answers
        for y, e in zip(answer, expected, strict=True)
    )


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bit for bit: NaN is NaN."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def _close(x: torch.Tensor, y: torch.Tensor, error: float) -> bool:
    """Floats whose greatest difference is at most so much of the largest value; nothing is close to a NaN."""
    if not error or not x.is_floating_point():
        return False
    return bool((x.double() - y.double()).abs().max() <= error * y.double().abs().max())
