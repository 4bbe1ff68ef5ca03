"""The machine code of the gradient codecs for sm_80 and sm_90, compiled as their launchers would have it."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import triton
from cubin import accesses, check, compiled, in_flight

from pykernels.cuda.triton import compress, sparse, topk
from pykernels.cuda.triton.tiles import power_of_two
from pykernels.ops.compress import CODECS

REALS = {"fp32": "*fp32", "bf16": "*u16", "fp16": "*fp16"}
TYPES = {
    **dict.fromkeys(["residual", "velocity", "values", "weights"], "*fp32"),
    **dict.fromkeys(["payload", "payloads"], "*u8"),
    **dict.fromkeys(["table", "segments", "state", "totals", "spans"], "*i64"),
    **dict.fromkeys(["histograms", "bins", "listing"], "*i32"),
    **dict.fromkeys(["seed_low", "seed_high", "ranks", "count", "k", "threshold", "size", "rank", "room"], "i32"),
    **dict.fromkeys(["n", "numel"], "i64"),
    "stride": "i64",
    **dict.fromkeys(["factor", "momentum"], "fp32"),
}
ALIGNED = {"stride"}  # numbers that are multiples of 16, as Triton finds out at a launch


def build(kernel: Any, arch: int, real: str, constants: dict[str, Any], options: dict[str, Any]) -> Any:
    types = {**TYPES, "x": REALS[real], "out": REALS[real]}
    return compiled(kernel, arch, types, {"REAL": real, **constants}, options, ALIGNED)


def dense(name: str, codec: str, arch: int, block: int, weighted: bool = False, **constants: Any) -> Any:
    """A dense kernel as its launcher would have it for a bucket laid out as pykernels.comm does."""
    shape = compress.constants(codec, block)
    constants = {
        **({} if weighted else {"weights": None}),
        "STOCHASTIC": False,
        "LEVEL": compress.LEVELS.get(codec),
        "VECTOR": 16,
        "ALIGNED": power_of_two(shape["RECORD"]),
        **shape,
        **constants,
    }
    real = constants.pop("REAL", "fp32")
    return build(getattr(compress, name), arch, real, constants, compress.options(shape))


def blocks(codec: str) -> int:
    return 1024 if codec == "onebit" else 256


# Numbers go 16 bytes a thread; codes, which a scale keeps at multiples of 4 bytes, as many elements at a time.
WIDE = {"_encode": {"ld 16", "st 16"}, "_decode": {"st 16"}, "_reduce": {"ld 16", "st 16"}}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", WIDE)
def test_dense_kernels_on_sm_90(name: str, codec: str, tmp_path: pathlib.Path) -> None:
    kernel = dense(name, codec, 90, blocks(codec))
    check(kernel, tmp_path, 96)
    found = accesses(kernel)
    if codec == "onebit":  # a byte is 8 elements: two of them are 64 bytes of numbers
        assert {"st 8"} <= found and "st 1" not in found
    else:
        assert WIDE[name] <= found and "ld 1" not in found and "st 1" not in found


@pytest.mark.parametrize("codec", ["int4", "onebit", "fp16"])
@pytest.mark.parametrize("name", WIDE)
def test_dense_kernels_on_sm_80(name: str, codec: str, tmp_path: pathlib.Path) -> None:
    check(dense(name, codec, 80, blocks(codec)), tmp_path, 96)


@pytest.mark.parametrize("codec", [name for name, codec in CODECS.items() if codec.stochastic])
def test_stochastic_rounding(codec: str, tmp_path: pathlib.Path) -> None:
    check(dense("_encode", codec, 90, 256, STOCHASTIC=True), tmp_path, 96)


@pytest.mark.parametrize("real", ["bf16", "fp16"])
def test_gradients_of_16_bits(real: str, tmp_path: pathlib.Path) -> None:
    for name in ("_encode", "_decode"):
        kernel = dense(name, "int8", 90, 256, REAL=real)
        check(kernel, tmp_path, 96)
        assert not {"ld 1", "st 1", "ld 2", "st 2"} & accesses(kernel)


def test_one_rank_without_residual(tmp_path: pathlib.Path) -> None:
    check(dense("_encode", "int8", 90, 256, residual=None), tmp_path, 96)
    check(dense("_decode", "int8", 90, 256, ranks=1), tmp_path, 96)


@pytest.mark.parametrize("codec", CODECS)
def test_weights_cost_no_wide_store(codec: str, tmp_path: pathlib.Path) -> None:
    kernel = dense("_decode", codec, 90, blocks(codec), weighted=True)
    check(kernel, tmp_path, 96)
    assert ("st 8" if codec == "onebit" else "st 16") in accesses(kernel)


@pytest.mark.parametrize("codec", ["int8", "int2"])
def test_large_records_do_not_spill(codec: str, tmp_path: pathlib.Path) -> None:
    check(dense("_reduce", codec, 90, 16384), tmp_path, 64)


@pytest.mark.parametrize(("codec", "loads", "registers"), [("int8", 16, 64), ("int4", 6, 56), ("fp8", 16, 72)])
def test_a_reduction_asks_several_ranks_at_once(codec: str, loads: int, registers: int, tmp_path: pathlib.Path) -> None:
    """`loads`: what every Triton that we promise reaches; one rank after the other would be 9 and 5."""
    kernel = dense("_reduce", codec, 90, 256)
    check(kernel, tmp_path, registers)
    assert in_flight(kernel) >= loads


LEVEL = {"LEVEL": 2, "SHIFT": topk.SHIFTS[2], "ABOVE": topk.SHIFTS[1]}
SPARSE: dict[str, dict[str, Any]] = {
    "_sample": {"DRAWN": topk.DRAWN},
    "_list": topk.WIDE_OPTIONS,
    "_count_digits": {**LEVEL, **sparse.OPTIONS},
    "_count_tile": {"CHUNK": topk.LISTED, **sparse.OPTIONS},
    "_place_tiles": {},
    "_send": topk.WIDE_OPTIONS,
    "_send_listed": {"CHUNK": topk.LISTED, "num_warps": 1},
    "_add_entries": {"debug": True, "sanitize_overflow": False},
    "_draw_values": {"CLEAR": False},
    "_add_gradients": sparse.OPTIONS,
    "_clear": sparse.OPTIONS,
    "_place_values": {},
}


FOUND = {**vars(sparse), **vars(topk)}


def test_every_sparse_kernel_is_looked_at() -> None:
    kernels = {name for name, value in FOUND.items() if isinstance(value, triton.runtime.JITFunction)}
    inner = {"_read", "_refine", "_select", "_listed", "_drawn"}
    assert {name for name in kernels if name.startswith("_")} - inner == set(SPARSE)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_kernels(name: str, arch: int, tmp_path: pathlib.Path) -> None:
    given = SPARSE[name]
    constants = {key: value for key, value in given.items() if key.isupper()}
    options = {"enable_fp_fusion": False, **{key: value for key, value in given.items() if not key.isupper()}}
    sizes = {"VECTOR": 16, "TILE": sparse.TILE, "ENTRIES": sparse.ENTRIES, "CHUNK": sparse.ENTRIES}
    kernel = build(FOUND[name], arch, "fp32", {**sizes, **constants}, options)
    # A division of 64 bits is a call, over which Triton 3.8 keeps one register in memory.
    check(kernel, tmp_path, 128, stack=8 if name in ("_draw_values", "_place_values", "_sample") else 0)
    if name in ("_list", "_count_digits", "_count_tile", "_send", "_add_gradients"):
        assert "ld 16" in accesses(kernel)
    assert ("__assertfail" in kernel.asm["ptx"]) == (name == "_add_entries")
    if name in ("_add_gradients", "_clear"):
        assert "st 16" in accesses(kernel)
