"""Attention: torch's answers, in every layout, with every kind of mask."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pykernels import reference
from pykernels.ops.attention import attention
from pykernels.ops.dtypes import REALS

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
SHAPES = [  # images, heads, heads of key, queries, keys, depth, depth of value
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 7, 5, 3, 2),
    (1, 4, 2, 17, 40, 16, 24),
    (2, 2, 1, 33, 197, 64, 64),
    (1, 1, 1, 150, 70, 130, 33),
    (1, 1, 1, 2, 2100, 8, 8),
]


def heads(shape: tuple[int, ...], dtype: torch.dtype, transposed: bool) -> list[torch.Tensor]:
    n, h, g, t, s, d, dv = shape
    sizes = [(n, h, t, d), (n, g, s, d), (n, g, s, dv)]
    if transposed:  # as linear layers yield them
        return [torch.randn(a, c, b, e).to(dtype).transpose(1, 2) for a, b, c, e in sizes]
    return [torch.randn(size).to(dtype) for size in sizes]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attention_is_the_oracles(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for transposed in (False, True):
        q, k, v = heads(shape, dtype, transposed)
        close(attention(q, k, v), reference.attention(q, k, v))
        close(attention(q, k, v, causal=True, scale=0.5), reference.attention(q, k, v, None, True, 0.5))


@pytest.mark.parametrize("dtype", REALS, ids=str)
@pytest.mark.parametrize("sizes", [(), (3,), (1,), (4, 3), (4, 1), (2, 1, 1), (2, 4, 1), (2, 4, 3), (1, 4, 3)], ids=str)
def test_masks_are_spread_over_images_heads_and_queries(isa: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = heads((2, 4, 4, 3, 21, 8, 8), dtype, True)
    shape = (*sizes, 21)
    added = torch.randn(shape).to(dtype)
    seen = torch.rand(shape) < 0.5
    for mask in (added, seen, seen.to(torch.uint8), added.mT.contiguous().mT if sizes else added):
        close(attention(q, k, v, mask), reference.attention(q, k, v, mask))


def test_it_is_torchs(isa: str) -> None:
    q, k, v = heads((2, 4, 2, 9, 21, 16, 16), torch.float32, True)
    mask = torch.rand(2, 1, 9, 21) < 0.7
    mask[:, :, 4] = False  # a query without keys
    got, expected = attention(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)
    assert not got[:, :, 4].any()
    got = attention(q, k, v, causal=True)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)


def test_what_is_left_out_counts_for_nothing(isa: str) -> None:
    q, k, v = heads((1, 2, 2, 5, 19, 8, 8), torch.float32, False)
    seen = torch.rand(5, 19) < 0.5
    seen[:, 3] = True
    v[:, :, ~seen[0]] = torch.finfo(torch.float32).max / 32
    added = torch.zeros(5, 19).masked_fill(~seen, -torch.inf)
    for mask in (seen, added):
        got, expected = attention(q, k, v, mask)[:, :, 0], reference.attention(q, k, v, mask)[:, :, 0]
        torch.testing.assert_close(got, expected, rtol=3e-6, atol=3e-6)


def test_a_nan_reaches_the_rows_that_see_it(isa: str) -> None:
    q, k, v = heads((1, 1, 1, 4, 40, 8, 8), torch.float32, False)
    q[0, 0, 2, 1] = torch.nan
    got = attention(q, k, v)
    assert got[0, 0, 2].isnan().all()
    assert not got[0, 0, [0, 1, 3]].isnan().any()


def test_threads_and_images_change_no_bits(isa: str) -> None:
    q, k, v = heads((3, 2, 2, 130, 77, 16, 20), torch.float32, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention(q, k, v)
        torch.set_num_threads(5)
        assert torch.equal(attention(q, k, v), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(attention(q[1:2], k[1:2], v[1:2]), one[1:2])
    assert torch.equal(attention(q[:, :, 129:], k, v), one[:, :, 129:])


def test_no_elements() -> None:
    for shape in ((0, 2, 2, 3, 4, 5, 6), (1, 0, 0, 3, 4, 5, 6), (1, 2, 2, 0, 4, 5, 6), (1, 2, 2, 3, 4, 5, 0)):
        n, h, _, t, _, _, dv = shape
        assert attention(*heads(shape, torch.float32, False)).shape == (n, h, t, dv)
    assert not attention(*heads((1, 2, 2, 3, 0, 5, 6), torch.float32, False)).any()  # no keys
    q, k, v = heads((1, 2, 2, 3, 4, 0, 6), torch.float32, False)  # scores without terms: all keys count alike
    close(attention(q, k, v, scale=1.0), reference.attention(q, k, v, scale=1.0))


def _given(**other: object) -> dict[str, object]:
    q, k, v = heads((2, 4, 2, 3, 5, 8, 6), torch.float32, False)
    return {"query": q, "key": k, "value": v, **other}


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("query must be float32, bfloat16 or float16, not int64", {"query": torch.zeros(2, 4, 3, 8).long()}),
        (r"query must have 4 dimensions, not shape \[3, 8\]", {"query": torch.zeros(3, 8)}),
        ("key is float16, but query is float32", {"key": torch.zeros(2, 2, 5, 8).half()}),
        (r"value of shape \[1, 2, 5, 6\] has not the images", {"value": torch.zeros(1, 2, 5, 6)}),
        (r"key of shape \[2, 2, 5, 7\] has not the depth", {"key": torch.zeros(2, 2, 5, 7)}),
        (r"value of shape \[2, 2, 4, 6\] has not the heads and keys", {"value": torch.zeros(2, 2, 4, 6)}),
        (
            "query has 4 heads, no multiple of key's 3",
            {"key": torch.zeros(2, 3, 5, 8), "value": torch.zeros(2, 3, 5, 6)},
        ),
        ("causal and a mask exclude one another", {"mask": torch.zeros(5), "causal": True}),
        ("mask must be bool, uint8 or of query's dtype, not float16", {"mask": torch.zeros(5).half()}),
        (r"mask of shape \[4\] does not spread over \[2, 4, 3, 5\]", {"mask": torch.zeros(4)}),
        (r"mask of shape \[1\] does not spread", {"mask": torch.zeros(1)}),
        (r"mask of shape \[2, 2, 3, 5\] does not spread", {"mask": torch.zeros(2, 2, 3, 5)}),
        (r"mask of shape \[\] does not spread", {"mask": torch.zeros(())}),
        (r"mask of shape \[1, 2, 4, 3, 5\] does not spread", {"mask": torch.zeros(1, 2, 4, 3, 5)}),
    ],
)
def test_bad_arguments_are_named(message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(RuntimeError, match=message):
        attention(**_given(**arguments))  # type: ignore[arg-type]
