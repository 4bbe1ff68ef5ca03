"""Random numbers of the codecs: hashes of a position and a seed, drawn alike on every rank and every device."""

import triton
import triton.language as tl


@triton.jit
def mix(h):
    """The 32-bit mixer lowbias32 (C. Wellons, "Prospecting for hash functions"), on uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def key_of(position, seed_low, seed_high):
    """A 32-bit key of an int64 position and the two halves (int32) of a seed."""
    h = mix(position.to(tl.uint32) ^ mix((position >> 32).to(tl.uint32)))
    return mix(seed_low.to(tl.uint32) ^ mix(seed_high.to(tl.uint32) ^ h))


def halves(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two int32, low half first: their type must not depend on their value, or each would compile."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return tuple(half - (half >> 31 << 32) for half in (low, high))  # type: ignore[return-value]
