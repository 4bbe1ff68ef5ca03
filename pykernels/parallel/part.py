"""The process of one part of a network: ``python -m pykernels.parallel.part``; it is what `Chain` and the command
``pykernels part`` start.

It listens for the part before it, joins the one behind it, and hands on what it computes until either is lost; then it
listens again. Three threads: one receives, one computes, one sends. Whoever of them meets an end says so along the
line, so that all parts listen again and the first who noticed is heard.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from pykernels.network.saved import tree_json
from pykernels.optimized import Optimized, load
from pykernels.parallel.link import Link, LinkError, Server, Silent, dial_until, key_of_environment
from pykernels.parallel.split import Place
from pykernels.tune.on_device import OnDevice, from_host

__all__ = ["attend", "main"]

AHEAD = 2  # frames that wait between two threads
Frame = tuple[dict[str, Any], list[Any]]


def attend(
    network: Optimized | OnDevice,
    place: Place,
    server: Server,
    following: str,
    key: bytes,
    silence: float,
    patience: float,
) -> None:
    """Be a part of one pipeline after another, until `server` is closed.

    Args:
        place: which part it is.
        following: the address of the part behind, or of who asks; it is waited for `patience` seconds.
        silence: seconds after which a link is given up.
    """
    while True:
        before = server.accept()
        if before is None:
            return
        behind = dial_until(following, key, silence, patience)
        if behind is None:
            print(f"part {place.number}: nobody answers at {following}", file=sys.stderr, flush=True)
            before.close()
            continue
        relay(network, place, before, behind)


def relay(network: Optimized | OnDevice, place: Place, before: Link, behind: Link) -> None:
    """Compute for who is before and hand on to who is behind, until one of them is lost."""
    todo: queue.Queue[Frame] = queue.Queue(AHEAD)
    done: queue.Queue[Frame] = queue.Queue(AHEAD)

    def receive() -> None:
        try:
            while True:
                todo.put(before.receive())
        except LinkError as error:
            todo.put(
                ({"kind": "lost", "part": place.number - 1, "silent": isinstance(error, Silent), "why": str(error)}, [])
            )

    def send() -> None:
        lost = False
        while True:
            try:
                head, values = done.get(timeout=behind.silence / 4)
            except queue.Empty:
                head, values = {"kind": "beat"}, []
            if not lost:
                try:
                    try:
                        behind.send(head, values)
                    except LinkError:
                        raise
                    except Exception as error:  # of what cannot be sent, before anything of it was
                        behind.send(_failed(place, head, error))
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
            head, values = _answer(network, place, head, values)
        elif head["kind"] == "hello":
            head = _introduced(network, place, head)
        done.put((head, values))
        if head["kind"] == "lost":
            break
    for thread in threads:
        thread.join()
    before.close()
    behind.close()


def _answer(network: Optimized | OnDevice, place: Place, head: dict[str, Any], values: list[Any]) -> Frame:
    begin = time.perf_counter()
    try:
        args, kwargs = network.nested(values)
        with torch.no_grad():
            outputs = pytree.tree_leaves(network(*args, **kwargs), is_leaf=lambda leaf: leaf is None)
    except Exception as error:  # whatever it is, it is this request's
        return _failed(place, head, error), []
    head["seconds"] = [*head.get("seconds", []), time.perf_counter() - begin]
    return head, outputs


def _failed(place: Place, head: dict[str, Any], error: Exception) -> dict[str, Any]:
    why = f"{type(error).__name__}: {error}"
    return {"kind": "error", "id": head.get("id"), "part": place.number, "count": place.total, "why": why[:4096]}


def _introduced(network: Optimized | OnDevice, place: Place, head: dict[str, Any]) -> dict[str, Any]:
    """What a pipeline's parts say of themselves, and how its inputs and outputs are nested."""
    head["parts"] = [*head.get("parts", []), list(place)]
    if place.number == 1:
        head["inputs"] = tree_json.dump(network.in_spec)
    if place.number == place.total:
        head["outputs"] = tree_json.dump(network.out_spec)
    return head


def _watch_parent(sockets: Sequence[str]) -> None:
    """End when the process that holds the other end of the standard input does, which then cannot remove these, nor the
    folder that they are in."""

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        for path in filter(os.path.isabs, sockets):
            with contextlib.suppress(OSError):
                os.unlink(path)
            with contextlib.suppress(OSError):  # whoever is the last can
                os.rmdir(os.path.dirname(path))
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", help="of the part")
    parser.add_argument("--listen", required=True, help="a path or host:port")
    parser.add_argument("--next", required=True, help="where the part behind this one listens, or who asks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="where it runs")
    parser.add_argument("--silence", type=float, default=5.0, help="seconds after which a link is given up")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds to wait for the part behind")
    parser.add_argument("--with-parent", action="store_true", help="end when the standard input does")
    options = parser.parse_args(arguments)
    if options.with_parent:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C is the parent's to answer
        _watch_parent([options.listen, options.next])
    key = key_of_environment()
    torch.set_num_threads(options.threads)
    network = load(options.file, options.device)
    place = Place.of(network)
    server = Server(options.listen, key, options.silence)
    attend(from_host(network), place, server, options.next, key, options.silence, options.patience)


if __name__ == "__main__":
    main()
