"""Networks split over ranks and processes; with the codecs of :mod:`pykernels.comm` on the wires of training."""

import importlib
from typing import TYPE_CHECKING, Any

from pykernels.parallel.chain import Chain, PartError
from pykernels.parallel.split import Split, split

if TYPE_CHECKING:
    from pykernels.parallel.pipeline import STAGE_CODECS, StageHandle, register_stage
    from pykernels.parallel.tensor import CompressedColwise, CompressedRowwise, tensor_parallel

__all__ = [
    "STAGE_CODECS",
    "Chain",
    "CompressedColwise",
    "CompressedRowwise",
    "PartError",
    "Split",
    "StageHandle",
    "register_stage",
    "split",
    "tensor_parallel",
]

# What trains imports torch's pipelines and DTensor, for which whoever serves, and each part's process, would wait.
_TRAINING = {
    "STAGE_CODECS": "pipeline",
    "StageHandle": "pipeline",
    "register_stage": "pipeline",
    "CompressedColwise": "tensor",
    "CompressedRowwise": "tensor",
    "tensor_parallel": "tensor",
}


def __getattr__(name: str) -> Any:
    if name in _TRAINING:
        return getattr(importlib.import_module(f"{__name__}.{_TRAINING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
