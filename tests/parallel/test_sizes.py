"""Which free sizes of a network belong together, found by asking it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pykernels as pk
from pykernels.parallel.sizes import calls


class Rows(nn.Module):
    """x [a, b], y [b, c], z [a]: relu(x y) + z."""

    def forward(self, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ y) + z[:, None]


def rows(a: int, b: int, c: int) -> pk.Optimized:
    dims = {name: torch.export.Dim(name, min=2, max=64) for name in "abc"}
    shapes = ({0: dims["a"], 1: dims["b"]}, {0: dims["b"], 1: dims["c"]}, {0: dims["a"]})
    return pk.optimize(Rows(), (torch.randn(a, b), torch.randn(b, c), torch.randn(a)), dynamic_shapes=shapes)


@pytest.mark.parametrize("sizes", [(3, 4, 5), (4, 5, 4)])
def test_sizes_that_a_network_ties_together_are_one(sizes: tuple[int, int, int]) -> None:
    """Those of one number in the example as well, as long as one of them can differ alone."""
    inputs, free = calls(rows(*sizes), None)
    assert len(free) == 5 and all(len(found) == 3 for found in free)  # the example, each changed alone, all changed
    for given, found in zip(inputs, free, strict=True):
        x, y, z = (list(t.shape) for t in given)
        assert x[1] == y[0] and x[0] == z[0] and sorted([*x, y[1]]) == sorted(found)
    for k, found in enumerate(free[1:4]):
        assert [a != b for a, b in zip(found, free[0], strict=True)] == [place == k for place in range(3)]
    assert all(a != b for a, b in zip(free[0], free[4], strict=True))


def test_a_network_of_fixed_sizes_has_one_call() -> None:
    fast = pk.optimize(nn.Linear(4, 4), (torch.randn(2, 4),), dynamic_batch=False)
    inputs, free = calls(fast, None)
    assert [[list(x.shape) for x in given] for given in inputs] == [[[2, 4]]] and free == [[]]


class Picked(nn.Module):
    """Of each row of x the masks' own, by number: masks of more rows than x are taken, of fewer are not."""

    def forward(self, x: torch.Tensor, masks: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.relu(x) * scale + masks[torch.arange(x.shape[0])]


def test_sizes_of_which_one_may_be_larger_alone_are_one_still() -> None:
    """And a number, which has no dimensions, is an input."""
    fast = pk.optimize(Picked(), (torch.randn(2, 4), torch.randn(2, 4), torch.tensor(2.0)))
    assert fast.free == [[0], [0], []]
    inputs, free = calls(fast, None)
    assert all(x.shape[0] == masks.shape[0] == found[0] for (x, masks, _), found in zip(inputs, free, strict=True))
    assert [len(found) for found in free] == [1, 1, 1] and inputs[0][2].shape == ()
