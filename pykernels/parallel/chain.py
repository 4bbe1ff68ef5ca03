"""`Chain`: the parts of a network as a pipeline of processes, seen from the process that asks.

It sends to the first part and hears from the last. Several requests are on their way at once, so that each part works
on another one. When any link is lost all parts listen again, the ones that died are started anew, and what was not
answered is asked once more: first one by one, so that a request which kills a part is found and fails alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from pykernels.network.saved import tree_json
from pykernels.parallel.link import KEY, Link, LinkError, Silent, accept, dial, host_of, key_of_environment, listen
from pykernels.parallel.split import files_in
from pykernels.tune.cores import usable

if TYPE_CHECKING:
    from pykernels.parallel.split import Split

__all__ = ["Chain", "PartError"]

PATIENCE = 120.0  # seconds until all parts must have been joined
AGAIN = 3  # starts of a part, and sessions without an answer, until the pipeline is given up
HELD = 1000  # answers of which times are kept


class PartError(RuntimeError):
    """A request failed in a part of the network; the message names it.

    Attributes:
        part: its number, from 1; None where it is not known.
    """

    def __init__(self, message: str, part: int | None = None) -> None:
        super().__init__(message)
        self.part = part


@dataclass(eq=False)
class _Request:
    leaves: Sequence[Any]
    future: Future[Any]
    attempts: int = 0


@dataclass(eq=False)
class _Session:
    """The time from joining all parts to losing one."""

    first: Link
    ready: bool = False
    over: bool = False
    lost: tuple[int | None, bool, str] = (None, False, "")  # the part, whether it was silent, why


@dataclass
class _Processes:
    """The parts' processes on this machine: what each is told, and its file, which stays open."""

    commands: list[list[str]]
    files: list[BufferedReader]
    environment: dict[str, str]
    folder: tempfile.TemporaryDirectory[str]
    opened: contextlib.ExitStack
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        self.running = [self._start(number) for number in range(1, len(self.commands) + 1)]

    def _start(self, number: int) -> subprocess.Popen[bytes]:
        file = self.files[number - 1].fileno()
        command = [sys.executable, "-m", "pykernels.parallel.part", f"/dev/fd/{file}", *self.commands[number - 1]]
        return subprocess.Popen(command, env=self.environment, stdin=subprocess.PIPE, pass_fds=[file])

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
        for process in self.running:
            self.end(process)
        self.opened.close()
        self.folder.cleanup()


