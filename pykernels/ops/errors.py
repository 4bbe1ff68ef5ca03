"""What a caught error says, in one line for a report."""

from __future__ import annotations

__all__ = ["reason"]


def reason(error: BaseException) -> str:
    """Its type and the first line of its message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
