"""The slices of .ci/run: all have their turn, the deadline holds, and only a failure fails."""

from __future__ import annotations

import importlib.util
import pathlib
import shlex
import sys
import time
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def ci() -> ModuleType:
    spec = importlib.util.spec_from_file_location("slices", ROOT / ".ci" / "slices.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_slice_comes_first_at_one_of_as_many_commits(ci: ModuleType) -> None:
    turns = [ci.rotated(ci.SLICES, turn) for turn in range(40, 40 + len(ci.SLICES))]
    assert {slices[0].name for slices in turns} == {slice.name for slice in ci.SLICES}
    assert all(sorted(slices) == sorted(ci.SLICES) for slices in turns)


def test_a_turn_is_found_in_this_checkout(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": ["false", "beef"], "rev-list": ["17"]}
    monkeypatch.setattr(ci, "git", lambda *arguments: answers[arguments[0]])
    assert ci.turn() == 17
    answers["rev-parse"][0] = "true"  # a shallow clone counts one commit for ever
    assert ci.turn() == 0xBEEF


def test_slices_leave_no_test_out(ci: ModuleType) -> None:
    """The emulated device is not of any isa: its tests, all in tests/cuda, have a slice of their own."""

    def files(goal: str) -> list[pathlib.Path]:
        patterns = [
            pattern for slice in ci.SLICES if slice.make[0] == goal for pattern in slice.make[1].split("=")[1].split()
        ]
        places = [place for pattern in patterns for place in ROOT.glob(pattern)]
        return [file for place in places for file in (place.rglob("test_*.py") if place.is_dir() else [place])]

    assert {"test-emulated", "test-slow"} <= {slice.make[0] for slice in ci.SLICES}
    everywhere = {file for file in (ROOT / "tests").rglob("test_*.py") if ROOT / "tests/cuda" not in file.parents}
    emulated, sanitized = files("emulate"), files("sanitize")
    assert sorted(emulated) == sorted(everywhere)
    assert sorted(sanitized) == sorted((ROOT / "tests/ops").glob("test_*.py"))


@pytest.mark.parametrize(
    ("script", "seconds", "answer"),
    [
        ("echo fine", 60.0, "passed"),
        ("echo fine; exit 2", 60.0, "failed"),
        ("echo 'FAILED is a word'; echo 'tests/test_a.py::test_b PASSED'; sleep 60", 2.0, "not finished"),
        ("echo 'FAILED tests/test_a.py::test_b - assert 0'; sleep 60", 2.0, "failed"),
        ("echo '== 1 failed, 3 passed in 4.00s =='; sleep 60", 2.0, "failed"),
    ],
)
def test_what_became_of_a_slice(
    ci: ModuleType, script: str, seconds: float, answer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert ci.run(["sh", "-c", script], seconds) == answer
    assert capfd.readouterr().out


def test_closing_lines_of_a_suite_that_is_cut_off_are_printed(
    ci: ModuleType, tmp_path: pathlib.Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Through make and a shell, as slices run."""
    (tmp_path / "test_long.py").write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n")
    suite = f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTEST_ADDOPTS= {shlex.quote(sys.executable)} -m pytest -q test_long.py"
    (tmp_path / "Makefile").write_text(f"test:\n\tcd . && {suite}\n")
    assert ci.run(["make", "-C", str(tmp_path), "test"], 10.0) == "not finished"
    assert "1 passed in" in capfd.readouterr().out


def test_what_does_not_hear_is_killed(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ci, "GRACE", 0.5)
    begin = time.monotonic()
    assert ci.run(["sh", "-c", "trap '' INT; sleep 60"], 1.0) == "not finished"
    assert time.monotonic() - begin < 20


def test_the_deadline_is_kept_and_said(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[list[str], float]] = []

    def run(command: list[str], seconds: float) -> str:
        given.append((command, seconds))
        return "passed"

    monkeypatch.setattr(ci, "run", run)
    slices = [
        ci.Slice("long", ["long"], 100),
        ci.Slice("longer", ["longer"], 200),
        ci.Slice("short", ["short"], 2),
        ci.Slice("elsewhere", ["elsewhere"], 2, tool="no-such-tool"),
    ]
    found = dict(ci.run_slices(slices, 600, ["make", "VENV=v"]))
    assert [command for command, _ in given] == [["make", "VENV=v", "long"], ["make", "VENV=v", "short"]]
    assert all(seconds < 600 - ci.GRACE for _, seconds in given)
    assert found["long"].startswith("passed after") and found["short"].startswith("passed after")
    assert found["longer"].startswith("not begun: it takes 200 minutes, and 9 are left")
    assert found["elsewhere"] == "not run: no-such-tool is not here"
    assert all("not begun" in answer for _, answer in ci.run_slices(slices[:3], 10, ["make"]))


def test_only_a_failure_fails(ci: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"failed": 1, "not finished": 0, "passed": 0}
    monkeypatch.setattr(ci, "turn", lambda: 5)
    for answer, code in answers.items():
        monkeypatch.setattr(ci, "run", lambda command, seconds, answer=answer: answer)
        assert ci.main("3000", "VENV=v") == code
