"""Networks split over ranks, with the codecs of :mod:`pykernels.comm` on their wires."""

from pykernels.parallel.pipeline import STAGE_CODECS, StageHandle, register_stage
from pykernels.parallel.tensor import CompressedColwise, CompressedRowwise, tensor_parallel

__all__ = [
    "STAGE_CODECS",
    "CompressedColwise",
    "CompressedRowwise",
    "StageHandle",
    "register_stage",
    "tensor_parallel",
]
