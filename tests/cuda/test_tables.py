"""Which configuration a shape is given, of the CUDA library and of Triton's kernels: the tables, without a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from pykernels.cuda import tables
from pykernels.ops import _load

ARCHITECTURES = sorted(path.stem for path in tables.FOLDER.glob("*.json"))
RULES = {"1024x512": [[16, "few"], [64, "some swapped"], [None, "many"]], "64x64": [[None, "triton"]]}


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((10, 0), None)]
)
def test_architecture_of_a_compute_capability(capability: tuple[int, int], name: str | None) -> None:
    assert tables.architecture(capability) == name
    assert name is None or name in ARCHITECTURES


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((1, 1024, 512), "few"),
        ((16, 1024, 512), "few"),
        ((17, 1024, 512), "some swapped"),
        ((65, 4096, 4096), "many"),
        ((5, 32, 96), "triton"),
    ],
)
def test_a_shape_takes_the_nearest_width_and_the_first_row_that_holds_it(
    shape: tuple[int, int, int], name: str
) -> None:
    assert tables.choose(RULES, *shape, residual=False) == name


def test_a_residual_is_not_given_to_a_swapped_configuration() -> None:
    assert tables.choose(RULES, 17, 1024, 512, residual=True) == "many"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_hold_every_number_of_rows_and_say_whether_they_were_measured(name: str) -> None:
    table = json.loads((tables.FOLDER / f"{name}.json").read_text())
    assert table["note"].startswith("measured" if table["device"] else "not measured")
    for rows in [rows for op in ("int8_gemm", "int8_conv", "int8_few_channels") for rows in table.get(op, {}).values()]:
        most = [m for m, _ in rows]
        assert most[-1] is None and most[:-1] == sorted(set(most[:-1]))
        assert not rows[-1][1].endswith("swapped")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were loaded, with two configurations."""
    monkeypatch.setattr(_load, "CUDA_ERROR", None)
    monkeypatch.setattr(tables, "configurations", lambda op: {"few": (3, 80), "many": (5, 90)})
    monkeypatch.setattr(
        tables,
        "table",
        lambda name: {"int8_gemm": RULES, "int8_conv": RULES} if name == "sm90" else {"int8_gemm": RULES},
    )
    tables._index.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("m", "n", "k", "out", "residual", "capability", "index"),
    [
        (16, 1024, 512, torch.uint8, None, (8, 0), 3),
        (99, 1024, 512, torch.uint8, None, (9, 0), 5),
        (99, 1024, 512, torch.uint8, None, (8, 0), None),  # that configuration needs 9.0
        (20, 1024, 512, torch.uint8, None, (9, 0), None),  # the library has no such configuration
        (20, 1024, 512, torch.uint8, torch.int8, (9, 0), 5),
        (20, 1024, 512, torch.uint8, torch.float32, (9, 0), None),
        (20, 1024, 512, torch.float16, torch.float16, (9, 0), 5),
        (20, 1024, 512, torch.float16, torch.bfloat16, (9, 0), None),
        (16, 1024, 520, torch.uint8, None, (9, 0), None),  # k is no multiple of 16
        (16, 1032, 512, torch.uint8, None, (9, 0), None),  # nor is a row of the output, in bytes
        (16, 1032, 512, torch.float16, None, (9, 0), 3),
        (16, 1024, 2**17, torch.uint8, None, (9, 0), None),  # s32 may not hold the sums
        (16, 1024, 512, torch.uint8, None, (12, 0), None),
        (5, 32, 96, torch.uint8, None, (9, 0), None),  # Triton's, says the table
    ],
)
def test_int8_gemm(m, n, k, out, residual, capability, index) -> None:
    assert tables.int8_gemm(m, n, k, out, residual, capability) == index
    with tables.disabled():
        assert tables.int8_gemm(m, n, k, out, residual, capability) is None


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("m", "n", "channels", "taps", "capability", "index"),
    [
        (99, 1024, 64, 9, (9, 0), 5),
        (99, 1024, 64, 9, (8, 0), None),  # its table has no convolutions
        (99, 1024, 72, 9, (9, 0), None),  # channels of a tap are no multiple of 16, though those of all taps are
        (99, 1024, 2**12, 49, (9, 0), None),  # s32 may not hold the sums
    ],
)
def test_int8_conv(m, n, channels, taps, capability, index) -> None:
    assert tables.int8_conv(m, n, channels, taps, torch.uint8, None, capability) == index


@pytest.mark.parametrize(
    ("n", "kernel", "found"),
    [
        (64, (7, 7), ["sm80 7x7 by 32", "sm80 7x7 by 16"]),
        (48, (3, 2), ["sm80 3x3 by 16", "sm80 3x3 by 32"]),
        (32, (1, 4), ["sm80 5x5 by 32", "sm80 5x5 by 16"]),
        (24, (3, 3), []),  # channels of the output are no multiple of 16
        (32, (3, 8), []),
    ],
)
def test_few_channels_are_run_by_the_smallest_kernel_that_holds_theirs(n, kernel, found) -> None:
    assert tables.few_channels_fit(kernel, n) == found


