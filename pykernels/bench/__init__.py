"""Our kernels measured beside their rivals: interleaved in one process, answers checked, shares of the machine's
measured peak.

    from pykernels import bench
    found = bench.run(("conv",), groups=("resnet50",), precisions=("int8",))
    bench.save(found, pathlib.Path("bench.json")); bench.draw(found, pathlib.Path("bench.png"))

The same behind the command `pykernels bench` and the pytest-benchmark files in benchmarks/.
"""

from __future__ import annotations

from pykernels.bench.case import Case, QuantizedLayer
from pykernels.bench.chart import draw
from pykernels.bench.families import FAMILIES, cases
from pykernels.bench.harness import Result, Run, measure_case, run
from pykernels.bench.report import load, save

__all__ = [
    "FAMILIES",
    "Case",
    "QuantizedLayer",
    "Result",
    "Run",
    "cases",
    "draw",
    "load",
    "measure_case",
    "run",
    "save",
]
