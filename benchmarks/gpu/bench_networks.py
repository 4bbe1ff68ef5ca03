"""Whole networks on a GPU: ours in int8 beside torch.compile and TensorRT, a process a network.

Lowering, calibrating and torch.compile's tracing take a core for minutes altogether, and the GPU hardly at all; so the
networks are made ready side by side, and timed in turn when all are. An int8 network is kept in ~/.cache/pykernels,
under a name that changes with our sources and torch's version.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import Any

import torch

import pykernels
from benchmarks.gpu.side_by_side import News, Share, run
from benchmarks.gpu.timing import Case
from benchmarks.gpu.warm import cores
from pykernels.bench import families
from pykernels.ops import _load

__all__ = ["NETWORKS", "Networks", "cases"]

# And the batches: images of 224 x 224, texts of 128 tokens.
NETWORKS = {"resnet50": (1, 32, 128), "mobilenet_v2": (1, 128), "efficientnet_b0": (1, 128), "vit_b_16": (1, 32),
            "bert_base": (1, 32)}  # fmt: skip
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
Row = dict[str, Any]


def _state() -> str:
    """Of what an int8 network depends on: our sources, the CPU's library, torch."""
    root = pathlib.Path(pykernels.__file__).parent
    found = hashlib.sha256(torch.__version__.encode())
    for path in [*sorted(root.rglob("*.py")), _load.library_path("pykernels_cpu")]:
        assert path is not None
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def lowered(name: str, case: Any) -> pykernels.Optimized:
    """The network in int8, on the CPU."""
    folder = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "pykernels" / "gpu-bench"
    path = folder / f"{name}-{_state()}.pk"
    if path.exists():
        return pykernels.load(path)
    with torch.no_grad():
        network = pykernels.optimize(case.model, case.inputs[0], "int8", list(case.calibration))
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    network.save(unfinished)
    unfinished.replace(path)
    return network


def as_half(model: torch.nn.Module, dtype: torch.dtype, device: str) -> torch.nn.Module:
    half = copy.deepcopy(model).to(device, dtype)
    return half.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def cases(name: str, batches: tuple[int, ...], autotune: bool = False, device: str = "cuda") -> Iterator[Case]:
    """A row for each batch, ready to be timed, but for what measures as it is made, and so waits for its turn:
    max-autotune, and TensorRT where torch_tensorrt is installed."""
    case = families.network_case(name, 2)
    ours = lowered(name, case).to(device)
    ours.cuda_graph = False  # `compare` captures every rival
    halves = {precision: as_half(case.model, dtype, device) for precision, dtype in HALVES.items()}
    ways: dict[str, dict[str, Any]] = {"torch.compile {}": {}}
    if autotune:
        ways["torch.compile {} max-autotune"] = {"mode": "max-autotune-no-cudagraphs"}
        if importlib.util.find_spec("torch_tensorrt"):  # typed: each product in the precision of its weights
            ways["TensorRT {}"] = {"backend": "tensorrt", "options": {"use_explicit_typing": True}}
    compiled = {
        way.format(precision): (torch.compile(half, dynamic=False, **options), HALVES[precision])
        for way, options in ways.items()
        for precision, half in halves.items()
    }
    for batch in batches:
        x = torch.cat([case.inputs[0]] * batch)[:batch].to(device)
        x = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
        calls: dict[str, Callable[[], Any]] = {"pykernels int8": functools.partial(ours, x)}
        for title, (network, dtype) in compiled.items():
            calls[title] = functools.partial(network, x.to(dtype) if x.is_floating_point() else x)
        with torch.no_grad():
            for title, call in calls.items():
                if "max-autotune" not in title and "TensorRT" not in title:
                    call()
        yield Case({"network": name, "batch": batch}, functools.partial(dict, calls), repeat=1)


def measured(
    name: str, rounds: int, autotune: bool, go: Any, turn: Any, number: int, of: int
) -> Iterator[tuple[str, Any]]:
    """In a process of its own: that it has begun, that it is ready; once `go` is set, rows and lines in its turn."""
    yield "begun", None
    torch.backends.cudnn.benchmark = True
    ready = list(cases(name, NETWORKS[name], autotune))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    yield "ready", None
    go.wait()
    with turn, torch.no_grad():
        for case in ready:
            row = case.measure(rounds)
            yield "row", (row, case.line(row))


class Networks:
    """All of them: `start`, `wait` until they are ready, `measure`.

    Attributes:
        errors: of networks that did not run, and why.
    """

    def __init__(self, rounds: int, autotune: bool) -> None:
        context = get_context("spawn")
        self._go, turn = context.Event(), context.Lock()
        how = (rounds, autotune, self._go, turn)
        shares = [Share(name, functools.partial(measured, name, *how)) for name in NETWORKS]
        self._news = run(shares, len(shares), max(1, cores() // len(shares)))
        self._seen: dict[str, str] = dict.fromkeys(NETWORKS, "")
        self.errors: list[str] = []

    def _hear(self, words: tuple[str, ...]) -> None:
        """Until each network has said one of `words`, or has ended."""
        while not all(seen in words for seen in self._seen.values()):
            self._note(next(self._news))

    def _note(self, news: News) -> None:
        name = news.share.part
        if news.error is not None:
            self.errors.append(f"{name}: {news.error}")
        elif news.seconds is not None:
            self._seen[name] = "ended"
        else:
            self._seen[name] = news.value[0]

    def start(self) -> None:
        """Returns when all processes have begun, and goes on without."""
        self._hear(("begun", "ready", "ended"))

    def wait(self) -> None:
        self._hear(("ready", "ended"))

    def measure(self) -> Iterator[tuple[Row, str]]:
        """Rows and their lines."""
        self._go.set()
        for news in self._news:
            if news.value is not None:
                yield news.value[1]
            else:
                self._note(news)
