"""Shares of a check, each in a process of its own; kernels compiled by many processes."""

from __future__ import annotations

import functools
import os
import pathlib
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu import warm
from benchmarks.gpu.side_by_side import Share, Skipped, run, share_of


def counting(number: int, of: int) -> Iterator[tuple[str, str | None, int, int]]:
    for i in share_of(range(7), number, of):
        yield f"thing {i}", "it is five" if i == 5 else None, os.getpid(), torch.get_num_threads()


def slow(number: int, of: int) -> Iterator[int]:
    yield os.getpid()
    time.sleep(600)


def breaking(number: int, of: int) -> Iterator[str]:
    yield "before"
    raise ValueError("broken")


def dying(number: int, of: int) -> Iterator[str]:
    yield "before"
    os._exit(3)


def skipping(number: int, of: int) -> Iterator[str]:
    raise Skipped("there is no GPU")
    yield ""


def test_shares_work_in_processes_of_their_own_and_nothing_is_looked_at_twice() -> None:
    news = list(run([Share("count", counting, i, 2) for i in range(2)], 2, 1))
    found = {n.value[0]: n.value[1] for n in news if n.value is not None}
    assert found == {f"thing {i}": "it is five" if i == 5 else None for i in range(7)}
    assert len({n.value[2] for n in news if n.value is not None} | {os.getpid()}) == 3
    assert {n.value[3] for n in news if n.value is not None} == {1}, "torch's threads"
    assert sum(n.seconds is not None for n in news) == 2


def test_what_breaks_or_dies_is_told_of_and_takes_nothing_with_it() -> None:
    work = {"breaking": breaking, "dying": dying, "count": counting, "skipping": skipping}
    news = list(run([Share(part, function) for part, function in work.items()], 2))
    errors = {n.share.part: n.error for n in news if n.error is not None}
    assert errors == {"breaking": "ValueError: broken", "dying": "its process ended with status 3"}
    assert [n.skipped for n in news if n.skipped] == ["there is no GPU"]
    assert Counter(n.share.part for n in news if n.value is not None) == {"breaking": 1, "dying": 1, "count": 7}
    assert {n.share.part for n in news if n.seconds is not None} == set(work)


def test_news_come_while_the_work_goes_on_and_its_end_can_be_forced() -> None:
    news = run([Share("slow", slow)], 1)
    pid = next(news).value
    news.close()  # ends the process, too
    for _ in range(100):
        if not pathlib.Path(f"/proc/{pid}/cmdline").exists() or not pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
            return
        time.sleep(0.1)
    pytest.fail("it still runs")


def test_shares_are_every_so_many_th() -> None:
    assert share_of([1, 2, 3, 4, 5], 1, 2) == [2, 4] and str(Share("a", slow, 1, 2)) == "share 2 of 2"


class TestWarm:
    def test_tasks_are_done_by_other_processes_and_what_fails_is_told_of(self, tmp_path: pathlib.Path) -> None:
        tasks = [functools.partial(tell, tmp_path / str(i)) for i in range(3)]
        assert warm.warm([*tasks, fail, fail], 1) == {"RuntimeError: no such kernel": 2}
        assert {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}
        assert str(os.getpid()) not in {path.read_text() for path in tmp_path.iterdir()}

    def test_a_process_that_ends_does_not_end_ours(self) -> None:
        (words,) = warm.warm([end], 1)
        assert "ended early" in words

    def test_nothing_to_do_starts_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(warm, "ProcessPoolExecutor", None)
        assert warm.warm([]) == {}

    def test_launches_compile_and_do_not_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        jit = pytest.importorskip("triton.runtime.jit")
        launches: list[dict[str, Any]] = []
        monkeypatch.setattr(jit.JITFunction, "run", lambda kernel, *args, **named: launches.append(named))
        kernel = jit.JITFunction(_kernel)
        with warm.kernels_only():
            kernel[(1,)](3)
        kernel[(1,)](3)
        assert [launch["warmup"] for launch in launches] == [True, False]


def _kernel(n):  # type: ignore[no-untyped-def]
    pass


def tell(path: pathlib.Path) -> None:
    path.write_text(str(os.getpid()))


def fail() -> None:
    raise RuntimeError("no such kernel")


def end() -> None:
    os._exit(1)
