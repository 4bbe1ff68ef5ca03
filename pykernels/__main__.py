"""`python -m pykernels` is the command `pykernels`."""

from __future__ import annotations

from pykernels.cli.main import app

app(prog_name="pykernels")
