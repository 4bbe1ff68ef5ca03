"""`tune`: how a network is best run on this machine, by timing it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils import _pytree as pytree

import pykernels
from pykernels.optimize import inputs_of_call
from pykernels.optimized import Optimized
from pykernels.tune.cores import cpu_name, usable
from pykernels.tune.instances import Instances, check
from pykernels.tune.on_device import calls_to_warm_up, copy_on, from_host
from pykernels.tune.search import Candidate, Measure, Sample, candidates, search
from pykernels.tune.setup import DEVICE, Setup

__all__ = ["space", "tune"]

BATCHES = (1, 2, 4, 8, 16, 32)
BATCHES_ON_CUDA = (*BATCHES, 64, 128)
Call = tuple[tuple[Any, ...], dict[str, Any]]


def tune(
    network: Optimized,
    inputs: tuple[Any, ...] | torch.Tensor | Mapping[str, Any],
    latency_ms: float | None = None,
    seconds: float = 30.0,
    batches: Sequence[int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    devices: Sequence[str] | None = None,
) -> Setup:
    """Find how many threads, instances and items a call serve this network best here, and where, by timing it.

    Without `latency_ms` the latency of one call with these inputs is minimized, over the number of threads. With it,
    items a second are maximized over threads, instances and batch, among setups whose p99 latency keeps the bound.
    Latency is that of a call to `Instances` while all instances are busy and nothing waits; how long calls queue is up
    to who sends them. Candidates are measured in turn, and the worse half is dropped again and again
    (`pykernels.tune.search`). On a CUDA device a call has one thread, begins with inputs in the host's memory and ends
    with answers there.

    Args:
        network: on devices where it is not, a copy is measured. It is not changed; `Optimized.tune`, which cuts its
            layers, is something else.
        inputs: of one call: positional ones, a lone tensor, or a dictionary of keyword inputs.
        latency_ms: bound of the p99 latency, in milliseconds.
        seconds: about how long it may take; one measurement more at most.
        batches: sizes to try, by default 1, 2, 4 ... 32 (on a CUDA device 128) where the network's batch size is free
            and a bound is given; else the size of the inputs. The inputs are repeated, or cut.
        kwargs: keyword inputs of the call beside positional ones.
        progress: called as ``progress(stage, done, total)``, in seconds.
        devices: which to try, of ``cpu``, ``cuda``, ``cuda:1`` ...; the one that the network is on without.

    Raises:
        TypeError: `network` is no `Optimized` network.
        ValueError: its calls write into something; `inputs` do not fit; `latency_ms` or `seconds` is not above 0;
            `batches` are no sizes, or the batch size is not free; `devices` are none, or one cannot be used.
        NoSetup: (a ValueError) no setup keeps the bound; the message names the best p99 that was reached.
    """
    for name, value in (("latency_ms", latency_ms), ("seconds", seconds)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name}: must be a finite number above 0, not {value!r}")
    wanted, measure = space(network, inputs, batches, kwargs, several=latency_ms is not None, devices=devices)
    trials = search(wanted, measure, latency_ms, seconds, progress=progress)
    best = trials[0]
    return Setup(
        threads=best.threads,
        instances=best.instances,
        batch=best.batch,
        device=best.device,
        bound_ms=latency_ms,
        latency_ms=best.latency_ms,
        p99_ms=best.p99_ms,
        items_per_second=best.items_per_second,
        calls=best.calls,
        cpu=cpu_name(),
        cores=usable().count,
        isa=torch.ops.pykernels._isa(),
        gpu=next((torch.cuda.get_device_name(c.device) for c in wanted if c.device != "cpu"), None),
        version=pykernels.__version__,
        tried=tuple(trials),
        untried=len(wanted) - len(trials),
    )


def space(
    network: Optimized,
    inputs: tuple[Any, ...] | torch.Tensor | Mapping[str, Any],
    batches: Sequence[int] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    several: bool = True,
    devices: Sequence[str] | None = None,
) -> tuple[list[Candidate], Measure]:
    """The setups of a network here, and what measures one; `several`: also those of several instances and batches.

    The other arguments and the errors are `tune`'s.
    """
    check(network)
    args, kwargs = inputs_of_call(inputs, kwargs)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    leaves = [leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    own = _batch(network, leaves)
    networks = _networks(network, devices)
    wanted: list[Candidate] = []
    calls: dict[int, Call] = {}
    for device in sorted(networks, reverse=True):  # a GPU's setups are few: they do not wait until the time is over
        sizes = _sizes(own, batches, several, BATCHES if device == "cpu" else BATCHES_ON_CUDA)
        wanted += candidates(usable().count, sizes, several, device)
        for size in sizes:
            given = [_resized(x, size) if 0 in free else x for x, free in zip(leaves, network.free, strict=True)]
            calls[size] = pytree.tree_unflatten(leaves if size == (own or 1) else given, spec)
        args, kwargs = calls[sizes[0]]
        with torch.no_grad():
            from_host(networks[device])(*args, **kwargs)  # what is wrong with the inputs is said by the network
    return wanted, _measure(networks, calls)


def _networks(network: Optimized, devices: Sequence[str] | None) -> dict[str, Optimized]:
    """The network on each device."""
    names = [network.report().device] if devices is None else list(devices)
    if isinstance(devices, str) or not names or not all(isinstance(n, str) and DEVICE.fullmatch(n) for n in names):
        raise ValueError(f"devices: must be some of cpu, cuda, cuda:0, cuda:1 ..., not {devices!r}")
    try:
        return {name: copy_on(network, name) for name in names}
    except ValueError as error:
        raise ValueError(f"devices: {str(error).removeprefix('device: ')}") from None


def _batch(network: Optimized, leaves: Sequence[Any]) -> int | None:
    """The size of dimension 0 of the inputs in which it is free; None where it is so in none."""
    if len(leaves) != len(network.free):
        raise ValueError(f"inputs: the network has {len(network.free)} flat inputs, {len(leaves)} are given")
    found = set()
    for i, (leaf, free) in enumerate(zip(leaves, network.free, strict=True)):
        if 0 in free:
            if not isinstance(leaf, torch.Tensor) or leaf.dim() == 0 or leaf.shape[0] == 0:
                raise ValueError(f"inputs: flat input {i} must be a tensor of one item or more")
            found.add(leaf.shape[0])
    if len(found) > 1:
        raise ValueError(f"inputs: their batch sizes differ: {sorted(found)}")
    return found.pop() if found else None


def _sizes(own: int | None, batches: Sequence[int] | None, several: bool, usual: Sequence[int]) -> list[int]:
    if batches is None:
        return list(usual) if own is not None and several else [own or 1]
    sizes = sorted(set(batches))
    if not sizes or any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"batches: must be whole numbers of at least 1, not {list(batches)}")
    if own is None and sizes != [1]:
        raise ValueError("batches: the network's batch size is not free")
    return sizes


def _resized(x: torch.Tensor, size: int) -> torch.Tensor:
    """The items of `x`, again from the first after the last, laid out in memory as `x` is."""
    taken = x[torch.arange(size) % x.shape[0]]
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return taken.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _measure(networks: Mapping[str, Optimized], calls: Mapping[int, Call]) -> Measure:
    def measure(candidate: Candidate, seconds: float) -> Sample:
        args, kwargs = calls[candidate.batch]
        network = networks[candidate.device]
        setup = Setup(candidate.threads, candidate.instances, candidate.batch)  # where the network is
        before_all = calls_to_warm_up(network) + 1
        with Instances(network, setup) as instances, ThreadPoolExecutor(candidate.instances) as clients:
            together = threading.Barrier(candidate.instances)

            def client() -> tuple[float, float, list[float]]:
                """When it began and ended, and what each call took."""
                try:
                    together.wait()
                    for _ in range(before_all):  # threads start, plans are made ready, weights come into the caches
                        instances(*args, **kwargs)
                    together.wait()
                except BaseException:
                    together.abort()  # or the others would wait for this one
                    raise
                begin = now = time.perf_counter()
                taken: list[float] = []
                while not taken or now - begin < seconds:
                    before = now
                    instances(*args, **kwargs)
                    now = time.perf_counter()
                    taken.append(now - before)
                return begin, now, taken

            futures = [clients.submit(client) for _ in range(candidate.instances)]
            errors = [error for future in futures if (error := future.exception()) is not None]
            if errors:  # the first that is not the others' waiting in vain
                raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
            answers = [future.result() for future in futures]
        # Each client's own rate: they do not end at the same moment.
        rate = sum(len(taken) * candidate.batch / (end - begin) for begin, end, taken in answers)
        return Sample(tuple(t for _, _, taken in answers for t in taken), rate)

    return measure
