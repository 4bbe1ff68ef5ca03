"""The process of one part of a network: ``python -m pykernels.parallel.part``; it is what `Chain` and the command
``pykernels part`` start.

It listens for the part before it, joins the one behind it, and hands on what it computes until either is lost; then it
listens again. Three threads: one receives, one computes, one sends. Whoever of them meets an end says so along the
line, so that all parts listen again and the first who noticed is heard.
"""

from __future__ import annotations

import argparse
import os
import queue
import socket
import sys
import threading
import time
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pykernels.network.saved import tree_json
from pykernels.optimized import Optimized, load
from pykernels.parallel.link import Link, LinkError, Silent, accept, dial_until, key_of_environment, listen

__all__ = ["attend", "main"]

AHEAD = 2  # frames that wait between two threads
Frame = tuple[dict[str, Any], list[Any]]


def attend(
    network: Optimized,
    number: int,
    count: int,
    server: socket.socket,
    following: str,
    key: bytes,
    silence: float,
    patience: float,
) -> None:
    """Be part `number` of `count`, one pipeline after another, until `server` is closed.

    Args:
        following: the address of the part behind, or of who asks; it is waited for `patience` seconds.
        silence: seconds after which a link is given up.
    """
    while True:
        try:
            before = accept(server, key, silence)
        except OSError:
            return
        if before is None:
            continue
        behind = dial_until(following, key, silence, patience)
        if behind is None:
            print(f"part {number}: nobody answers at {following}", file=sys.stderr, flush=True)
            before.close()
            continue
        relay(network, number, count, before, behind)


def relay(network: Optimized, number: int, count: int, before: Link, behind: Link) -> None:
    """Compute for who is before and hand on to who is behind, until one of them is lost."""
    todo: queue.Queue[Frame] = queue.Queue(AHEAD)
    done: queue.Queue[Frame] = queue.Queue(AHEAD)

    def receive() -> None:
        try:
            while True:
                todo.put(before.receive())
        except LinkError as error:
            todo.put(({"kind": "lost", "part": number - 1, "silent": isinstance(error, Silent), "why": str(error)}, []))

    def send() -> None:
        lost = False
        while True:
            try:
                head, values = done.get(timeout=behind.silence / 4)
            except queue.Empty:
                head, values = {"kind": "beat"}, []
            if not lost:
                try:
                    behind.send(head, values)
                except LinkError:
                    lost = True
                    before.close()  # which ends `receive`, and so everything here
            if head["kind"] == "lost":
                return

    threads = [threading.Thread(target=run, daemon=True) for run in (receive, send)]
    for thread in threads:
        thread.start()
    while True:
        head, values = todo.get()
        if head["kind"] == "call":
            head, values = _answer(network, number, count, head, values)
        elif head["kind"] == "hello":
            head = _introduced(network, number, count, head)
        done.put((head, values))
        if head["kind"] == "lost":
            break
    for thread in threads:
        thread.join()
    before.close()
    behind.close()


def _answer(network: Optimized, number: int, count: int, head: dict[str, Any], values: list[Any]) -> Frame:
    begin = time.perf_counter()
    try:
        args, kwargs = network.nested(values)
        with torch.no_grad():
            outputs = pytree.tree_leaves(network(*args, **kwargs), is_leaf=lambda leaf: leaf is None)
    except Exception as error:  # whatever it is, it is this request's
        why = f"{type(error).__name__}: {error}"
        return {"kind": "error", "id": head["id"], "part": number, "count": count, "why": why[:4096]}, []
    head["seconds"] = [*head.get("seconds", []), time.perf_counter() - begin]
    return head, outputs


def _introduced(network: Optimized, number: int, count: int, head: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline's parts say of themselves, and how its inputs and outputs are nested."""
    head["parts"] = [*head.get("parts", []), [number, count]]
    if number == 1:
        head["inputs"] = tree_json.dump(network.in_spec)
    if number == count:
        head["outputs"] = tree_json.dump(network.out_spec)
    return head


def _watch_parent() -> None:
    """End when the process that holds the other end of the standard input does."""

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", help="of the part")
    parser.add_argument("--number", type=int, required=True, help="of the part, from 1")
    parser.add_argument("--count", type=int, required=True, help="how many parts there are")
    parser.add_argument("--listen", required=True, help="a path or host:port")
    parser.add_argument("--next", required=True, help="where the part behind this one listens, or who asks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--silence", type=float, default=5.0, help="seconds after which a link is given up")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for the part behind")
    parser.add_argument("--with-parent", action="store_true", help="end when the standard input does")
    options = parser.parse_args(arguments)
    if options.with_parent:
        _watch_parent()
    key = key_of_environment()
    torch.set_num_threads(options.threads)
    network = load(options.file)
    server = listen(options.listen)
    attend(network, options.number, options.count, server, options.next, key, options.silence, options.patience)


if __name__ == "__main__":
    main()
