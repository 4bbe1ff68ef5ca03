"""Runs cases: prepare each rival, check its answer against the oracle, time those that are right, side by side."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pykernels.bench import families as shapes
from pykernels.bench import machine as machines
from pykernels.bench import peaks, rivals, timing
from pykernels.bench.case import PRECISIONS, Case
from pykernels.bench.rivals import remote
from pykernels.ops.errors import reason

VERSIONED = (
    "pykernels",
    "torch",
    "torchao",
    "torchvision",
    "onnxruntime",
    "onnx",
    "openvino",
    "nncf",
    "transformers",
    "numpy",
)


@dataclass(frozen=True)
class Result:
    """One rival on one case. Times are in milliseconds a call; None where there is no time, and then `reason` says why.

    work: operations a call; traffic: bytes that must move. gops: 1e9 operations a second at the median. share: the
    achieved share of what the machine can do at most (see `limit`: compute or memory), by the roofline. error:
    relative to the oracle, or quanta between 8-bit outputs; None where it is infinite or not a number.
    """

    family: str
    group: str
    case: str
    rival: str
    precision: str
    ours: bool
    work: float
    traffic: float
    median_ms: float | None = None
    best_ms: float | None = None
    spread: float | None = None
    rounds: int = 0
    gops: float | None = None
    share: float | None = None
    limit: str | None = None
    error: float | None = None
    reason: str | None = None

    @property
    def label(self) -> str:
        return f"{self.rival} {self.precision}"

    @property
    def title(self) -> str:
        """The case among all others: where its shape comes from, unless its name says enough."""
        return self.case if self.family in ("network", "gemm") else f"{self.group} {self.case}"

    @property
    def taken(self) -> float:
        """The median of a result that has one."""
        assert self.median_ms is not None
        return self.median_ms


@dataclass(frozen=True)
class Run:
    """Everything one run found: what `report.save` writes and `report.load` reads."""

    results: tuple[Result, ...]
    peaks: peaks.Peaks | None
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    date: str


def measure_case(
    case: Case,
    entrants: Sequence[rivals.Rival],
    ceilings: peaks.Peaks | None = None,
    rounds: int = 15,
    seconds: float = 10.0,
    pause: float = timing.PAUSE_SECONDS,
    tell: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Measure every entrant that takes this case's family and precision, interleaved; one result each, in their
    order."""
    taking = [r for r in entrants if case.family in r.families and r.precision in case.precisions]
    blank = [
        Result(case.family, case.group, case.name, r.name, r.precision, r.ours, case.work, case.traffic[r.precision])
        for r in taking
    ]
    ready: dict[int, rivals.Run] = {}
    found = list(blank)
    with _quiet():
        for i, rival in enumerate(taking):
            tell(f"{case.label}: {rival.label}")
            try:
                run = rival.prepare(case)
                _spoil(case)
                output = torch.as_tensor(rival.meaning(case, run()))
            except rivals.Absent as absent:
                found[i] = dataclasses.replace(blank[i], reason=str(absent))
                continue
            except Exception as error:  # whatever a rival stumbles over, the others are still measured
                found[i] = dataclasses.replace(blank[i], reason=f"failed: {reason(error)}")
                continue
            wrong, allowed = case.error(rival.precision, output), case.allowed(rival.precision, output)
            refused = None if wrong <= allowed else f"wrong answer: error {wrong:.3g}, allowed {allowed:.3g}"
            found[i] = dataclasses.replace(blank[i], error=wrong if math.isfinite(wrong) else None, reason=refused)
            if refused is None:
                ready[i] = run
        if ready:
            tell(f"{case.label}: timing {len(ready)} side by side")
            timed = timing.interleave(list(ready.values()), rounds, seconds, pause)
            for i, taken in zip(ready, timed, strict=True):
                found[i] = _with_times(found[i], taken, ceilings)
    return found


