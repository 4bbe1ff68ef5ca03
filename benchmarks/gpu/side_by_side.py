"""Work that runs side by side, each share in a process of its own, and is told of as it goes.

A process that dies, or whose device does, takes no other with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

__all__ = ["Findings", "News", "Share", "Skipped", "run", "share_of"]

Findings = Iterator[tuple[str, str | None]]  # of a check: what was looked at, and what is wrong or None
T = TypeVar("T")


class Skipped(Exception):
    """There is nothing to do here, and why."""


@dataclass(frozen=True)
class Share:
    """A share of a part: `work` is called with its number and with how many there are. It can be pickled, and so can
    what it yields."""

    part: str
    work: Callable[[int, int], Iterator[Any]]
    number: int = 0
    of: int = 1

    def __str__(self) -> str:
        return f"share {self.number + 1} of {self.of}"


@dataclass
class News:
    """Something that a share yielded (`value`), or what became of it.

    Attributes:
        error: what it raised, or how its process ended; there may be more to come of others.
        skipped: why it did nothing.
        seconds: that it took; given at its end, the last that is heard of it.
    """

    share: Share
    value: Any = None
    error: str | None = None
    skipped: str | None = None
    seconds: float | None = None


@dataclass
class _Running:
    process: Any
    share: Share
    begin: float = field(default_factory=time.monotonic)


def share_of(things: Sequence[T], number: int, of: int) -> Sequence[T]:
    """Every `of`-th of them: neighbours, which take about as long, go to different shares."""
    return things[number::of]


def _work(connection: Connection, share: Share, threads: int) -> None:
    """In the process of a share."""
    torch.set_num_threads(threads)
    try:
        for value in share.work(share.number, share.of):
            connection.send({"value": value})
    except Skipped as reason:
        connection.send({"skipped": str(reason)})
    except Exception as error:  # told of; the other shares go on
        connection.send({"error": f"{type(error).__name__}: {error}"[:1000]})


def run(shares: Sequence[Share], at_once: int, threads: int = 1) -> Iterator[News]:
    """What the shares have to say, as they say it; `at_once` run at a time, each with `threads` of torch's threads."""
    context = get_context("spawn")
    left, running = list(shares), dict[Any, _Running]()
    try:
        while left or running:
            while left and len(running) < at_once:
                share = left.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(there, share, threads), daemon=True)
                process.start()
                there.close()
                running[here] = _Running(process, share)
            for connection in wait(list(running)):
                assert isinstance(connection, Connection)
                share = running[connection].share
                try:
                    yield News(share, **connection.recv())
                except EOFError:
                    ended = running.pop(connection)
                    ended.process.join()
                    if ended.process.exitcode:
                        yield News(share, error=f"its process ended with status {ended.process.exitcode}")
                    yield News(share, seconds=time.monotonic() - ended.begin)
    finally:
        for begun in running.values():
            begun.process.terminate()
