from __future__ import annotations

from collections.abc import Iterator

import pytest
from interpreter import Interpreter
from launchers import Launchers


@pytest.fixture(scope="session")
def interpret() -> Iterator[Interpreter]:
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session", autouse=True)
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile, rather than find what another checkout left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def launchers(interpret: Interpreter) -> Iterator[Launchers]:
    """Ops of the test run in the interpreter."""
    with Launchers(interpret) as mode:
        yield mode


@pytest.fixture
def mode(interpret: Interpreter) -> Launchers:
    """`launchers`, to be entered where they are wanted."""
    return Launchers(interpret)