def run(
    families: Iterable[str] = ("network", "gemm"),
    groups: Iterable[str] = (),
    precisions: Iterable[str] = PRECISIONS,
    names: Iterable[str] = (),
    rounds: int = 15,
    seconds: float = 10.0,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
    done: Callable[[list[Result]], None] = lambda results: None,
) -> Run:
    """Measure families of cases beside every rival that is installed.

    families: of gemm, linear, conv, pool, quantize, codec, sparse, network.
    groups: shape files or networks (none: all).
    precisions: of fp32, bf16, int8. names: only rivals whose name contains one of these, and ours (none: all).
    rounds, seconds: at most so many rounds, about so many seconds of timing, a case. threads: for everybody (None:
    torch's). tell: gets progress. done: gets each case's results when it is finished.

    Raises:
        ValueError: an unknown family, precision or group, nothing measured in these precisions, or threads below 1.
    """
    families, groups, precisions, names = tuple(families), tuple(groups), tuple(precisions), tuple(names)
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precisions: must be of {', '.join(PRECISIONS)}, not {precision!r}")
    wanted = [(family, label, make) for family in families for label, make in shapes.cases(family, groups)]
    if not wanted:
        known = sorted(shapes.load_shapes())
        raise ValueError(
            f"groups: no case of {', '.join(families)} in {', '.join(groups)}; shape files: {', '.join(known)}"
        )
    return run_cases(wanted, precisions, names, rounds, seconds, threads, tell, done)


def run_cases(
    wanted: Sequence[tuple[str, str, shapes.Make]],
    precisions: Sequence[str] = PRECISIONS,
    names: Sequence[str] = (),
    rounds: int = 15,
    seconds: float = 10.0,
    threads: int | None = None,
    tell: Callable[[str], None] = lambda message: None,
    done: Callable[[list[Result]], None] = lambda results: None,
) -> Run:
    """`run` of cases that are given as (family, label, function that makes the case).

    Raises:
        ValueError: nothing is measured in these precisions, or threads below 1.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads: must be at least 1, not {threads}")
    families = list(dict.fromkeys(family for family, _, _ in wanted))
    lowered = [name.lower() for name in names]
    entrants = [
        r
        for r in rivals.everybody()
        if r.precision in precisions and (not names or r.ours or any(name in r.name.lower() for name in lowered))
    ]
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with _many_graphs():
            tell("measuring the machine's peaks")
            facts = machines.machine()
            ceilings = peaks.measure() if facts.cpu_error is None else None
            results: list[Result] = []
            for family, label, make in wanted:
                tell(f"making {label}")
                try:
                    case = make()
                except ModuleNotFoundError as error:
                    fresh = [Result(family, label, "", "all", "", False, 0.0, 0.0, reason=str(error))]
                else:
                    fresh = measure_case(case, entrants, ceilings, rounds, seconds, tell=tell)
                    del case
                if not fresh:  # a case of other precisions only
                    continue
                results += fresh
                done(fresh)
                torch._dynamo.reset()
        if not results:
            raise ValueError(f"precisions: no case of {', '.join(families)} is measured in {', '.join(precisions)}")
        settings = {
            "rounds": rounds,
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "families": families,
        }
        return Run(
            tuple(results),
            ceilings,
            dataclasses.asdict(facts),
            versions(),
            settings,
            datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Of what takes part and is installed."""
    found = {}
    for name in VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found | remote.versions()


def _with_times(result: Result, taken: timing.Timing, ceilings: peaks.Peaks | None) -> Result:
    share, limit = None, None
    if ceilings is not None:
        least, limit = ceilings.seconds(result.precision, result.work, result.traffic)
        share = least / taken.median
    return dataclasses.replace(
        result,
        median_ms=taken.median * 1e3,
        best_ms=taken.best * 1e3,
        spread=taken.spread,
        rounds=len(taken.samples),
        gops=result.work / taken.median / 1e9,
        share=share,
        limit=limit,
    )


def _spoil(case: Case) -> None:
    """Leave garbage in memory that was just freed: what a rival forgets to write must not read as an earlier
    right answer."""
    oracle = case.oracle
    spoilt = [torch.full(oracle.shape, float("nan"), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)] * 2
    spoilt += [torch.full(oracle.shape, 0xA5, dtype=torch.uint8) for _ in range(4)]
    del spoilt


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Converters print and warn at length; a rival that does not work is told of in its result."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _many_graphs() -> Iterator[None]:
    """Dynamo gives up on a function after a few recompilations and runs it eagerly, silently: not while we
    measure it."""
    with torch._dynamo.config.patch(
        recompile_limit=10_000, accumulated_recompile_limit=100_000, fail_on_recompile_limit_hit=True
    ):
        yield