@pytest.fixture
def few(library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if 9.0 had been measured, and from 100 rows on with kernels of another size."""
    rules = {"64x147": [[9, "triton"], [99, "sm80 7x7 by 16"], [None, "sm80 3x3 by 16"]]}
    monkeypatch.setattr(tables, "configurations", lambda op: {f"sm80 7x7 by {w}": (w, 80) for w in (16, 32)})
    monkeypatch.setattr(tables, "table", lambda name: {"int8_few_channels": rules} if name == "sm90" else {})
    tables._few_channels.cache_clear()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("m", "n", "kernel", "residual", "capability", "index"),
    [
        (99, 64, (7, 7), None, (9, 0), 16),
        (100, 64, (7, 7), None, (9, 0), 32),
        (9, 64, (7, 7), None, (9, 0), None),  # Triton's, says the table
        (9, 512, (7, 7), None, (9, 0), 32),  # nothing near was measured
        (9, 64, (7, 7), None, (8, 0), 32),
        (9, 64, (7, 7), None, (12, 0), None),
        (9, 64, (5, 5), None, (8, 0), None),  # the library has no such configuration
        (9, 64, (7, 7), torch.int8, (8, 0), 32),
        (9, 64, (7, 7), torch.float32, (8, 0), None),
        (0, 64, (7, 7), None, (8, 0), None),
    ],
)
def test_int8_few_channels(m, n, kernel, residual, capability, index) -> None:
    given = (m, n, 3, kernel, torch.uint8, residual, capability)
    assert tables.int8_few_channels(*given) == index
    with tables.disabled():
        assert tables.int8_few_channels(*given) is None


@pytest.mark.parametrize(
    ("needed", "capability", "runs"),
    [
        (80, (8, 0), True),
        (80, (8, 9), True),
        (80, (9, 0), True),
        (90, (8, 9), False),
        (90, (9, 0), True),
        (90, (10, 0), False),
    ],
)
def test_what_is_made_for_9_0_runs_there_alone(needed: int, capability: tuple[int, int], runs: bool) -> None:
    assert tables.runs(needed, capability) == runs


def test_nothing_is_chosen_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "CUDA_ERROR", "not there")
    assert tables.int8_gemm(64, 64, 64, torch.uint8, None, (9, 0)) is None


class TestTiles:
    ROWS = ([16, [16, 64, 256, 4, 3, 2, 4]], [None, [128, 256, 128, 8, 4, 1, 1]])

    @pytest.fixture(autouse=True)
    def rules(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        rules = {"1024x512": self.ROWS, "64x64": [[None, [64, 64, 128, 4, 4, 3, 1]]]}
        monkeypatch.setattr(tables, "table", lambda name: {"triton": {"gemm": rules, "conv": {}}})
        tables._tile.cache_clear()
        yield
        tables._tile.cache_clear()

    def test_a_shape_takes_that_of_the_nearest_width_and_of_its_rows(self) -> None:
        few, many = (tuple(tile) for _, tile in self.ROWS)
        assert tables.tile("gemm", 16, 1024, 512, 90) == few
        assert tables.tile("gemm", 17, 1024, 512, 80) == many
        assert tables.tile("gemm", 17, 2048, 256, 90) == many
        assert tables.tile("gemm", 17, 100, 64, 90) == (64, 64, 128, 4, 4, 3, 1)

    @pytest.mark.parametrize(
        ("kind", "n", "k", "arch"),
        [("gemm", 4096, 4096, 90), ("gemm", 1024, 64, 90), ("conv", 1024, 512, 90), ("gemm", 1024, 512, 120)],
    )
    def test_what_is_near_to_nothing_measured_has_none(self, kind: str, n: int, k: int, arch: int) -> None:
        assert tables.tile(kind, 16, n, k, arch) is None

    def test_one_may_be_forced(self) -> None:
        tile = (64, 128, 64, 4, 4, 2, 1)
        with tables.forced(tile):
            assert tables.tile("conv", 5, 4096, 4096, 90) == tile
            assert tables._disabled
        assert tables.tile("conv", 5, 4096, 4096, 90) is None and not tables._disabled

    def test_launchers_take_it_and_the_formula_s_where_there_is_none(self) -> None:
        from pykernels.cuda.triton import gemm

        assert gemm.config(90, 132, 16, 1024, 512) == gemm.Config(16, 64, 256, 4, 3, 2, 4)
        assert gemm.config(90, 132, 16, 8192, 8192) == gemm.by_formula(90, 132, 16, 8192, 8192)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tiles_of_tables_are_what_the_kernels_can_run(name: str) -> None:
    """Powers of two, and operands that fit shared memory: of sm80's other devices, 8.6, too."""
    triton = tables.table(name)["triton"]
    room = 227 if name == "sm90" else 99
    measured = [tile for kind in ("gemm", "conv") for rows in triton[kind].values() for _, tile in rows]
    for bm, bn, bk, warps, stages, resident, split in [*measured, *([*c, 1] for c in triton["candidates"])]:
        assert all(number & (number - 1) == 0 for number in (bm, bn, bk, warps, split))
        assert bm >= 16 and bn >= 16 and bk >= 32 and stages * (bm + bn) * bk <= room * 1024 and resident >= 1
    for kind in ("gemm", "conv"):
        for rows in triton[kind].values():
            most = [m for m, _ in rows]
            assert most[-1] is None and most[:-1] == sorted(set(most[:-1]))
