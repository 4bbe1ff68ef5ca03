"""The gradient codecs on NumPy arrays: the bytes of the ops, and errors that name the array."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pykernels import _host
from pykernels.ops import compress
from pykernels.ops.compress import CODECS, record_bytes

BLOCK = 64


def rows(counts: list[int], codec: str) -> tuple[np.ndarray, int, int]:
    """Segments of so many elements with gaps between them: segments, elements, bytes."""
    found, first, byte = [], 1, 4
    for n in counts:
        found.append((first, n, byte))
        first += n + 1
        byte += -(-n // BLOCK) * record_bytes(codec, BLOCK) + 4
    return np.array(found, dtype=np.int64).reshape(-1, 3), first, byte


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@given(
    counts=st.lists(st.integers(0, 500), max_size=4),
    stochastic=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_the_bytes_are_those_of_the_ops(
    codec: str, dtype: torch.dtype, counts: list[int], stochastic: bool, with_residual: bool, seed: int
) -> None:
    torch.manual_seed(seed % 1000)
    stochastic = stochastic and CODECS[codec].stochastic
    segments, elements, size = rows(counts, codec)
    x = torch.randn(elements).to(dtype)
    residual = torch.randn(elements) * 0.01 if with_residual else None
    payload, out = torch.full((size,), 9, dtype=torch.uint8), torch.full((elements,), 3.0, dtype=dtype)

    def array(t: torch.Tensor) -> np.ndarray:
        return (t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).clone().numpy()

    kept = None if residual is None else array(residual)
    sent, got = array(payload), array(out)
    rest = (torch.from_numpy(segments), codec, BLOCK)
    _host.compress_encode(array(x), kept, sent, segments, codec, BLOCK, stochastic, seed)
    compress.compress_encode(x, residual, payload, *rest, stochastic, seed)
    assert np.array_equal(sent, payload.numpy())
    both = np.stack([sent, sent])
    _host.compress_decode(both, got, segments, codec, BLOCK, 0.3)
    compress.compress_decode(torch.from_numpy(both), out, *rest, 0.3)
    assert np.array_equal(got, array(out))
    weights = np.array([0.25, -1.7], np.float32)
    _host.compress_decode(both, got, segments, codec, BLOCK, 0.3, weights)
    compress.compress_decode(torch.from_numpy(both), out, *rest, 0.3, torch.from_numpy(weights))
    assert np.array_equal(got, array(out))
    again = sent.copy()
    _host.compress_reduce(both, kept, again, segments, codec, BLOCK, 0.5, stochastic, seed)
    compress.compress_reduce(torch.from_numpy(both), residual, payload, *rest, 0.5, stochastic, seed)
    assert np.array_equal(again, payload.numpy())
    assert (residual is None) == (kept is None)
    if residual is not None and kept is not None:
        assert np.array_equal(kept.view(np.int32), residual.view(torch.int32).numpy())


def arguments(**changed: object) -> dict[str, object]:
    segments, elements, size = rows([100], "int8")
    values: dict[str, object] = {
        "x": np.ones(elements, np.float32),
        "residual": np.zeros(elements, np.float32),
        "payload": np.zeros(size, np.uint8),
        "segments": segments,
        "codec": "int8",
        "block": BLOCK,
    }
    return {**values, **changed}


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones(102)}, "x must be of dtype float32, float16 or uint16 .*, not of buffer format 'd'"),
        ({"x": np.ones(204, np.float32)[::2]}, "x must be C-contiguous"),
        ({"x": np.ones((2, 51), np.float32).T}, "x must be C-contiguous"),
        ({"x": np.frombuffer(bytes(409), np.uint8)[1:].view(np.float32)}, "x must be aligned to its elements"),
        ({"residual": np.ones(102)}, "residual must be of dtype float32"),
        ({"residual": np.ones(101, np.float32)}, "residual must have as many elements as x, 102, not 101"),
        ({"residual": read_only(np.ones(102, np.float32))}, "residual must be writable"),
        ({"payload": read_only(np.zeros(144, np.uint8))}, "payload must be writable"),
        ({"payload": np.zeros(144, np.int8)}, "payload must be of dtype uint8"),
        ({"payload": np.zeros((2, 72), np.uint8)}, "payload must have 1 dimensions, not 2"),
        ({"payload": np.zeros(148, np.uint8)[1:]}, "payload must begin at a multiple of 4 bytes"),
        ({"payload": np.zeros(136, np.uint8)}, r"segments\[0\] = \(1, 100, 4\) takes 2 records of 68 bytes"),
        ({"segments": np.zeros((1, 3))}, "segments must be of dtype int64"),
        ({"segments": np.zeros(3, np.int64)}, r"segments must have shape \[segments, 3\]"),
        ({"segments": np.array([[50, 100, 0]])}, r"segments\[0\] = \(50, 100, 0\) must lie inside x"),
        ({"codec": "int3"}, "codec must be one of int8, .*, not 'int3'"),
        ({"block": 65}, r"block must be a multiple of 32 in \[32, 32768\], not 65"),
        ({"codec": "fp8", "stochastic": True}, "stochastic rounding is for int8, int4 and int2, not fp8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_array_is_named(changed: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"compress_encode: {message}"):
        _host.compress_encode(**arguments(**changed))


def test_what_is_decoded_needs_ranks_and_a_writable_output() -> None:
    segments, elements, size = rows([100], "int8")
    out = np.zeros(elements, np.float32)
    with pytest.raises(RuntimeError, match="compress_decode: payloads must have a row for each rank"):
        _host.compress_decode(np.zeros((0, size), np.uint8), out, segments, "int8", BLOCK)
    with pytest.raises(RuntimeError, match="compress_decode: payloads must have 2 dimensions, not 1"):
        _host.compress_decode(np.zeros(size, np.uint8), out, segments, "int8", BLOCK)
    with pytest.raises(RuntimeError, match="compress_decode: out must be writable"):
        _host.compress_decode(np.zeros((1, size), np.uint8), read_only(out), segments, "int8", BLOCK)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (np.ones(2), "weights must be of dtype float32"),
        (np.ones((2, 1), np.float32), "weights must be flat, not of 2 dimensions"),
        (np.ones(3, np.float32), "weights must have a number for each row of payloads, 2, not 3"),
        (np.ones(0, np.float32), "weights must have a number for each row of payloads, 2, not 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_are_one_a_row(weights: np.ndarray, message: str) -> None:
    segments, elements, size = rows([100], "int8")
    payloads, out = np.zeros((2, size), np.uint8), np.zeros(elements, np.float32)
    with pytest.raises(RuntimeError, match=f"compress_decode: {message}"):
        _host.compress_decode(payloads, out, segments, "int8", BLOCK, weights=weights)


def test_no_torch_is_imported() -> None:
    code = (
        "import importlib.util, sys, numpy as np\n"
        f"spec = importlib.util.spec_from_file_location('_host', {_host.__file__!r})\n"
        "host = importlib.util.module_from_spec(spec); spec.loader.exec_module(host)\n"
        "x, p = np.ones(32, np.float32), np.zeros(36, np.uint8)\n"
        "host.compress_encode(x, None, p, np.array([[0, 32, 0]]), 'int8', 32)\n"
        "y = np.zeros(32, np.float32); host.compress_decode(p[None], y, np.array([[0, 32, 0]]), 'int8', 32)\n"
        "assert 'torch' not in sys.modules; print(y.sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "32.0", done.stderr


NUMBERS = st.one_of(st.integers(-8, 300), st.integers(-(2**63), 2**63 - 1), st.integers(2**63 - 300, 2**63 - 1))


@given(
    found=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=3),
    elements=st.integers(0, 300),
    size=st.integers(0, 300),
    codec=st.sampled_from(list(CODECS)),
    block=st.sampled_from([32, 64, 32768]),
    with_residual=st.booleans(),
)
def test_any_segments_are_refused_or_coded(
    found: list[tuple[int, int, int]], elements: int, size: int, codec: str, block: int, with_residual: bool
) -> None:
    """Whatever the numbers are: an error that names the segment, or nothing written outside (`make sanitize` looks)."""
    segments = np.array(found, dtype=np.int64).reshape(-1, 3)

    def inside(elements: int) -> bool:
        return all(
            0 <= first <= elements
            and 0 <= n <= elements - first
            and 0 <= byte <= size
            and byte % 4 == 0
            and byte + -(-n // block) * record_bytes(codec, block) <= size
            for first, n, byte in found
        )

    x, out = np.ones(elements, np.float32), np.zeros(elements, np.float32)
    kept = np.zeros(elements, np.float32) if with_residual else None
    payload = np.zeros(size, np.uint8)
    for fits, op, values in (
        (inside(elements), "compress_encode", (x, kept, payload, segments, codec, block)),
        (inside(elements), "compress_decode", (payload[None].copy(), out, segments, codec, block)),
        (
            inside(elements if with_residual else 2**63 - 1),
            "compress_reduce",
            (payload[None].copy(), kept, payload, segments, codec, block, 1.0),
        ),
    ):
        if fits:
            getattr(_host, op)(*values)
        else:
            with pytest.raises(RuntimeError, match=rf"{op}: segments\[\d\]"):
                getattr(_host, op)(*values)
