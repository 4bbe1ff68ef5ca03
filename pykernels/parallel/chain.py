"""`Chain`: the parts of a network as a pipeline of processes, seen from the process that asks.

It sends to the first part and hears from the last. Several requests are on their way at once, so that each part works
on another one. When any link is lost all parts listen again, the ones that died are started anew, and what was not
answered is asked once more: first one by one, so that a request which kills a part is found and fails alone.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

from pykernels.network.saved import tree_json
from pykernels.parallel.link import (
    Link,
    LinkError,
    Server,
    Silent,
    checked_silence,
    dial,
    host_of,
    key_of_environment,
)
from pykernels.parallel.processes import Processes
from pykernels.parallel.split import files_in

if TYPE_CHECKING:
    from pykernels.parallel.split import Split

__all__ = ["Chain", "PartError"]

PATIENCE = 120.0  # seconds until all parts must have been joined
HUNG = 30.0  # and until those of this machine that were there before are started anew
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


class Chain:
    """A network in several processes: `Chain.of` starts them here, `Chain.connect` joins those of several hosts.

    Called like the network, from any thread; ``submit`` returns a future. Answers are the network's, bit for bit. Close
    it, or use it as a context manager.

    Attributes:
        restarts: how often a part's process was started anew.
        death: why the pipeline was given up; None while it is not.
    """

    def __init__(
        self, first: str, answers: str, key: bytes, in_flight: int, silence: float, processes: Processes | None = None
    ) -> None:
        if type(in_flight) is not int or in_flight < 1:
            raise ValueError(f"in_flight: must be a whole number of at least 1, not {in_flight!r}")
        self._first, self._key, self._silence, self._processes = first, key, checked_silence(silence), processes
        self._in_flight, self._owner = in_flight, os.getpid()
        self._changed = threading.Condition()
        self._waiting: OrderedDict[int, _Request] = OrderedDict()
        self._flying: OrderedDict[int, _Request] = OrderedDict()
        self._numbers = itertools.count()
        self._closed = False
        self.death: PartError | None = None
        self._fruitless = 0  # sessions without an answer
        self._times: deque[list[float]] = deque(maxlen=HELD)
        self.restarts = 0
        if processes is not None:
            processes.start()
        self._server = Server(answers, key, silence)
        joined: Future[None] = Future()
        self._sender: threading.Thread | None = None
        self._keeper = threading.Thread(target=self._keep, args=(joined,), name="pykernels chain", daemon=True)
        self._keeper.start()
        try:
            joined.result()
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(
        cls,
        split: Split,
        threads: int | None = None,
        in_flight: int | None = None,
        silence: float = 5.0,
        devices: Sequence[str] | None = None,
    ) -> Chain:
        """Start a process for each part on this machine. Returns when all are ready.

        Args:
            threads: torch's, of each part; without, the cores shared out.
            in_flight: requests on their way at once; twice as many as parts without.
            silence: seconds after which a part that hangs is given up and started anew. One that dies is noticed at
                once.
            devices: of each part where it runs: ``cpu``, ``cuda``, ``cuda:1`` ...; all on the CPU without. What goes
                from part to part goes by the host's memory.

        Raises:
            ValueError: an argument is none that can be, a device cannot be used, or a part cannot be saved.
            PartError: a part cannot be started.
        """
        with tempfile.TemporaryDirectory(prefix="pykernels-") as folder:
            split.save(folder)
            return cls.of_folder(folder, threads, in_flight, silence, devices)

    @classmethod
    def of_folder(
        cls,
        folder: str | os.PathLike[str],
        threads: int | None = None,
        in_flight: int | None = None,
        silence: float = 5.0,
        devices: Sequence[str] | None = None,
    ) -> Chain:
        """The same of parts that `Split.save` wrote, whose processes map these files. Other files that take their
        places change nothing: a part that is started anew gets the one that was there.

        Raises:
            ValueError, PartError: as `of`; or parts are missing.
            OSError: a file cannot be read.
        """
        files = files_in(folder)
        in_flight = 2 * len(files) if in_flight is None else in_flight
        processes = Processes(files, threads, silence, devices)
        try:
            return cls(processes.first, processes.answers, processes.key, in_flight, silence, processes)
        except BaseException:
            processes.close()
            raise

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
        """Ask for an answer. Errors of the call go to the future, as a PartError that names the part. Inputs must stay
        as they are until it is there.

        Raises:
            RuntimeError: closed, or in a process that was forked from the one which has the pipeline.
            PartError: the pipeline was given up.
            ValueError: the inputs are nested otherwise than the network's.
        """
        if os.getpid() != self._owner:
            raise RuntimeError("submit: the pipeline is that of the process which this one was forked from")
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
        """The network's answer.

        Raises:
            RuntimeError: as `submit`, or called by a thread of the pipeline's own, in a callback of a future.
        """
        self._refuse_own_threads("a call")
        return self.submit(*args, **kwargs).result()

    def map(self, *iterables: Iterable[Any]) -> Iterator[Any]:
        """Answers in order, as of the built-in ``map``, of which as many are on their way as may be, twice."""
        self._refuse_own_threads("map")
        waiting: deque[Future[Any]] = deque()
        try:
            for args in zip(*iterables, strict=False):
                if len(waiting) >= 2 * self._in_flight:
                    yield waiting.popleft().result()
                waiting.append(self.submit(*args))
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:  # of an iterator that is given up
                future.cancel()

    def seconds(self) -> list[float]:
        """The median seconds that each part has computed for an answer, of the last 1000."""
        return [statistics.median(times) for times in zip(*self._times, strict=True)]

    def close(self) -> None:
        """Take nothing more, wait for what was asked, end the parts that were started here. May be called again.

        Raises:
            RuntimeError: called by a thread of the pipeline's own, in a callback of a future.
        """
        if os.getpid() != self._owner:
            return  # a fork's copy
        self._refuse_own_threads("close")
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

    def _refuse_own_threads(self, what: str) -> None:
        if threading.current_thread() in (self._keeper, self._sender):
            raise RuntimeError(f"{what}: a callback of a future cannot do that, it would wait for itself")

    def _keep(self, joined: Future[None]) -> None:
        try:
            self._serve(joined)
        except Exception as error:  # whatever it is, somebody waits
            found = (
                error if isinstance(error, PartError) else PartError(f"the pipeline: {type(error).__name__}: {error}")
            )
            if not joined.done():
                joined.set_exception(found)
            self._give_up(found)

    def _serve(self, joined: Future[None]) -> None:
        while True:
            session, last, self._sender = self._join(first=not joined.done())
            if not joined.done():
                joined.set_result(None)
            self._hear(session, last)
            with self._changed:
                session.over = True
                self._changed.notify_all()
            session.first.close()
            last.close()
            self._sender.join()
            if self._closed and not self._waiting and not self._flying:
                return
            self._mend(session)

    def _join(self, first: bool) -> tuple[_Session, Link, threading.Thread]:
        """All parts in line.

        Raises:
            PartError: they cannot be.
        """
        begin, starts, anew = time.monotonic(), Counter[int](), first
        session: _Session | None = None
        sender: threading.Thread | None = None
        try:
            while (waited := time.monotonic() - begin) < PATIENCE:
                if self._closed and not self._waiting and not self._flying:
                    raise PartError("the pipeline is closed")
                if self._processes is not None and waited > HUNG and not anew:  # several hang, and nobody says which
                    anew = True
                    for number in range(1, self._parts + 1):
                        self._restart(number)
                for number, how in ({} if self._processes is None else self._processes.dead()).items():
                    starts[number] += 1
                    if first or starts[number] > AGAIN:
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
                last = self._server.accept(within=0.1)
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
        if not parts or parts != [[number, len(parts), parts[0][2]] for number in range(1, len(parts) + 1)]:
            found = "; ".join(f"part {number} of {count} of split {split}" for number, count, split in parts)
            raise PartError(f"the parts in line are not all of one split in order, but {found or 'none'}")
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
                except LinkError:
                    raise
                except Exception as error:  # of what cannot be sent, before anything of it was
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

    def _mend(self, session: _Session) -> None:
        """Start the lost parts anew and queue what was on its way.

        Raises:
            PartError: the pipeline is given up.
        """
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
                raise PartError(f"the pipeline was lost {self._fruitless} times without an answer: {told}", part)

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
