"""Settings shared by the suite."""

from __future__ import annotations

import importlib.machinery
import os
import pathlib
from collections.abc import Iterator

# Workers of xdist share the cores: two threads each, so that ops do split their work, and no spinning while they wait.
# Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch

import pykernels
from pykernels import _host

hypothesis.settings.register_profile(
    "pykernels",
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],  # `isa` and `seed` hold for all examples
)
hypothesis.settings.load_profile("pykernels")

ISAS = [name for name, available in _host.isas().items() if available]


def pytest_collection_finish() -> None:
    """Ranks and servers that tests start inherit sys.path: the first pykernels there must be the one under test."""
    found = importlib.machinery.PathFinder.find_spec("pykernels")
    if found is not None and found.origin is not None and not pathlib.Path(found.origin).samefile(pykernels.__file__):
        raise pytest.UsageError(f"{pykernels.__file__} is under test, but processes would import {found.origin}")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once under every isa this host has (every one at all in an emulating build)."""
    before = torch.ops.pykernels._set_isa(request.param)
    yield request.param
    torch.ops.pykernels._set_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
