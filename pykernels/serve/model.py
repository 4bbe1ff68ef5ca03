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

from pykernels.optimize import load
from pykernels.serve.batching import Counts, Queue
from pykernels.serve.costs import Costs, sizes
from pykernels.serve.files import Files
from pykernels.serve.linked import Linked
from pykernels.serve.runner import Runner
from pykernels.serve.signature import Network, Request, Signature, examples
from pykernels.tune.instances import check

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
    """

    batch: int = 16
    queue: int = 256
    target: float | None = None
    threads: int = 1


@dataclass(frozen=True, eq=False)
class Model:
    """A network and what is known of it.

    Attributes:
        name, version: what clients call it.
        network: on the CPU, mapped; or a pipeline of processes.
        signature: its inputs and outputs.
        queue: the requests that wait for it, and what its calls cost.
        apart: why its requests are not put together; None where they are.
        bytes: of its files.
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
    """Map a network, or start the processes of its parts, check that it can be served, and make its plans ready on
    every instance: for every batch size (`try_batches`), or for single rows alone, with requests that stay apart, where
    it is not to be `tried`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no network of ours, its calls write into something, or its inputs or outputs are no tensors.
        PartError: a part cannot be started.
    """
    network = await asyncio.to_thread(_load, files.path, limits.threads)
    runner = network.runner if isinstance(network, Linked) else runner
    signature = await asyncio.wrap_future(runner.submit(Signature.of, network))
    apart, costs = await _measure(network, signature, runner, limits.batch if tried else 0)
    queue = Queue(network, costs, limits.queue, limits.target, runner, counts)
    return Model(name, version, network, signature, queue, apart, files.bytes)


async def try_batches(model: Model, limits: Limits) -> Model:
    """The same model, its plans ready for every batch size, with a queue that puts requests together.

    That happens only where a batch gave the bits that its rows gave one by one, for random inputs of each size: parts
    of a network that are left to torch need not, and a network may look at its whole batch.
    """
    apart, costs = await _measure(model.network, model.signature, model.queue.runner, limits.batch)
    old = model.queue
    queue = Queue(model.network, costs, limits.queue, limits.target, old.runner, old.counts)
    return replace(model, queue=queue, apart=apart)


def _load(path: Path, threads: int) -> Network:
    if path.is_dir():
        return Linked(path, threads)
    network = load(path)
    check(network)
    return network


async def _measure(network: Network, signature: Signature, runner: Runner, most: int) -> tuple[str | None, Costs]:
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
        if not await asyncio.to_thread(_joined, answers, single[:size]):
            return f"a batch of {size} does not give the bits of its rows one by one", Costs({1: costs[1]})
    return None, Costs({size: seconds for size, seconds in costs.items() if size <= most})


async def _timed(
    network: Network, inputs: Sequence[torch.Tensor], runner: Runner
) -> tuple[float, list[list[torch.Tensor]]]:
    """Seconds of a call while all instances run one (the median of the instances' quickest ones), and their answers."""
    together = threading.Barrier(runner.at_once)

    def one() -> tuple[float, list[torch.Tensor]]:
        try:
            together.wait(PATIENCE)
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


def _joined(answers: Sequence[Sequence[torch.Tensor]], single: Sequence[Sequence[torch.Tensor]]) -> bool:
    """Whether each of the answers to a batch is that to its rows one by one."""
    expected = [torch.cat(ys) for ys in zip(*single, strict=True)]
    return all(y.shape == e.shape and _same(y, e) for answer in answers for y, e in zip(answer, expected, strict=True))


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Bit for bit: NaN is NaN."""
    return torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
