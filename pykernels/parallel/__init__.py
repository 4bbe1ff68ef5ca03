"""Networks split over ranks, with the codecs of :mod:`pykernels.comm` on their wires."""

from pykernels.parallel.pipeline import STAGE_CODECS, StageHandle, register_stage

__all__ = ["STAGE_CODECS", "StageHandle", "register_stage"]
