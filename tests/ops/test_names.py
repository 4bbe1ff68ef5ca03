"""names.json is what every part of the library goes by: C++ accepts its names and no other, the oracle knows each."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from pykernels import _host, reference
from pykernels.network.match import ACTIVATIONS as MATCHED
from pykernels.nn import follow
from pykernels.ops import compress, names, packed, quantize
from pykernels.ops.dtypes import REAL_NAMES, REAL_WORDS, STORED

X = torch.arange(256, dtype=torch.uint8)
SEGMENTS = torch.tensor([[0, 64, 0]])


def qadd(activation: str) -> torch.Tensor:
    return quantize.qadd(X, X, 0.05, 128, 0.02, 100, 0.1, 128, torch.uint8, activation)


def encoded(codec: str, stochastic: bool = False) -> torch.Tensor:
    payload = torch.zeros(64 * 4 + 4, dtype=torch.uint8)
    compress.compress_encode(torch.linspace(-1, 1, 64), None, payload, SEGMENTS, codec, 64, stochastic)
    return payload


# ---- activations ----


@pytest.mark.parametrize("activation", names.ACTIVATIONS)
def test_an_activation_is_computed_as_the_oracle_does(activation: str) -> None:
    expected = reference.qadd(X, X, 0.05, 128, 0.02, 100, 0.1, 128, torch.uint8, activation)
    assert (qadd(activation).int() - expected.int()).abs().max() <= 1  # of silu, sigmoid, gelu and tanh


def test_activations_are_told_apart() -> None:
    assert len({tuple(qadd(activation).tolist()) for activation in names.ACTIVATIONS}) == len(names.ACTIVATIONS)


def test_an_unknown_activation_is_refused_with_the_list() -> None:
    expected = re.escape(f"activation must be one of {names.words(names.ACTIVATIONS)}, not 'swish'")
    with pytest.raises(RuntimeError, match=expected):
        qadd("swish")


def test_the_oracle_knows_the_activations_and_no_other() -> None:
    assert set(reference.ACTIVATIONS) == set(names.ACTIVATIONS)


@pytest.mark.parametrize("known", [known for known in names.ACTIVATIONS.values() if known.name != "none"])
def test_an_activation_is_the_aten_op_and_the_module_that_it_says(known: names.Activation) -> None:
    x = torch.linspace(-8, 8, 101)
    expected = reference.ACTIVATIONS[known.name](x)
    assert known.aten is not None and known.module is not None
    torch.testing.assert_close(getattr(torch.ops.aten, known.aten.removeprefix("aten."))(x), expected)
    torch.testing.assert_close(getattr(nn, known.module)()(x), expected)
    assert MATCHED[known.aten] == known.name
    assert follow.ACTIVATIONS[getattr(nn, known.module)].kernel_name == known.name


# ---- codecs ----


@pytest.mark.parametrize("codec", names.CODECS)
def test_a_codec_makes_the_oracles_bytes(codec: str) -> None:
    expected = torch.zeros(64 * 4 + 4, dtype=torch.uint8)
    reference.compress_encode(torch.linspace(-1, 1, 64), None, expected, SEGMENTS, codec, 64)
    assert torch.equal(encoded(codec), expected)
    assert int(expected.nonzero().max()) < compress.record_bytes(codec, 64)


def test_an_unknown_codec_is_refused_with_the_list() -> None:
    expected = re.escape(f"codec must be one of {names.words(names.CODECS)}, not 'int3'")
    with pytest.raises(RuntimeError, match=expected):
        encoded("int3")
    with pytest.raises(RuntimeError, match=expected):
        _host.compress_encode(np.zeros(64, np.float32), None, np.zeros(99, np.uint8), SEGMENTS.numpy(), "int3", 64)


@pytest.mark.parametrize("codec", names.CODECS.values(), ids=names.CODECS)
def test_stochastic_rounding_is_for_those_that_know_it(codec: names.Codec) -> None:
    if codec.stochastic:
        encoded(codec.name, stochastic=True)
        return
    able = names.words((codec.name for codec in names.CODECS.values() if codec.stochastic), " and ")
    with pytest.raises(RuntimeError, match=f"stochastic rounding is for {able}, not {codec.name}"):
        encoded(codec.name, stochastic=True)


# ---- dtypes, packed weights, isas ----


@pytest.mark.parametrize("dtype", REAL_NAMES, ids=str)
def test_real_dtypes_are_quantized(dtype: torch.dtype) -> None:
    q = quantize.quantize_per_tensor(torch.tensor([0.5, -0.5], dtype=dtype), 0.25, 10)
    assert q.tolist() == [12, 8]


def test_another_dtype_is_refused_with_the_list() -> None:
    with pytest.raises(RuntimeError, match=f"x must be {REAL_WORDS}, not float64"):
        quantize.quantize_per_tensor(torch.zeros(1, dtype=torch.float64), 0.25)


def test_16_bit_precisions_are_those_that_are_stored() -> None:
    assert {"bf16": torch.bfloat16, "fp16": torch.float16} == STORED


@pytest.mark.parametrize("dtype", packed.ELEMENTS, ids=str)
def test_the_element_of_a_header_is_the_one_that_both_sides_read(dtype: torch.dtype) -> None:
    weight = torch.arange(12).reshape(3, 4).to(dtype)
    ops = torch.ops.pykernels
    found = ops.linear_pack(weight) if dtype.is_floating_point else ops.int8_linear_pack(weight, torch.ones(3))
    layout, _ = packed.read(found)
    assert layout.dtype == dtype
    assert torch.equal(packed.unpack(found)[0].view(3, 4), weight)
    if dtype is not torch.int8:
        with pytest.raises(RuntimeError, match=f"packed holds {str(dtype).removeprefix('torch.')} weights"):
            ops.int8_linear(torch.zeros(1, 4, dtype=torch.uint8), found, 3, 1.0)


def test_isas_are_those_of_the_library() -> None:
    assert set(names.ISAS) == set(_host.isas())
    with pytest.raises(RuntimeError, match=f"isa must be one of {names.words(names.ISAS)}, not 'neon'"):
        torch.ops.pykernels._set_isa("neon")
