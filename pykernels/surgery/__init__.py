"""Model surgery on graphs: capture, fold, match, lower, report. `pykernels.optimize` is the front door."""

from __future__ import annotations

from pykernels.surgery.capture import NotExportable, capture, prepare
from pykernels.surgery.lower import lower
from pykernels.surgery.report import Fused, Left, Report

__all__ = ["Fused", "Left", "NotExportable", "Report", "capture", "lower", "prepare"]
