"""A model as a network of steps: match, assemble, emit, report. `pykernels.optimize` is the front door."""

from __future__ import annotations

from pykernels.graph.export import NotExportable
from pykernels.network.assemble import assemble
from pykernels.network.emit_fx import emit_fx
from pykernels.network.match import match
from pykernels.network.report import Fused, Left, Report
from pykernels.network.step import Network, Step, Value

__all__ = ["Fused", "Left", "Network", "NotExportable", "Report", "Step", "Value", "assemble", "emit_fx", "match"]
