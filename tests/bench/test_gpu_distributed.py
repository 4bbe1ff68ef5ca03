"""gpu-check's look at gradients between ranks, on a CPU: gloo in NCCL's place."""

from __future__ import annotations

import subprocess

import pytest
import torch

from benchmarks.gpu import check, check_distributed
from benchmarks.gpu.side_by_side import Skipped


@pytest.mark.slow
def test_hooks_on_one_rank_and_on_two() -> None:
    found = dict(check_distributed.check_distributed("cpu"))
    assert not {name: wrong for name, wrong in found.items() if wrong is not None}
    assert len(found) == len(check_distributed.SHARDED) + len(check_distributed.REPLICATED)


def test_what_is_called_wrong() -> None:
    true = [torch.ones(4), torch.full((2, 2), 2.0)]
    near, far = [t * 1.001 for t in true], [t * 1.1 for t in true]
    assert check_distributed.complaint(near, near, true, 0.01) is None
    assert check_distributed.complaint(far, far, true, None) is None
    assert "off the true average by 0.1" in str(check_distributed.complaint(far, far, true, 0.01))
    assert "comes late" in str(check_distributed.complaint(near, true, true, 0.01))
    assert "not finite" in str(check_distributed.complaint([t * torch.nan for t in true], near, true, 0.01))
    assert "4 gradients, not 8" in str(check_distributed.complaint(true[:1], true[:1], true, 0.01))


def test_the_part_of_gpu_check_names_what_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of its process, and that there is no second GPU."""
    lines = '["FSDP over nccl, int8", null]\nof NCCL\n["DDP over gloo, int4", "off"]\n'
    done = subprocess.CompletedProcess([], 1, stdout=lines, stderr="Traceback")
    monkeypatch.setattr(check.subprocess, "run", lambda *_, **__: done)
    findings = check.check_ranks()
    assert [next(findings) for _ in range(3)] == [
        ("FSDP over nccl, int8", None), ("DDP over gloo, int4", "off"), ("ranks", "Traceback")
    ]  # fmt: skip
    with pytest.raises(Skipped, match="two GPUs"):
        next(findings)
