"""Where hooks wait: whatever is raised there must reach the backward pass, which else waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pykernels.comm.lanes import Averaged, Lanes
from pykernels.comm.stats import Meter

SOON = 10.0  # seconds; a lane needs microseconds


class Arrived:
    """A collective that is done."""

    def wait(self) -> None:
        pass


def outcome(future: Averaged) -> Any:
    """What the future holds, or what it raises. Waits no longer than SOON, as a test that hangs says nothing."""
    end = time.monotonic() + SOON
    while not future.done() and time.monotonic() < end:
        time.sleep(1e-3)
    assert future.done(), "the bucket never arrives"
    try:
        return future.value()
    except Exception as error:
        return error


def way(bucket: torch.Tensor, works: int, end: BaseException | None = None) -> Iterator[Any]:
    for _ in range(works):
        yield "wait", Arrived()
        bucket += 1
    if end is not None:
        raise end


def test_a_bucket_goes_its_way() -> None:
    lanes, meter = Lanes(3, Meter()), Meter()
    lanes._meter = meter
    bucket = torch.zeros(1)
    assert outcome(lanes.run(bucket, way(bucket, 3))) is bucket
    assert bucket == 3 and list(meter.total.seconds) == ["wait"]


def test_a_way_longer_than_the_lanes_raises() -> None:
    lanes = Lanes(1, Meter())
    assert "IndexError" in str(outcome(lanes.run(torch.zeros(1), way(torch.zeros(1), 2))))


@pytest.mark.parametrize("error", [RuntimeError("of torch"), SystemExit("of anyone")])
def test_what_is_raised_on_the_way_reaches_every_bucket(error: BaseException) -> None:
    lanes = Lanes(2, Meter())
    found = outcome(lanes.run(torch.zeros(1), way(torch.zeros(1), 2, error)))
    assert isinstance(found, RuntimeError) and str(error) in str(found)
    with pytest.raises(RuntimeError, match=str(error)):
        lanes.run(torch.zeros(1), way(torch.zeros(1), 1))


def test_what_is_raised_before_the_first_wait_is_raised_at_once() -> None:
    lanes = Lanes(1, Meter())
    with pytest.raises(ValueError, match="at once"):
        lanes.run(torch.zeros(1), way(torch.zeros(1), 0, ValueError("at once")))
