"""Finds and loads the ops libraries.

Importing pykernels never fails for a missing library: the first call of an op does, and says why.
"""

from __future__ import annotations

import pathlib
import sys
import warnings
from typing import Any, NoReturn

import torch

TORCH_FLOOR = (2, 10)  # what the libraries' stable ABI asks for: TORCH_TARGET_VERSION in CMakeLists.txt


# Of an editable installation there are two, the sources and what was built of them.
FOLDERS: list[str] = list(sys.modules["pykernels"].__path__)
BUILD = {
    "pykernels_cpu": "install a wheel, or build it with `pip install --no-build-isolation -e .` in a checkout",
    "pykernels_cuda": (
        "build it where nvcc is: `PYKERNELS_CUDA=on make build` or `PYKERNELS_CUDA=on pip install .` in a checkout"
    ),
}


def library_path(name: str) -> pathlib.Path | None:
    """The file of the ops library `name` in this installation, or None."""
    for folder in FOLDERS:
        path = pathlib.Path(folder) / f"{name}.so"
        if path.exists():
            return path
    return None


def load(name: str) -> str | None:
    """Load one ops library; None when it is loaded, else the reason, as a sentence the user can act on."""
    path = library_path(name)
    if path is None:
        return f"{name}.so is not in {', '.join(FOLDERS)}: {BUILD[name]}"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < TORCH_FLOOR:
        floor = ".".join(map(str, TORCH_FLOOR))
        return (
            f"pykernels needs torch {floor} or newer, this is torch {torch.__version__}: pip install 'torch>={floor}'"
        )
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} could not be loaded beside torch {torch.__version__}: {error}"
    return None


def isa_complaint() -> str | None:
    """What is wrong with the environment variable PYKERNELS_ISA, or None.

    None, too, where `_host` was built for another CPython than this: the ops libraries serve every one.
    """
    try:
        from pykernels import _host
    except ImportError:
        return None
    complaint: str | None = _host.choose_isa()[1]
    return complaint


class MissingOps:
    """Stands in for ``torch.ops.pykernels`` when its library did not load: every op raises, with the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, op: str) -> NoReturn:
        if op.startswith("__"):  # what Python, copy and pickle probe for
            raise AttributeError(op)
        raise RuntimeError(f"torch.ops.pykernels.{op} is not there: {self._reason}")


CPU_ERROR: str | None = load("pykernels_cpu")
# The CUDA library is a faster choice for what Triton does, too: without it nothing is missing but speed.
CUDA_ERROR: str | None = CPU_ERROR or (
    f"torch {torch.__version__} is built without CUDA" if torch.version.cuda is None else load("pykernels_cuda")
)
if CPU_ERROR is not None:
    namespace: Any = torch.ops
    namespace.pykernels = MissingOps(CPU_ERROR)
elif (complaint := isa_complaint()) is not None:
    warnings.warn(f"{complaint}; running {torch.ops.pykernels._isa()}", RuntimeWarning, stacklevel=2)
