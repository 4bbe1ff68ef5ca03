"""Rivals in another process: a child that is a few lines of Python stands in for the one that converts networks."""

from __future__ import annotations

import pathlib
import sys

import pytest
import torch
from torch import nn

from pykernels.bench import harness
from pykernels.bench.case import Case
from pykernels.bench.rivals import Absent, remote
from pykernels.bench.timing import interleave

# As remote_child.py, with an engine that runs the program as it is and one that lacks a package.
CHILD = """
import importlib, importlib.util, os, sys
spec = importlib.util.spec_from_file_location("remote_child", {path!r})
child = importlib.util.module_from_spec(spec)
spec.loader.exec_module(child)

def eager(program, inputs, batches, precision, threads):
    print("chatter")
    module = program.module()
    return lambda: module(*inputs)

def lacking(*anything):
    importlib.import_module("no_such_package")

def dying(*anything):
    print("the last word", file=sys.stderr, flush=True)
    os._exit(3)

child.ENGINES.update(eager=eager, lacking=lacking, dying=dying)
with os.fdopen(os.dup(1), "w") as answers:
    os.dup2(2, 1)
    child.serve(sys.stdin, answers)
"""


@pytest.fixture
def rival(tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(path=str(remote.CHILD)))
    monkeypatch.setattr(remote, "CHILD", script)
    site = pathlib.Path(torch.__file__).parent.parent
    start = remote.subprocess.Popen

    def popen(command, env, **options):
        return start(command, env={**env, "PYTHONPATH": str(site)}, **options)

    monkeypatch.setattr(remote.subprocess, "Popen", popen)

    def make(engine: str) -> remote.Remote:
        monkeypatch.setenv(f"PYKERNELS_{engine.upper()}_PYTHON", sys.executable)
        made = remote.ExecuTorch("fp32")
        made.engine, made.name = engine, engine
        return made

    return make


@pytest.fixture
def case() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(1, 3, 8, 8)
    return Case("network", "test", "tiny", 1.0, {"fp32": 1.0}, model, (x,), None, (x,), {}, precisions=("fp32",))


def test_a_network_goes_to_its_process_and_is_timed_there(rival, case):
    found = {
        r.rival: r
        for r in harness.measure_case(case, [rival(e) for e in ("eager", "lacking", "dying")], rounds=3, seconds=0.0)
    }
    assert found["eager"].reason is None and found["eager"].rounds == 3 and found["eager"].error < 1e-6
    assert "no_such_package" in found["lacking"].reason
    assert "ended with 3: the last word" in found["dying"].reason


def test_the_process_ends_with_what_it_was_made_for(rival, case):
    child = rival("eager").prepare(case)
    process = child.process
    assert process.poll() is None and child.seconds(2) > 0
    del child
    assert process.poll() == 0


def test_an_interpreter_that_is_not_there_is_told_of_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("PYKERNELS_EXECUTORCH_PYTHON", str(tmp_path / "python"))
    with pytest.raises(Absent, match="PYKERNELS_EXECUTORCH_PYTHON: no interpreter"):
        remote.interpreter("executorch", "executorch")
    monkeypatch.delenv("PYKERNELS_EXECUTORCH_PYTHON")
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    with pytest.raises(Absent, match=r"make \.venv-executorch"):
        remote.interpreter("executorch", "no_such_package")
    python = tmp_path / ".venv-executorch" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert remote.interpreter("executorch", "no_such_package") == str(python)


def test_a_call_with_a_watch_of_its_own_is_timed_by_it():
    class Elsewhere:
        def __call__(self) -> None:
            raise AssertionError("only asked for the answer, not for times")

        def seconds(self, times: int) -> float:
            return 0.25 * times

    (taken,) = interleave([Elsewhere()], rounds=3, pause=0.0)
    assert taken.samples == (0.25,) * 3
