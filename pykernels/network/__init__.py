"""Model surgery on graphs: capture, fold, match, lower, report. `pykernels.optimize` is the front door."""

from __future__ import annotations

from pykernels.graph.capture import NotExportable, capture, prepare
from pykernels.network.emit_fx import lower
from pykernels.network.report import Fused, Left, Report

__all__ = ["Fused", "Left", "NotExportable", "Report", "capture", "lower", "prepare"]
