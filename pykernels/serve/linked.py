"""A network that is split, behind the same calls as one that is not: its parts are a process each, and several calls
are on their way through them at once."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from pykernels.parallel.chain import Chain, PartError
from pykernels.parallel.split import Split
from pykernels.serve.errors import Unavailable
from pykernels.serve.runner import Runner
from pykernels.tune.instances import check

__all__ = ["Linked"]


class Linked:
    """The parts of a network as a pipeline of processes, which end with this object or when it is closed.

    Args:
        folder: of the parts' files.
        threads: torch's, of each part.
        device: where the parts run. ``cuda`` is one CUDA device after the other, as far as there are any.

    Attributes:
        chain: the pipeline.
        gpus: numbers of the CUDA devices that the parts run on; none on the CPU.
        runner: where it is called: one call for each part, and one on its way.

    Raises:
        OSError, ValueError: as `Split.load`; or calls of a part write into something, or the device cannot be used.
        PartError: a part cannot be started.
    """

    def __init__(self, folder: Path, threads: int, device: str = "cpu") -> None:
        split = Split.load(folder)
        for part in split.parts:
            check(part)
        first, last = split.parts[0], split.parts[-1]
        self.input_names, self.output_names = first.input_names, last.output_names
        self.example, self.free, self.dynamic = first.example, first.free, first.dynamic
        self._first = first
        calls = len(split.parts) + 1
        there = torch.cuda.device_count() if device == "cuda" else 0
        devices = [f"cuda:{k % there}" if there else device for k in range(len(split.parts))]
        self.gpus = sorted({torch.device(name).index or 0 for name in devices if name != "cpu"})
        self.chain = Chain.of_folder(folder, threads, in_flight=calls, devices=devices)
        self._waiting = ThreadPoolExecutor(calls, thread_name_prefix="pykernels-chain")
        self.runner = Runner(self._waiting, calls)
        # Whoever still uses it when the repository lets it go holds it; then its processes end, in nobody's way.
        ending = threading.Thread(target=_end, args=(self.chain, self._waiting), daemon=True)
        self._finalizer = weakref.finalize(self, ending.start)
        self._finalizer.atexit = False  # parts end when this process does

    def nested(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Flat inputs as the positional and the keyword ones of a call."""
        return self._first.nested(inputs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's answer.

        Raises:
            PartError: the call failed in a part.
            Unavailable: the pipeline was given up.
        """
        try:
            return self.chain(*args, **kwargs)
        except PartError as error:
            if self.lost:
                raise Unavailable(f"the network's processes are lost: {error}", retry_after=1) from error
            raise

    @property
    def lost(self) -> bool:
        """Whether the pipeline was given up: it must be made anew."""
        return self.chain.death is not None

    def close(self) -> None:
        """End the parts, when all that was asked is answered."""
        if self._finalizer.detach() is not None:
            _end(self.chain, self._waiting)


def _end(chain: Chain, threads: ThreadPoolExecutor) -> None:
    chain.close()
    threads.shutdown()
