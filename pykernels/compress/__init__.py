"""A network made smaller and quicker until it keeps a budget: pruned, distilled, in the precisions that suit it."""

from __future__ import annotations

from .compress import Compressed, Interrupted, Stopped, compress
from .report import Report, Row

__all__ = ["Compressed", "Interrupted", "Report", "Row", "Stopped", "compress"]
