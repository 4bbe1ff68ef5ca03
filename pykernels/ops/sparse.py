"""Few elements of a gradient to the wire: those of largest magnitude, or some drawn at random; with error feedback.

:func:`sparse_encode` chooses the k elements of largest magnitude exactly; :func:`sparse_decode` adds up what all ranks
chose. :func:`randomk_encode` sends elements at positions that depend on a seed alone, so that only values travel, and
values of several ranks may be added before :func:`randomk_decode` spreads them.

``x`` and ``out`` are float32, bfloat16 or float16, contiguous, of any shape and fewer than 2^32 - 1 elements;
segments count their elements as if they were flat. ``segments``, int64 [S, 3] on the CPU and contiguous, are rows of
(first element, number of elements, a number that is not used here), ascending and without overlap; elements of no
segment are neither sent nor changed. ``residual`` and ``velocity`` are float32, contiguous, with as many elements as
``x``.

The functions write into their arguments and return nothing; the arguments must not overlap. Results are the same bits
on every isa and for any number of threads. None has a gradient. Bad arguments raise ``RuntimeError`` with the
argument's name.
"""

from __future__ import annotations

import torch

from pykernels.ops._register import fake

__all__ = ["randomk_decode", "randomk_encode", "sparse_decode", "sparse_encode"]


def sparse_encode(
    x: torch.Tensor,
    residual: torch.Tensor,
    velocity: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    k: int,
    threshold: float = 0.0,
    momentum: float = 0.0,
) -> None:
    """Send the elements of largest magnitude of ``v = residual + x``; the residual keeps the others.

    With a velocity (momentum correction, Lin et al., "Deep Gradient Compression") ``velocity = momentum * velocity +
    x`` and ``v = residual + velocity``. Residual and velocity become 0 where an element was sent. Where v is not finite
    they stay as they were; such elements count as the largest, NaN above infinity.

    Args:
        x: the gradient.
        residual: what was not sent before.
        velocity: or none.
        payload: uint8 [bytes], at least 8 * k, contiguous, at a multiple of 4 bytes: k positions in ``x`` as uint32,
            ascending, then k values as float32. Entries that are not used stand last, with position 2^32 - 1 and value
            0.
        segments: int64 [S, 3].
        k: elements to send at most; among equals the first are sent.
        threshold: smaller magnitudes are not sent, however few there are.
        momentum: of the velocity.
    """
    torch.ops.pykernels.sparse_encode(x, residual, velocity, payload, segments, k, threshold, momentum)


def sparse_decode(payloads: torch.Tensor, out: torch.Tensor, k: int, factor: float = 1.0) -> None:
    """Add ``factor`` times what the ranks sent to ``out``, rank after rank, each sum in fp32 and rounded to its dtype.

    Payloads are data of other machines: positions that do not ascend, or lie outside ``out``, are an error, and then
    ``out`` is as it was.

    Args:
        payloads: uint8 [ranks, bytes] of :func:`sparse_encode`, at least one rank; rows are contiguous, begin at
            multiples of 4 bytes and may lie apart.
        out: what is added to.
        k: as the ranks encoded with.
        factor: 1/ranks for the mean.
    """
    torch.ops.pykernels.sparse_decode(payloads, out, k, factor)


def randomk_encode(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    values: torch.Tensor,
    segments: torch.Tensor,
    k: int,
    seed: int,
) -> None:
    """Write k elements of ``v = x + residual`` to ``values``; the residual keeps the others.

    The segments' elements are cut into k strata as equal as can be, and one element is drawn of each: every element is
    drawn with a probability of about k / elements. The residual becomes 0 where an element was sent; where v is not
    finite it stays as it was.

    Args:
        x: the gradient.
        residual: what was not sent before; without it what is not drawn is lost.
        values: float32, contiguous, at least k elements.
        segments: int64 [S, 3].
        k: at most the number of the segments' elements.
        seed: any 64-bit integer; every rank must use the same, and another one in each step.
    """
    torch.ops.pykernels.randomk_encode(x, residual, values, segments, k, seed)


def randomk_decode(
    values: torch.Tensor, out: torch.Tensor, segments: torch.Tensor, k: int, seed: int, factor: float = 1.0
) -> None:
    """Write ``factor`` times the values to where they were drawn, and 0 to the other elements of the segments.

    Args:
        values: float32, contiguous, at least k elements: of one rank, or the sum over ranks.
        out: what is written to.
        segments: int64 [S, 3], as in :func:`randomk_encode`.
        k: as in :func:`randomk_encode`.
        seed: as in :func:`randomk_encode`.
        factor: 1/ranks for the mean; elements / k besides makes the estimate without a residual unbiased.
    """
    torch.ops.pykernels.randomk_decode(values, out, segments, k, seed, factor)


@fake("sparse_encode", "sparse_decode", "randomk_encode", "randomk_decode")
def _() -> None:
    """Results are written into arguments."""
