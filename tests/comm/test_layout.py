"""Records of a tensor: where they begin, and what they weigh."""

from __future__ import annotations

import math

import pytest

from pykernels.comm.layout import Layout, lay_out_tensor

IMAGES = [(8, 64, 56, 56), (2, 128, 28, 28), (2, 1024, 14, 14), (2, 2048, 7, 7), (1, 3, 224, 224), (8, 32, 15, 15)]
TOKENS = [(4, 128, 256), (2, 50, 768), (1, 1, 4096), (8, 17, 192)]


def begins(layout: Layout) -> set[int]:
    """The elements at which records begin."""
    (section,) = layout.sections
    return {first + at for first, n, _ in section.segments.tolist() for at in range(0, n, section.block)}


@pytest.mark.parametrize("shape", IMAGES + TOKENS, ids=str)
@pytest.mark.parametrize(("codec", "share"), [("int8", 0.26), ("int4", 0.135), ("bf16", 0.501)])
def test_a_message_has_a_quarter_of_fp32s_bytes_or_an_eighth(shape: tuple[int, ...], codec: str, share: float) -> None:
    assert lay_out_tensor(shape, codec, 256).payload_bytes <= share * 4 * math.prod(shape)


@pytest.mark.parametrize("shape", [*TOKENS, (4, 128, 300)], ids=str)
def test_no_record_holds_two_tokens(shape: tuple[int, ...]) -> None:
    found = begins(lay_out_tensor(shape, "int8", 256))
    assert found >= set(range(0, math.prod(shape), shape[-1]))


@pytest.mark.parametrize("shape", [(8, 64, 14, 14), (3, 5), (7,), (), (0, 4), (4, 17, 100), (2, 3, 15, 15)], ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_every_element_has_one_place(shape: tuple[int, ...], world: int) -> None:
    (section,) = lay_out_tensor(shape, "int8", 256, world).sections
    places = [first + i for first, n, _ in section.segments.tolist() for i in range(n)]
    assert sorted(places) == list(range(world * math.prod(shape)))
