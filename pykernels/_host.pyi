"""CPU features, build facts, gradient codecs on NumPy arrays; the compiled module is csrc/host/module.cpp."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

def isas() -> dict[str, bool]: ...
def choose_isa() -> tuple[str, str | None]: ...
def build() -> dict[str, str]: ...

# As in pykernels.ops.compress, on C-contiguous arrays; gradients are float32, float16 or uint16 (the bits of bfloat16).
def compress_encode(
    x: NDArray[Any],
    residual: NDArray[np.float32] | None,
    payload: NDArray[np.uint8],
    segments: NDArray[np.int64],
    codec: str,
    block: int,
    stochastic: bool = False,
    seed: int = 0,
) -> None: ...
def compress_decode(
    payloads: NDArray[np.uint8],
    out: NDArray[Any],
    segments: NDArray[np.int64],
    codec: str,
    block: int,
    factor: float = 1.0,
    weights: NDArray[np.float32] | None = None,
) -> None: ...
def compress_reduce(
    payloads: NDArray[np.uint8],
    residual: NDArray[np.float32] | None,
    payload: NDArray[np.uint8],
    segments: NDArray[np.int64],
    codec: str,
    block: int,
    factor: float,
    stochastic: bool = False,
    seed: int = 0,
) -> None: ...
