"""Memory cut into tiles, one a program: a flat run of it, or rows of columns where what is applied varies along one.

Tiles of rows need no division per element, and are read as widely as the number of columns allows.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILE = 2048  # elements of a tile: 16 bytes of u8 a thread
WIDEST = 256  # columns of a tile


@triton.jit
def flat(TILE: tl.constexpr):
    """Elements of this program's tile, int64 [TILE]."""
    return tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)


@triton.jit
def place(cols, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, SPAN] of this program's tile, int64."""
    across = (cols - 1) // SPAN + 1
    tile = tl.program_id(0)
    row = (tile // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = (tile % across).to(tl.int64) * SPAN + tl.arange(0, SPAN)[None, :]
    return row, col


def tile_shape(cols: int) -> dict[str, int]:
    """The constants of `place`."""
    span = min(triton.next_power_of_2(cols), WIDEST)
    return {"ROWS": TILE // span, "SPAN": span}


def tiles(rows: int, cols: int, shape: dict[str, int]) -> tuple[int]:
    """The grid of `place`."""
    return (triton.cdiv(rows, shape["ROWS"]) * triton.cdiv(cols, shape["SPAN"]),)
