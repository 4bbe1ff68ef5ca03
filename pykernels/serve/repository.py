"""The networks that a service has: their files and versions, which of them are mapped, which go when room is needed.

Nothing that a request says becomes a path: names and versions are looked up among those that were found in the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pykernels.serve.batching import Counts
from pykernels.serve.errors import Invalid, NotFound, Unavailable
from pykernels.serve.files import FILE, VERSION, Files, find
from pykernels.serve.model import UNTRIED, Limits, Model, ready, try_batches
from pykernels.serve.runner import Runner

__all__ = ["Entry", "Repository", "State"]

AGAIN = 30.0  # seconds until a file that could not be loaded is tried again
log = logging.getLogger(__name__)


class State(NamedTuple):
    """A version, as an index of the repository shows it: ``READY``, ``LOADING`` or ``UNAVAILABLE``, and why."""

    name: str
    version: int
    state: str
    reason: str


@dataclass(eq=False)
class Entry:
    """A version's files.

    Attributes:
        failure: why it could not be loaded, and when (of `time.monotonic`) that was.
        loading: the task that maps it.
    """

    name: str
    version: int
    files: Files
    failure: tuple[str, float] | None = None
    loading: asyncio.Task[Model] | None = field(default=None, repr=False)


class Repository:
    """Networks by name and version, mapped (or brought to their device) when they are first wanted. On one event loop.

    A request that names no version gets the highest one that is ready; a new one takes over when it is. Mapped networks
    are let go, the one used longest ago first, when their files (on a device: weights) are larger than `limit`
    together; what waits for one that goes is still answered. Where nothing else answers for a model, it is ready as
    soon as single rows are, and takes batches when those have been tried, too.

    Args:
        source: a folder of ``name/version/net.pk``, or files by name; in place of a file, a folder of parts.
        runner: where networks are called, and made ready.
        limits: of every model.
        limit: bytes.
    """

    def __init__(
        self, source: Path | Mapping[str, Path], runner: Runner, limits: Limits | None = None, limit: int = 1 << 34
    ) -> None:
        self.source, self.runner, self.limits, self.limit = source, runner, limits or Limits(), limit
        self.entries: dict[tuple[str, int], Entry] = {}
        self.mapped: OrderedDict[tuple[str, int], Model] = OrderedDict()
        self.counts: dict[tuple[str, int], Counts] = {}  # also of those that are not mapped now
        self.unloaded: set[str] = set()  # names that a client took out of service
        self._one_at_a_time = asyncio.Lock()
        self._completing: set[asyncio.Task[None]] = set()

    def index(self) -> list[State]:
        """Every version that there is, by name and version."""
        return [self._state(self.entries[key]) for key in sorted(self.entries)]

    def versions(self, name: str) -> list[int]:
        """The versions of a model, ascending.

        Raises:
            NotFound: there is no such model.
        """
        found = sorted(version for known, version in self.entries if known == name)
        if not found:
            raise NotFound(f"model {name!r:.80} is unknown")
        return found

    def keys(self, name: str = "", version: str = "") -> list[tuple[str, int]]:
        """Names and versions, of all models or of one, ascending.

        Raises:
            NotFound: there is no such model or version.
            Invalid: the version is no whole number.
        """
        if not name:
            return sorted(self.entries)
        if version:
            return [self._key(name, version)]
        return [(name, v) for v in self.versions(name)]

    async def scan(self) -> None:
        """See which files there are now; what is gone, or another file than it was, is not mapped any longer."""
        source = self.source
        found = await asyncio.to_thread(find, source)
        for key in [key for key in self.entries if key not in found or self.entries[key].files != found[key]]:
            entry = self.entries[key]
            if key in found and key in self.mapped:
                # Another file in the old one's place: that goes on until this one is ready.
                fresh = Entry(*key, found[key])
                with contextlib.suppress(Unavailable):
                    model = await self._map(fresh)
                    self.entries[key], self.mapped[key] = fresh, model
                continue
            del self.entries[key]
            self.mapped.pop(key, None)
            if entry.loading is not None:
                entry.loading.cancel()
        for key, files in found.items():
            if key not in self.entries:
                self.entries[key] = Entry(*key, files)

    async def refresh(self) -> None:
        """`scan`, and make the highest versions ready of models that are in use: they take over when they are."""
        await self.scan()
        used = {name for name, _ in self.mapped}
        self._drop_lost()
        for name in used:
            entry = self.entries.get((name, self.versions(name)[-1])) if self._known(name) else None
            if entry is not None and self._worth_trying(entry):
                with contextlib.suppress(Unavailable):
                    await self._load(entry)

    async def start(self) -> None:
        """Find the files, and map the highest version of each model as far as `limit` goes.

        Raises:
            ValueError: there is none, or one that was named cannot be served.
        """
        await self.scan()
        if not self.entries:
            raise ValueError(f"models: there is no {FILE} in {self.source}")
        room = self.limit
        for name in sorted({name for name, _ in self.entries}):
            entry = self.entries[name, self.versions(name)[-1]]
            room -= entry.files.bytes
            if room < 0 and self.mapped:
                break
            try:
                await self._load(entry)
            except Unavailable as error:
                if isinstance(self.source, Mapping):
                    raise ValueError(f"models: {error}") from error

    async def watch(self, seconds: float) -> None:
        """`refresh` again and again."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh()
            except Exception as error:  # the folder may be unreachable for a while, say; the next look may do
                log.warning("models: %s", error)

    async def settled(self) -> None:
        """Until what is mapped takes batches."""
        while self._completing:
            await asyncio.wait(self._completing)

    async def close(self) -> None:
        """Give up what is not settled, and end the processes of what is mapped."""
        for task in self._completing:
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(model.close) for model in self.mapped.values()))

    async def get(self, name: str, version: str = "") -> Model:
        """A model that is ready; it is mapped when it is not.

        Args:
            version: the highest that is ready where it is empty.

        Raises:
            NotFound: there is no such model or version.
            Unavailable: it cannot be loaded, or a client took it out of service.
        """
        self.versions(name)
        if name in self.unloaded:
            raise Unavailable(f"model {name!r} is not loaded")
        found = self._find(name, version)
        return found if isinstance(found, Model) else await self._load(found)

    def known(self, name: str, version: str = "") -> bool:
        """Whether a request would find it: it is mapped, or nothing is known against it.

        Raises:
            NotFound: there is no such model or version.
        """
        found = self._find(name, version)
        return name not in self.unloaded and (isinstance(found, Model) or found.failure is None)

    async def load(self, name: str) -> None:
        """Bring a model into service: its file is looked for again.

        Raises:
            NotFound: there is no such model.
            Unavailable: it cannot be loaded.
        """
        await self.scan()
        entry = self.entries[name, self.versions(name)[-1]]
        if entry.failure is not None:
            entry.failure = None
        await self._load(entry)
        self.unloaded.discard(name)

    def unload(self, name: str) -> None:
        """Take a model out of service, until it is loaded again.

        Raises:
            NotFound: there is no such model.
        """
        for version in self.versions(name):
            self.mapped.pop((name, version), None)
        self.unloaded.add(name)

    def _known(self, name: str) -> bool:
        return any(known == name for known, _ in self.entries)

    def _find(self, name: str, version: str) -> Model | Entry:
        """The model if it is mapped, else its files."""
        versions = self.versions(name)
        self._drop_lost()
        if version:
            key = self._key(name, version)
        else:
            there = [v for v in versions if (name, v) in self.mapped]
            able = [v for v in versions if self._worth_trying(self.entries[name, v])]
            key = name, max(there or able or versions)
        if key in self.mapped:
            self.mapped.move_to_end(key)
            return self.mapped[key]
        return self.entries[key]

    def _drop_lost(self) -> None:
        """What has lost its processes is made anew when it is wanted."""
        for key in [key for key, model in self.mapped.items() if model.lost]:
            asyncio.get_running_loop().run_in_executor(None, self.mapped.pop(key).close)

    def _key(self, name: str, version: str) -> tuple[str, int]:
        versions = self.versions(name)
        if not VERSION.fullmatch(version):
            raise Invalid(f"version {version!r:.80} is no whole number above 0")
        if int(version) not in versions:
            raise NotFound(f"model {name!r} has no version {version}; it has {', '.join(map(str, versions))}")
        return name, int(version)

    def _worth_trying(self, entry: Entry) -> bool:
        return entry.failure is None or time.monotonic() > entry.failure[1] + AGAIN

    async def _load(self, entry: Entry) -> Model:
        key = entry.name, entry.version
        if key in self.mapped:
            return self.mapped[key]
        if not self._worth_trying(entry):
            assert entry.failure is not None
            raise Unavailable(f"model {entry.name!r} version {entry.version} cannot be loaded: {entry.failure[0]}")
        if entry.loading is None:
            alone = not any(name == entry.name for name, _ in self.mapped)
            entry.loading = asyncio.create_task(self._map(entry, tried=not alone))
            entry.loading.add_done_callback(lambda task: task.cancelled() or task.exception())  # it is somebody's
        try:
            model = await asyncio.shield(entry.loading)  # others may wait for it, too
        finally:
            if entry.loading is not None and entry.loading.done():
                entry.loading = None
        if self.entries.get(key) is entry and key not in self.mapped:
            self.mapped[key] = model
            self._evict(key)
            if model.apart == UNTRIED:
                task = asyncio.create_task(self._complete(model))
                self._completing.add(task)
                task.add_done_callback(self._completing.discard)
        return self.mapped.get(key, model)

    async def _complete(self, model: Model) -> None:
        """Put a model that takes batches in the place of one that takes single rows."""
        key = model.name, model.version
        async with self._one_at_a_time:
            try:
                whole = await try_batches(model, self.limits)
            except (ValueError, TypeError, RuntimeError, MemoryError) as error:
                log.warning("model %s version %d goes on without batches: %s", *key, error)
                return
        if self.mapped.get(key) is model:
            self.mapped[key] = whole
        log.info(
            "model %s version %d takes %s", *key, "batches" if whole.apart is None else f"no batches: {whole.apart}"
        )

    async def _map(self, entry: Entry, tried: bool = True) -> Model:
        counts = self.counts.setdefault((entry.name, entry.version), Counts())
        async with self._one_at_a_time:
            try:
                model = await ready(entry.name, entry.version, entry.files, self.runner, self.limits, counts, tried)
            except (OSError, ValueError, TypeError, RuntimeError, MemoryError) as error:
                entry.failure = str(error) or type(error).__name__, time.monotonic()
                log.warning("model %s version %d cannot be loaded: %s", entry.name, entry.version, error)
                raise Unavailable(
                    f"model {entry.name!r} version {entry.version} cannot be loaded: {entry.failure[0]}"
                ) from error
        entry.failure = None
        log.info("model %s version %d is ready%s", entry.name, entry.version, f": {model.apart}" if model.apart else "")
        return model

    def _evict(self, keep: tuple[str, int]) -> None:
        while sum(model.bytes for model in self.mapped.values()) > self.limit and len(self.mapped) > 1:
            oldest = next(key for key in self.mapped if key != keep)
            log.info("model %s version %d makes room", *oldest)
            del self.mapped[oldest]

    def _state(self, entry: Entry) -> State:
        key = entry.name, entry.version
        if entry.name in self.unloaded:
            return State(*key, "UNAVAILABLE", "unloaded")
        if key in self.mapped:
            return State(*key, "READY", "")
        if entry.loading is not None:
            return State(*key, "LOADING", "")
        return State(*key, "UNAVAILABLE", "not loaded yet" if entry.failure is None else entry.failure[0])
