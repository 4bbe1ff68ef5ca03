"""The parts of the PowerSGD hook."""

from __future__ import annotations

import torch
from ranks import run_ranks
from torch.nn.parallel import DistributedDataParallel as DDP
from training import backward, gradients, network, relative

from pykernels import comm
from pykernels.comm.powersgd import orthonormalize


def test_orthonormalize_spans_the_same_columns(seed: int = 0) -> None:
    torch.manual_seed(seed)
    matrices = [torch.randn(n, r) * scale for n, r, scale in ((40, 4, 1.0), (7, 4, 1e-6), (9, 2, 1e6), (5, 1, 1.0))]
    before = [m.double() for m in matrices]
    orthonormalize(matrices)
    for m, was in zip(matrices, before, strict=True):
        q = m.double()
        assert torch.allclose(q.t() @ q, torch.eye(q.shape[1], dtype=q.dtype), atol=1e-5)
        assert torch.allclose(q @ (q.t() @ was), was, atol=1e-5 * float(was.abs().max()))


def test_orthonormalize_survives_what_has_no_rank_and_passes_on_what_is_no_number() -> None:
    zero, twice, bad = torch.zeros(6, 3), torch.ones(6, 3), torch.full((6, 3), torch.nan)
    orthonormalize([zero, twice, bad])
    assert not zero.any()
    assert twice.isfinite().all() and float((twice.t() @ twice).trace()) <= 3.001
    assert bad.isnan().all()


def low_rank(rank: int) -> list[float]:
    """The same batch every time: what the steps send adds up to what they should."""
    plain, model = DDP(network()), DDP(network(), bucket_cap_mb=0.03)
    comm.register(model, "powersgd", rank=8, start_step=0)
    backward(plain, rank, 0)
    expected = gradients(plain)
    errors = []
    sums = [torch.zeros_like(g) for g in expected]
    for step in range(1, 25):
        model.zero_grad()
        backward(model, rank, 0)
        sums = [a + g for a, g in zip(sums, gradients(model), strict=True)]
        if step in (1, 24):
            errors.append(relative([s / step for s in sums], expected, True))
    return errors


def test_powersgd_catches_up_with_what_one_step_cannot_send() -> None:
    for first, last in run_ranks(2, low_rank):
        assert last < first / 3
        assert first < 1.0
