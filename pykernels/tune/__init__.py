"""How a network is run on this machine: threads a call, calls at once, images a call; chosen by timing."""

from __future__ import annotations

from pykernels.tune.choose import tune
from pykernels.tune.instances import Instances
from pykernels.tune.search import NoSetup
from pykernels.tune.setup import Setup, Trial
from pykernels.tune.workers import Workers

__all__ = ["Instances", "NoSetup", "Setup", "Trial", "Workers", "tune"]
