"""Networks split over ranks and processes; with the codecs of :mod:`pykernels.comm` on the wires of training."""

from pykernels.parallel.chain import Chain, PartError
from pykernels.parallel.pipeline import STAGE_CODECS, StageHandle, register_stage
from pykernels.parallel.split import Split, split
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
