"""Which configuration of the CUDA library a shape is given: the tables, without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from pykernels import _load, _tuned

ARCHITECTURES = sorted(path.stem for path in _tuned.FOLDER.glob("*.json"))
RULES = {"1024x512": [[16, "few"], [64, "some swapped"], [None, "many"]], "64x64": [[None, "triton"]]}


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "sm80"), ((8, 6), "sm80"), ((8, 9), "sm89"), ((9, 0), "sm90"), ((10, 0), None)]
)
def test_architecture_of_a_compute_capability(capability: tuple[int, int], name: str | None) -> None:
    assert _tuned.architecture(capability) == name
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
    assert _tuned.choose(RULES, *shape, residual=False) == name


def test_a_residual_is_not_given_to_a_swapped_configuration() -> None:
    assert _tuned.choose(RULES, 17, 1024, 512, residual=True) == "many"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tables_hold_every_number_of_rows_and_say_whether_they_were_measured(name: str) -> None:
    table = json.loads((_tuned.FOLDER / f"{name}.json").read_text())
    assert table["note"].startswith("measured" if table["device"] else "not measured")
    for rows in [*table["int8_gemm"].values(), *table.get("int8_conv", {}).values()]:
        most = [m for m, _ in rows]
        assert most[-1] is None and most[:-1] == sorted(set(most[:-1]))
        assert not rows[-1][1].endswith("swapped")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the library were loaded, with two configurations."""
    monkeypatch.setattr(_load, "CUDA_ERROR", None)
    monkeypatch.setattr(_tuned, "configurations", lambda op: {"few": (3, 80), "many": (5, 90)})
    monkeypatch.setattr(
        _tuned,
        "table",
        lambda name: {"int8_gemm": RULES, "int8_conv": RULES} if name == "sm90" else {"int8_gemm": RULES},
    )
    _tuned._index.cache_clear()


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
    assert _tuned.int8_gemm(m, n, k, out, residual, capability) == index
    with _tuned.disabled():
        assert _tuned.int8_gemm(m, n, k, out, residual, capability) is None


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
    assert _tuned.int8_conv(m, n, channels, taps, torch.uint8, None, capability) == index


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
    assert _tuned.runs(needed, capability) == runs


def test_nothing_is_chosen_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "CUDA_ERROR", "not there")
    assert _tuned.int8_gemm(64, 64, 64, torch.uint8, None, (9, 0)) is None
