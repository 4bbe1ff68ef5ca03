"""Gradients to the bytes that go on the wire, and back, in one pass over memory, with error feedback.

A codec turns runs of elements into records of ``block`` elements (a multiple of 32, up to 32768):

======  =====================================  ================================================
codec   header                                 code of ``v = float(x) + residual``
======  =====================================  ================================================
int8    scale = max |v| / 127, fp32            round(v / scale), 8 bits
int4    scale = max |v| / 7, fp32              round(v / scale), 4 bits
int2    scale = 1.5 * mean |v|, fp32           round(v / scale) in -1, 0, 1, 2 bits
onebit  scale = mean |v|, fp32                 v < 0, 1 bit
fp8     scale = max |v| / 448, fp32            v / scale as e4m3fn
bf16    none                                   v, at most the largest finite number of the dtype
fp16    none                                   v, at most the largest finite number of the dtype
fp32    none                                   v
======  =====================================  ================================================

``segments``, int64 [S, 3] on the CPU and contiguous, says which elements go where: rows of (first element, number of
elements, first byte of the payload, a multiple of 4). Each segment begins a new record, so that what differs in
magnitude need not share a scale, and takes ``ceil(elements / block)`` records of :func:`record_bytes` bytes. Segments
must not overlap, neither in the elements nor in the payload.

With a ``residual`` (fp32) what was not sent stays there and is added the next time: error feedback. A record whose
elements are not all finite decodes to NaN (in codecs without a header, such elements alone do) and leaves its residual
as it was. With ``stochastic`` (int8, int4, int2) rounding is up or down by chance, without bias, where ``seed`` and the
element's position determine the chance; int2 then takes scale = max |v|.

The functions write into their arguments and return nothing; the arguments must not overlap. The bytes are the same on
every isa and every device. None has a gradient. Bad arguments raise ``RuntimeError`` with the argument's name.
"""

from __future__ import annotations

import torch

from pykernels.ops._register import fake
from pykernels.ops.names import CODECS, Codec, words

__all__ = ["CODECS", "Codec", "compress_decode", "compress_encode", "compress_reduce", "record_bytes"]


def record_bytes(codec: str, block: int) -> int:
    """Bytes of a record of ``block`` elements: the header and the codes."""
    if codec not in CODECS:
        raise ValueError(f"record_bytes: codec must be one of {words(CODECS)}, not {codec!r}")
    if block % 32 or not 32 <= block <= 32768:
        raise ValueError(f"record_bytes: block must be a multiple of 32 in [32, 32768], not {block}")
    return CODECS[codec].header + block * CODECS[codec].bits // 8


def compress_encode(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    """Encode ``x + residual`` into ``payload`` and leave in ``residual`` what was not sent.

    Args:
        x: float32, bfloat16 or float16, contiguous, of any shape; segments count its elements as if it were flat.
        residual: float32, contiguous, as many elements as ``x``; without it what is rounded away is lost.
        payload: uint8 [bytes], contiguous; bytes of no segment stay as they are.
        segments: int64 [S, 3].
        codec: a name in :data:`CODECS`.
        block: elements of a record.
        stochastic: round by chance.
        seed: of that chance, any 64-bit integer.
    """
    torch.ops.pykernels.compress_encode(x, residual, payload, segments, codec, block, stochastic, seed)


def compress_decode(
    payloads: torch.Tensor,
    out: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float = 1.0,
    weights: torch.Tensor | None = None,
) -> None:
    """Write ``factor * ((w0 * d0 + w1 * d1) + ...)`` into the segments of ``out``, ``d`` what the ranks sent.

    Each product and each sum is rounded to fp32 (no FMA), as if every rank's payload were decoded into a tensor of its
    own, multiplied, and added in order: the same bits, without those tensors.

    Args:
        payloads: uint8 [ranks, bytes], at least one rank; rows are contiguous, begin at multiples of 4 bytes and may
            lie apart. They are added in order, in fp32.
        out: float32, bfloat16 or float16, contiguous, of any shape; elements of no segment stay as they are.
        segments: int64 [S, 3].
        codec: a name in :data:`CODECS`.
        block: elements of a record.
        factor: 1/ranks for the mean.
        weights: float32 [ranks], on the device of ``payloads``; None: there is no product with a weight.
    """
    torch.ops.pykernels.compress_decode(payloads, out, segments, codec, block, factor, weights)


def compress_reduce(
    payloads: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    """Encode ``factor * (sum of what the ranks sent) + residual`` again: what the owner of a shard sends to all.

    Args:
        payloads: uint8 [ranks, bytes], as for :func:`compress_decode`.
        residual: float32 [elements]; it keeps what this second encoding does not send.
        payload: uint8 [bytes], contiguous; its records lie at the same bytes as those of ``payloads``.
        segments: int64 [S, 3]; the first column counts elements of ``residual``.
        codec: a name in :data:`CODECS`.
        block: elements of a record.
        factor: 1/ranks for the mean.
        stochastic: round by chance.
        seed: of that chance, any 64-bit integer.
    """
    torch.ops.pykernels.compress_reduce(payloads, residual, payload, segments, codec, block, factor, stochastic, seed)


@fake("compress_encode", "compress_decode", "compress_reduce")
def _() -> None:
    """Results are written into arguments."""
