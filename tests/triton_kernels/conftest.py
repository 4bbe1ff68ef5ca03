from __future__ import annotations

from collections.abc import Iterator

import pytest
from interpreter import Interpreter


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
