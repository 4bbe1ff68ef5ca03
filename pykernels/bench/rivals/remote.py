"""Rivals that live in a process of their own: each wants an interpreter, and a torch, beside ours.

They are installed where their requirements do not meet ours: `PYKERNELS_<ENGINE>_PYTHON` names the interpreter, or the
environment `<ours>-<engine>` has it (`.venv-executorch` beside `.venv`). The network travels as an exported program; a
call is a line there and a line back, and the watch stands in the child, around the work alone (`remote_child.py`).
"""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import Any

import torch

from pykernels.bench.case import Case
from pykernels.bench.rivals.base import Absent, Rival, Run, calibration_parts

CHILD = pathlib.Path(__file__).with_name("remote_child.py")
PATIENCE = 900.0
"""Seconds until a child that does not answer is given up: to convert a large network takes minutes."""


class Remote(Rival):
    """A rival in another process. engine: which of `remote_child.ENGINES`; module: what its interpreter must have."""

    engine: str
    module: str
    families = frozenset({"network"})

    def prepare(self, case: Case) -> Run:
        if case.model is None:
            raise Absent("the case has no float form")
        python = interpreter(self.engine, self.module)
        with tempfile.TemporaryDirectory() as folder:
            inputs = tuple(x.contiguous() for x in case.inputs)
            with torch.no_grad():
                torch.export.save(torch.export.export(case.model, inputs), pathlib.Path(folder, "model.pt2"))
            torch.save(inputs, pathlib.Path(folder, "inputs.pt"))
            torch.save(calibration_parts(case), pathlib.Path(folder, "calibration.pt"))
            child = Child(python)
            child.ask(
                do="prepare", engine=self.engine, folder=folder, precision=self.precision,
                threads=torch.get_num_threads(),
            )  # fmt: skip
        return child


class Child:
    """The process of one prepared network: called, it does the work and returns the answer."""

    def __init__(self, python: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        process = subprocess.Popen(
            [python, str(CHILD)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
        )  # fmt: skip
        self.process = process
        self.complaints: collections.deque[str] = collections.deque(maxlen=20)
        assert process.stderr is not None
        threading.Thread(target=self.complaints.extend, args=(process.stderr,), daemon=True).start()
        self.folder = tempfile.TemporaryDirectory()
        self._end = weakref.finalize(self, _end, process)

    def __call__(self) -> torch.Tensor:
        path = pathlib.Path(self.folder.name, "answer.pt")
        self.ask(do="answer", path=str(path))
        answer: torch.Tensor = torch.load(path, weights_only=True)
        return answer

    def seconds(self, times: int) -> float:
        """How long `times` runs take, by the child's own watch."""
        return float(self.ask(do="run", times=times)["seconds"])

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            Absent: the child cannot do it, and says why.
            RuntimeError: it failed, died, or did not answer in `PATIENCE` seconds.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            last = next((text.strip() for text in reversed(self.complaints) if text.strip()), "no word")
            raise RuntimeError(f"its process ended with {self.process.wait()}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "absent" in answer:
            raise Absent(answer["absent"])
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return answer


def interpreter(engine: str, module: str) -> str:
    """The Python that has `engine`.

    Raises:
        Absent: there is none.
    """
    variable = f"PYKERNELS_{engine.upper()}_PYTHON"
    if named := os.environ.get(variable):
        if not os.access(named, os.X_OK):
            raise Absent(f"{variable}: no interpreter at {named}")
        return named
    ours = pathlib.Path(sys.prefix)
    beside = ours.with_name(f"{ours.name}-{engine}") / "bin" / "python"
    if beside.exists():
        return str(beside)
    if importlib.util.find_spec(module) is not None:
        return sys.executable
    raise Absent(f"{module} is not installed: make .venv-{engine}/.made, or name an interpreter in {variable}")


def versions() -> dict[str, str]:
    """Of the engines whose interpreter is there."""
    found = {}
    for rival in (ExecuTorch, LiteRT):
        try:
            python = interpreter(rival.engine, rival.module)
        except Absent:
            continue
        asking = "import importlib.metadata as m, sys; print(m.version(sys.argv[1]))"
        told = subprocess.run([python, "-c", asking, rival.module], capture_output=True, text=True, check=False)
        if told.returncode == 0:
            found[rival.module] = told.stdout.strip()
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """The end of its input tells the child to leave; one that does not is killed."""
    assert process.stdin is not None and process.stdout is not None
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):  # it died before it had read all
            pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class ExecuTorch(Remote):
    """ExecuTorch with XNNPACK's delegate; int8 by its XNNPACKQuantizer, per channel."""

    name = "ExecuTorch"
    engine = "executorch"
    module = "executorch"


class LiteRT(Remote):
    """LiteRT (TensorFlow Lite), converted by litert-torch; int8 by ai-edge-quantizer's static recipe."""

    name = "LiteRT"
    engine = "litert"
    module = "litert_torch"
