"""Steps of plans that are written by hand, for what the graphs of ops do in two calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from pykernels.network.plan.format import DTYPES, Program, Record, encode
from pykernels.ops.dtypes import REALS


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def layer_norm(x: torch.Tensor, numbers: Sequence[int], reals: Sequence[float], *parameters: torch.Tensor) -> Program:
    """A plan of one layer norm, its weight and bias among the inputs."""
    inputs = [(DTYPES[t.dtype], t.dim()) for t in (x, *parameters)]
    record = Record("layer_norm", list(range(len(inputs))), list(numbers), list(reals))
    return Program(0, inputs, [record], [(len(inputs), False)])


def run(program: Program, *inputs: torch.Tensor) -> torch.Tensor:
    weights = torch.empty(0, dtype=torch.uint8)
    return torch.ops.pykernels.run_plan(encode(program), weights, list(inputs), [], [], [], [])[0]


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("to", [torch.uint8, torch.int8], ids=str)
def test_a_layer_norm_writes_the_bytes_that_quantize_makes_of_it(dtype: torch.dtype, to: torch.dtype, isa: str) -> None:
    zero, scale, eps = -5 if to is torch.int8 else 117, 0.017, 1e-5
    ops = torch.ops.pykernels
    for shape in ((1,), (3, 1), (2, 3, 16), (5, 37), (300, 203), (0, 4)):
        x, weight, bias = (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]), torch.randn(shape[-1])
        if x.numel() > 20:
            x[-1, ..., 3], x[0, ..., 0] = torch.nan, 1e4
        for parameters in ((weight, bias), (weight, None), (None, bias), (None, None)):
            given = [value for value in parameters if value is not None]
            numbers = [*(int(value is not None) for value in parameters), DTYPES[to], zero]
            expected = ops.quantize_per_tensor(ops.layer_norm(x, *parameters, eps), scale, zero, to)
            got = run(layer_norm(x, numbers, [eps, scale], *given), x, *given)
            assert got.dtype == to and torch.equal(got, expected)


def test_where_a_layer_norm_is_cut_changes_no_byte(threads: None) -> None:
    x = torch.randn(1000, 96)
    answers = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        answers.append(run(layer_norm(x, [0, 0, DTYPES[torch.uint8], 117], [1e-5, 0.017]), x))
    assert all(torch.equal(answer, answers[0]) for answer in answers) and len(answers[0].unique()) > 100


@pytest.mark.parametrize(
    ("message", "numbers", "reals"),
    [
        ("a step layer_norm is of bytes", [0, 0, DTYPES[torch.float32], 0], [1e-5, 0.1]),
        (r"a number of a step layer_norm must lie in \[0, ", [0, 0, 99, 0], [1e-5, 0.1]),
        (r"a number of a step layer_norm must lie in \[0, ", [0, 0, -1, 0], [1e-5, 0.1]),
        (r"must lie in \[0, 255\], not 256", [0, 0, DTYPES[torch.uint8], 256], [1e-5, 0.1]),
        (r"must lie in \[-128, 127\], not 128", [0, 0, DTYPES[torch.int8], 128], [1e-5, 0.1]),
        ("too few numbers", [0, 0, DTYPES[torch.uint8]], [1e-5, 0.1]),
        ("has 5 numbers", [0, 0, DTYPES[torch.uint8], 7, 7], [1e-5, 0.1]),
        ("too few reals", [0, 0, DTYPES[torch.uint8], 7], [1e-5]),
        ("scale must be", [0, 0, DTYPES[torch.uint8], 7], [1e-5, 0.0]),
        ("scale must be", [0, 0, DTYPES[torch.uint8], 7], [1e-5, math.nan]),
        ("has 2 numbers and 2 reals", [0, 0], [1e-5, 0.1]),
    ],
)
def test_a_layer_norm_to_bytes_of_wrong_numbers_is_refused(
    message: str, numbers: list[int], reals: list[float]
) -> None:
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match=message):
        run(layer_norm(x, numbers, reals), x)
