"""A setup: checked when it is made, and again when it is read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import pykernels as pk
from pykernels.tune import Trial

TRIALS = (Trial(1, 2, 4, 10.0, 14.0, 800.0, 500, 9), Trial(2, 1, 8, 16.0, 25.0, 490.5, 90, 3))
SETUP = pk.Setup(
    threads=1,
    instances=2,
    batch=4,
    device="cpu",
    bound_ms=20.0,
    latency_ms=10.0,
    p99_ms=14.0,
    items_per_second=800.0,
    calls=500,
    cpu="A CPU",
    cores=2,
    isa="avx2",
    version="0.1.0",
    tried=TRIALS,
    untried=3,
)


def changed(**fields: Any) -> str:
    return json.dumps({**dataclasses.asdict(SETUP), **fields})


def test_json_and_files_give_the_same_setup_back(tmp_path: Path) -> None:
    SETUP.save(tmp_path / "setup.json")
    assert pk.Setup.load(tmp_path / "setup.json") == SETUP == pk.Setup.from_json(SETUP.to_json())
    assert json.loads(SETUP.to_json())["tried"][1]["items_per_second"] == 490.5


def test_a_setup_made_by_hand_needs_threads_and_instances() -> None:
    assert pk.Setup.from_json('{"threads": 2, "instances": 3}') == pk.Setup(2, 3)
    assert pk.Setup(2, 3).report() == "3 x 2 threads, batch 1"
    assert str(pk.Setup(1, 2, 8, "cuda:1")) == "2 x 1 threads, batch 8 on cuda:1"


def test_it_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SETUP.threads = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "setup: it cannot be read: "),
        ("[" * 100_000, "setup: it cannot be read: "),
        ("[]", "setup: a JSON object is needed, not list"),
        ('{"threads": 1}', "setup: 'instances' is missing"),
        ('{"threads": 1, "threads": 1, "instances": 1}', "a key stands in it twice"),
        (changed(colour="red"), "setup: unknown key 'colour'; the keys are threads, instances, batch"),
        (changed(threads="2"), "setup: threads must be a whole number of 1 to 1048576, not '2'"),
        (changed(threads=2.0), "setup: threads must be a whole number"),
        (changed(threads=True), "setup: threads must be a whole number"),
        (changed(instances=0), "setup: instances must be a whole number"),
        (changed(batch=1 << 21), "setup: batch must be a whole number"),
        (changed(cores=-1), "setup: cores must be a whole number"),
        (changed(untried=-1), "setup: untried must be a whole number of 0 to"),
        (changed(p99_ms=-1.0), "setup: p99_ms must be a finite number above 0, not -1.0"),
        (changed(latency_ms="fast"), "setup: latency_ms must be a finite number"),
        (changed(items_per_second=float("nan")), "NaN is no number"),
        (changed(bound_ms=0).replace('"bound_ms": 0', '"bound_ms": 1e999'), "setup: bound_ms must be a finite number"),
        (changed(cpu=3), "setup: cpu must be text, not 3"),
        (changed(device="tpu"), "setup: device must be cpu, cuda or cuda:N, not 'tpu'"),
        (changed(device="cuda:x"), "setup: device must be cpu, cuda or cuda:N"),
        (changed(device=["cpu"]), "setup: device must be cpu"),
        (changed(gpu=1), "setup: gpu must be text, not 1"),
        (
            changed(tried=[{**dataclasses.asdict(TRIALS[0]), "device": None}]),
            "trial: device must be cpu, cuda or cuda:N",
        ),
        (changed(tried={}), "setup: tried must be a list"),
        (changed(tried=[1]), r"tried\[0\]: a JSON object is needed, not int"),
        (changed(tried=[{}]), r"tried\[0\]: 'threads' is missing"),
        (changed(tried=[{**dataclasses.asdict(TRIALS[0]), "calls": 0}]), "trial: calls must be a whole number"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pk.Setup.from_json(text)
    (tmp_path / "setup.json").write_text(text)
    with pytest.raises(ValueError, match=f"path: .*setup.json: .*{message}"):
        pk.Setup.load(tmp_path / "setup.json")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "setup.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"path: .*setup\.json"):
        pk.Setup.load(tmp_path / "setup.json")


def test_what_is_made_in_python_is_checked_as_well() -> None:
    with pytest.raises(ValueError, match="setup: instances must be a whole number"):
        pk.Setup(1, 0)
    with pytest.raises(ValueError, match="setup: tried must be a tuple of Trial"):
        pk.Setup(1, 1, tried=[TRIALS[0]])  # type: ignore[arg-type]


def test_the_report_shows_what_was_tried_chosen_and_over_the_bound() -> None:
    lines = SETUP.report().splitlines()
    assert lines[0].split() == [
        "device",
        "threads",
        "instances",
        "batch",
        "ms",
        "p99",
        "ms",
        "items/s",
        "calls",
        "rounds",
    ]
    assert lines[1].split() == ["cpu", "1", "2", "4", "10.00", "14.00", "800.0", "500", "9", "chosen"]
    assert lines[2].split() == ["cpu", "2", "1", "8", "16.00", "25.00", "490.5", "90", "3", "over", "the", "bound"]
    assert lines[3].startswith("most items/s with p99 up to 20 ms: 2 x 1 threads, batch 4: 10.00 ms")
    assert lines[4].startswith("not tried: 3 setups")
    assert lines[5] == "A CPU, 2 cores, avx2, pykernels 0.1.0"
