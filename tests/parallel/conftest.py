from __future__ import annotations

from typing import Any

import pytest
import together
from ranks import run_ranks


@pytest.fixture(scope="session")
def found() -> list[dict[str, Any]]:
    """What each of two ranks answers, by function; tests that ask for it run in one process (their xdist_group)."""
    return run_ranks(2, together.everything)
