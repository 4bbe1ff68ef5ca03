"""Runs a function on several ranks at once: processes of this machine, joined by gloo.

Ranks are forked from a process that has imported what they need (multiprocessing's fork server) and does nothing else,
so each is as new as a program that has just begun, without the seconds that importing takes.
"""

from __future__ import annotations

import datetime
import pathlib
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

TIMEOUT = 120.0  # seconds, for the collectives and for all of it
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "torch.distributed.tensor.parallel", "pykernels.comm", "pykernels.parallel"])


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=datetime.timedelta(seconds=TIMEOUT)
    )
    try:
        answer: tuple[bool, Any] = True, function(rank, *args)
    except BaseException:
        answer = False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    (pathlib.Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(answer))


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """``function(rank, *args)`` on each of `world` ranks; what they returned, by rank.

    `function` stands at the top level of a module; what it returns is pickled.

    Raises:
        AssertionError: a rank raised (its traceback is the message), or died, or did not end in time.
    """
    found: dict[int, tuple[bool, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_rank, args=(rank, world, folder, function, args)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT)
        for process in processes:
            process.kill()
        for rank in range(world):
            if (file := pathlib.Path(folder) / f"{rank}.pkl").exists():
                found[rank] = pickle.loads(file.read_bytes())
    silent = False, "no answer: it died, or did not end in time"
    answers = [found.get(rank, silent) for rank in range(world)]
    bad = "\n".join(f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good)
    assert not bad, bad
    return [found[rank][1] for rank in range(world)]


def alike(x: torch.Tensor) -> bool:
    """On a rank: whether all hold the same bits."""
    everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, x.contiguous())
    return all(torch.equal(x, other) for other in everyone)


def error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative, of all elements together."""
    return float((found - true).norm() / true.norm())