class Chain:
    """A network in several processes: `Chain.of` starts them here, `Chain.connect` joins those of several hosts.

    Called like the network, from any thread; ``submit`` returns a future. Answers are the network's, bit for bit. Close
    it, or use it as a context manager.

    Attributes:
        restarts: how often a part's process was started anew.
        death: why the pipeline was given up; None while it is not.
    """

    def __init__(
        self, first: str, answers: str, key: bytes, in_flight: int, silence: float, processes: _Processes | None = None
    ) -> None:
        if silence <= 0:
            raise ValueError(f"silence: must be above 0 seconds, not {silence!r}")
        if type(in_flight) is not int or in_flight < 1:
            raise ValueError(f"in_flight: must be a whole number of at least 1, not {in_flight!r}")
        self._first, self._key, self._silence, self._processes = first, key, silence, processes
        self._in_flight = in_flight
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, _Request] = OrderedDict()
        self._flying: OrderedDict[int, _Request] = OrderedDict()
        self._numbers = itertools.count()
        self._closed = False
        self.death: PartError | None = None
        self._fruitless = 0  # sessions without an answer
        self._times: deque[list[float]] = deque(maxlen=HELD)
        self.restarts = 0
        self._server = listen(answers)
        if processes is not None:
            processes.start()
        joined: Future[None] = Future()
        self._keeper = threading.Thread(target=self._keep, args=(joined,), name="pykernels chain", daemon=True)
        self._keeper.start()
        try:
            joined.result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, split: Split, threads: int | None = None, in_flight: int | None = None, silence: float = 5.0) -> Chain:
        """Start a process for each part on this machine. Returns when all are ready.

        Args:
            threads: torch's, of each part; without, the cores shared out.
            in_flight: requests on their way at once; twice as many as parts without.
            silence: seconds after which a part that hangs is given up and started anew. One that dies is noticed at
                once.

        Raises:
            ValueError: an argument is none that can be, or a part cannot be saved.
            PartError: a part cannot be started.
        """
        with tempfile.TemporaryDirectory(prefix="pykernels-") as folder:
            return cls._of_files(split.save(folder), threads, in_flight, silence)

    @classmethod
    def of_folder(
        cls,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        in_flight: int | None = None,
        silence: float = 5.0,
    ) -> Chain:
        """The same of parts that `Split.save` wrote, whose processes map these files. Other files that take their
        places change nothing: a part that is started anew gets the one that was there.

        Raises:
            ValueError, PartError: as `of`; or parts are missing.
            OSError: a file cannot be read.
        """
        return cls._of_files(files_in(folder), threads, in_flight, silence)

    @classmethod
    def _of_files(cls, files: Sequence[Path], threads: int | None, in_flight: int | None, silence: float) -> Chain:
        count = len(files)
        threads = max(1, usable().count // count) if threads is None else threads
        folder = tempfile.TemporaryDirectory(prefix="pykernels-")
        key = secrets.token_bytes(32)
        places = [str(Path(folder.name) / str(number)) for number in range(count + 1)]
        commands = [
            [
                *("--number", str(number), "--count", str(count), "--listen", places[number - 1]),
                *("--next", places[number], "--threads", str(threads), "--silence", str(silence), "--with-parent"),
            ]
            for number in range(1, count + 1)
        ]
        with contextlib.ExitStack() as opened:
            kept = [opened.enter_context(open(file, "rb")) for file in files]
            processes = _Processes(commands, kept, {**os.environ, KEY: key.hex()}, folder, opened.pop_all())
        return cls(places[0], places[-1], key, in_flight or 2 * count, silence, processes)

    @classmethod
    def connect(cls, first: str, answers: str, in_flight: int = 8, silence: float = 5.0) -> Chain:
        """Join parts that ``pykernels part`` runs, on any hosts. All have the same key, 64 hexadecimal digits, in the
        environment variable PYKERNELS_PIPELINE_KEY.

        Args:
            first: ``host:port`` at which the first part listens.
            answers: ``host:port`` at which to listen here: the last part's ``--next``.

        Raises:
            ValueError: no key, or an address that is none.
            PartError: they cannot be joined.
        """
        host_of(first), host_of(answers)
        return cls(first, answers, key_of_environment(), in_flight, silence)

    # --- what a user calls ---

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:
        """Ask for an answer. Errors of the call go to the future, as a PartError that names the part.

        Raises:
            RuntimeError: closed.
            PartError: the pipeline was given up.
            ValueError: the inputs are nested otherwise than the network's.
        """
        names = self._in_spec.child(1).context
        if list(kwargs) != names and set(kwargs) == set(names):
            kwargs = {name: kwargs[name] for name in names}
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._in_spec:
            raise ValueError(f"inputs are nested as {spec}, the network takes {self._in_spec}")
        request = _Request(leaves, Future())
        with self._changed:
            if self.death is not None:
                raise PartError(str(self.death), self.death.part)  # another one, since each keeps who has raised it
            if self._closed:
                raise RuntimeError("submit: the pipeline is closed")
            self._waiting[next(self._numbers)] = request
            self._changed.notify_all()
        return request.future

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer."""
        return self.submit(*args, **kwargs).result()

    def map(self, *iterables: Iterable[Any]) -> Iterator[Any]:
        """Answers in order, as of the built-in ``map``, of which as many are on their way as may be, twice."""
        waiting: deque[Future[Any]] = deque()
        for args in zip(*iterables, strict=False):
            if len(waiting) >= 2 * self._in_flight:
                yield waiting.popleft().result()
            waiting.append(self.submit(*args))
        while waiting:
            yield waiting.popleft().result()

    def seconds(self) -> list[float]:
        """The median seconds that each part has computed for an answer, of the last 1000."""
        return [statistics.median(times) for times in zip(*self._times, strict=True)]

    def close(self) -> None:
        """Take nothing more, wait for what was asked, end the parts that were started here. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._keeper.join()
        self._server.close()
        if self._processes is not None:
            self._processes.close()

    def __enter__(self) -> Chain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the thread that keeps it going ---

    def _keep(self, joined: Future[None]) -> None:
        while True:
            try:
                session, last, sender = self._join(first=not joined.done())
            except PartError as error:
                if not joined.done():
                    joined.set_exception(error)
                self._give_up(error)
                return
            if not joined.done():
                joined.set_result(None)
            self._hear(session, last)
            with self._changed:
                session.over = True
                self._changed.notify_all()
            session.first.close()
            last.close()
            sender.join()
            if self._closed and not self._waiting and not self._flying:
                return
            lost = self._mend(session)
            if lost is not None:
                self._give_up(lost)
                return

    def _join(self, first: bool) -> tuple[_Session, Link, threading.Thread]:
        """All parts in line.

        Raises:
            PartError: they cannot be.
        """
        end, starts = time.monotonic() + PATIENCE, 0
        session: _Session | None = None
        sender: threading.Thread | None = None
        try:
            while time.monotonic() < end:
                dead = {} if self._processes is None else self._processes.dead()
                for number, how in dead.items():
                    starts += 1
                    if first or starts > AGAIN:
                        raise PartError(f"part {number} ended {how} before the pipeline was joined", number)
                    self._restart(number)
                if session is not None and session.over:
                    session.first.close()
                    session = None
                if session is None:
                    link = dial(self._first, self._key, self._silence)
                    if link is None:
                        time.sleep(0.05)
                        continue
                    session = _Session(link)
                    sender = threading.Thread(target=self._send, args=(session,), daemon=True)
                    sender.start()
                last = accept(self._server, self._key, self._silence, within=0.1)
                if last is None:
                    continue
                try:
                    head, _ = last.receive()
                    self._introduce(head)
                except LinkError:
                    last.close()
                    continue
                session.ready = True
                with self._changed:
                    self._changed.notify_all()
                assert sender is not None
                return session, last, sender
        except BaseException:
            if session is not None:
                session.over = True
                session.first.close()
            raise
        if session is None:
            raise PartError(f"part 1 does not answer at {self._first}", 1)
        session.over = True
        session.first.close()
        raise PartError("part 1 was reached, and nothing came from the last one: a part between does not answer")

    def _introduce(self, head: dict[str, Any]) -> None:
        """Who the parts are, as they say.

        Raises:
            LinkError: it is no introduction.
            PartError: they are not the parts of one network in order.
        """
        if head["kind"] != "hello":
            raise LinkError("the last part does not introduce itself")
        parts = head.get("parts", [])
        if parts != [[number, len(parts)] for number in range(1, len(parts) + 1)]:
            raise PartError(f"the parts in line are {parts}, which are not all of one network in order")
        self._in_spec, self._out_spec = tree_json.parse(head["inputs"]), tree_json.parse(head["outputs"])
        self._parts = len(parts)

    def _send(self, session: _Session) -> None:
        """Requests to the first part, as many as may be on their way; beats between."""
        try:
            session.first.send({"kind": "hello"})
            while True:
                with self._changed:
                    request = None
                    if session.ready and not session.over:
                        request = self._next()
                    if request is None and not session.over:
                        self._changed.wait(self._silence / 4)
                    if session.over or (self._closed and not self._waiting and not self._flying):
                        break
                if request is None:
                    session.first.beat()
                    continue
                number, leaves = request
                try:
                    session.first.send({"kind": "call", "id": number}, leaves)
                except TypeError as error:
                    self._settle(number, error)
        except LinkError:
            pass
        session.over = True
        session.first.close()  # the others follow, and the last one's link ends

    def _next(self) -> tuple[int, Sequence[Any]] | None:
        """The request to send now. One that has met a loss goes alone."""
        if not self._waiting or len(self._flying) >= self._in_flight:
            return None
        number, request = next(iter(self._waiting.items()))
        careful = request.attempts or any(other.attempts for other in self._flying.values())
        if careful and self._flying:
            return None
        del self._waiting[number]
        if not request.attempts and not request.future.set_running_or_notify_cancel():
            return None
        self._flying[number] = request
        return number, request.leaves

    def _hear(self, session: _Session, last: Link) -> None:
        """Answers, until a link is lost."""
        try:
            while True:
                head, values = last.receive()
                kind = head["kind"]
                if kind == "lost":
                    session.lost = head["part"], bool(head["silent"]), str(head["why"])
                    return
                if kind == "error":
                    text = f"part {head['part']} of {head['count']}: {head['why']}"
                    self._settle(head["id"], PartError(text, head["part"]))
                elif kind == "call":
                    self._times.append(head["seconds"])
                    self._settle(head["id"], pytree.tree_unflatten(values, self._out_spec))
        except (LinkError, KeyError, TypeError, ValueError) as error:
            session.lost = self._parts, isinstance(error, Silent), str(error)

    def _settle(self, number: int, answer: Any) -> None:
        with self._changed:
            request = self._flying.pop(number, None)
            self._fruitless = 0
            self._changed.notify_all()
        if request is None:  # asked twice, answered before
            return
        if isinstance(answer, Exception):
            request.future.set_exception(answer)
        else:
            request.future.set_result(answer)

    # --- when a part is lost ---

    def _mend(self, session: _Session) -> PartError | None:
        """Start the lost parts anew and queue what was on its way; why to give up, if it is so."""
        part, silent, why = session.lost
        told = f"part {part} was lost: {why}" if part else f"the first part was lost: {why}"
        if self._processes is not None:
            time.sleep(0.05)  # who dies is dead a moment later
            dead = self._processes.dead()
            if silent and part and part not in dead:
                dead[part] = f"after {self._silence:g} s of silence"
            for number in dead:
                self._restart(number)
            if dead:
                part, how = next(iter(dead.items()))
                told = f"part {part} ended {how}"
        with self._changed:
            lost = list(self._flying.items())
            self._flying.clear()
            for _, request in lost:
                request.attempts += 1
            if len(lost) == 1 and lost[0][1].attempts > 1:  # alone, and again
                lost[0][1].future.set_exception(PartError(f"{told}, twice, while it was at this request", part))
                lost, self._fruitless = [], 0
            for number, request in reversed(lost):
                self._waiting[number] = request
                self._waiting.move_to_end(number, last=False)
            self._fruitless += 1
            if self._fruitless > AGAIN:
                return PartError(f"the pipeline was lost {self._fruitless} times without an answer: {told}", part)
        return None

    def _restart(self, number: int) -> None:
        assert self._processes is not None
        self._processes.restart(number)
        self.restarts += 1

    def _give_up(self, error: PartError) -> None:
        with self._changed:
            self.death = error
            left = [*self._flying.values(), *self._waiting.values()]
            self._flying.clear()
            self._waiting.clear()
        for request in left:
            with contextlib.suppress(Exception):  # cancelled
                request.future.set_exception(error)
