"""A replica's cores: its own, those of all its threads."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

CORES = sorted(os.sched_getaffinity(0))


def pinned(rank: int, count: int) -> str:
    """In a process of its own: where all of its threads may run, those that it starts afterwards, too."""
    code = f"""
        import os, threading, time
        threading.Thread(target=time.sleep, args=(5,), daemon=True).start()
        from pykernels.serve.cores import pin
        own = pin({rank}, {count})
        import torch
        torch.randn(500, 500) @ torch.randn(500, 500)
        found = {{frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")}}
        assert found == {{frozenset(own)}}, found
        print(*own)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_replicas_have_cores_of_their_own_and_begin_again_after_the_last() -> None:
    first, second = pinned(0, 1), pinned(1, 1)
    assert first != second
    assert pinned(len(CORES), 1) == first


def test_more_cores_than_there_are_are_refused() -> None:
    from pykernels.serve.cores import pin

    with pytest.raises(ValueError, match="threads: a replica needs 9999 cores"):
        pin(0, 9999)
