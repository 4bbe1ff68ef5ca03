"""Measure every configuration of the CUDA library's int8 GEMM, and write this device's table to pykernels/tuned.

    python -m benchmarks.gpu.tune [--rounds 10] [--dry-run]

Triton's kernel is measured beside them, and is chosen where it is the fastest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.timing import compare, facts, require_gpu
from pykernels import _tuned

ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384, 65536)
# ResNet-50's pointwise layers, a BERT's, a 7B language model's.
WIDTHS = ((64, 256), (256, 64), (256, 1024), (512, 2048), (1024, 256), (2048, 512), (768, 768), (3072, 768),
          (768, 3072), (4096, 4096), (12288, 4096), (4096, 11008), (22016, 4096))  # fmt: skip
BYTES = 2**32  # shapes whose operands and output are larger are left out


def calls(m: int, n: int, k: int, capability: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """Every configuration that runs here, u8 in and out, by name; and Triton's, with the library out of the way."""
    a = torch.randint(0, 256, (m, k), dtype=torch.uint8, device="cuda")
    b = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    scale = torch.rand(n, device="cuda") + 0.5
    out = torch.empty(m, n, dtype=torch.uint8, device="cuda")
    sums, bias = b.sum(1, dtype=torch.int32), torch.randn(n, device="cuda")
    found: dict[str, Callable[[], Any]] = {}
    for name, (index, arch) in _tuned.configurations().items():
        if arch <= 10 * capability[0] + capability[1] and (arch != 90 or capability == (9, 0)):
            found[name] = lambda i=index: torch.ops.pykernels._cuda_int8_gemm(
                a, b, out, scale, sums, bias, None, None, 0.01, 128, 5.0, 128, "relu", None, 1.0, 0, "before", i
            )
    packed = torch.ops.pykernels.int8_linear_pack(b, scale, bias)

    def triton() -> torch.Tensor:
        with _tuned.disabled():
            return torch.ops.pykernels.int8_linear(a, packed, n, 0.01, 128, 5.0, 128, torch.uint8, "relu")

    return {**found, _tuned.TRITON: triton}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=10, help="of which the best counts")
    arguments.add_argument("--dry-run", action="store_true", help="print the table and write nothing")
    given = arguments.parse_args()
    require_gpu("tune")
    capability = torch.cuda.get_device_capability()
    name = _tuned.architecture(capability)
    if name is None or not _tuned.configurations():
        raise SystemExit(f"tune: the CUDA library has no kernels for compute capability {capability}")
    rules: dict[str, list[tuple[int | None, str]]] = {}
    times: dict[str, Any] = {}
    for n, k in WIDTHS:
        rows: list[tuple[int | None, str]] = []
        for m in ROWS:
            if m * (n + k) + n * k > BYTES:
                break
            taken = compare(calls(m, n, k, capability), given.rounds, 5)
            ran = {key: value for key, value in taken.items() if isinstance(value, float)}
            winner = min(ran, key=ran.__getitem__)
            print(f"{m}x{n}x{k}: {winner}, {2e-12 * m * n * k / ran[winner]:.1f} TOP/s", flush=True)
            times[f"{m}x{n}x{k}"] = {key: value if isinstance(value, str) else round(value * 1e6, 2)
                                     for key, value in taken.items()}  # fmt: skip
            if rows and rows[-1][1] == winner:
                rows.pop()
            rows.append((m, winner))
        plain = next((r for r in reversed(rows) if not r[1].endswith("swapped")), rows[-1])
        rules[f"{n}x{k}"] = [*(rows if rows[-1] == plain else [*rows, plain])[:-1], (None, plain[1])]
    table = {
        "note": f"measured {time.strftime('%Y-%m-%d')} by python -m benchmarks.gpu.tune",
        **{key: facts()[key] for key in ("device", "torch")},
        "int8_gemm": rules,
        "microseconds": times,
    }
    text = json.dumps(table, indent=1) + "\n"
    if given.dry_run:
        print(text)
    else:
        path = _tuned.FOLDER / f"{name}.json"
        path.write_text(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
