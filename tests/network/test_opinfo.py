"""PyTorch's own samples of pooling, convolution, linear, elementwise and shape functions through `optimize`.

Each answers as eager does: what our kernels do not compute is torch's, and in the report. In-place variants write
through a view of a value of the graph's own.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

import hypothesis
import pytest
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils import _pytree as pytree

import pykernels as pk
from pykernels.graph.export import NotExportable

# Importing torch's test suite forbids to set flags of torch.backends and loads a Hypothesis profile of its own, in this
# process and for every other test.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
hypothesis.settings.load_profile("pykernels")

SAMPLES = 4  # of each op, drawn at random
FAMILIES = ("pool", "conv", "linear", "interpolate", "upsample", "pixel_", "pad", "norm", "unfold", "fold", "dropout")
SHAPES = set(
    [
        "view",
        "reshape",
        "permute",
        "transpose",
        "t",
        "squeeze",
        "unsqueeze",
        "flatten",
        "unflatten",
        "narrow",
        "select",
        "split",
        "chunk",
        "unbind",
        "movedim",
        "swapaxes",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "diagonal",
        "flip",
        "roll",
        "repeat",
        "tile",
        "cat",
        "stack",
        "hstack",
        "vstack",
        "dstack",
        "tensor_split",
        "rot90",
        "as_strided",
        "unfold",
        "diag_embed",
        "index_select",
        "gather",
        "take",
        "repeat_interleave",
        "T",
        "mT",
        "H",
        "atleast_2d",
        "broadcast_to",
        "contiguous",
        "clone",
        "fliplr",
        "flipud",
        "ravel",
        "columns_stack",
        "index_add",
        "index_fill",
        "masked_fill",
        "slice_scatter",
        "select_scatter",
        "diagonal_scatter",
        "where",
        "mean",
        "sum",
        "amax",
        "max.reduction_with_dim",
        "topk",
        "sort",
        "cumsum",
        "softmax",
        "log_softmax",
        "matmul",
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "einsum",
        "addcmul",
        "addcdiv",
        "clamp",
        "lerp",
        "add",
        "sub",
        "mul",
        "div",
        "rsub",
        "pow",
    ]
)


def _chosen(op: Any) -> bool:
    if not op.supports_dtype(torch.float32, "cpu") or op.name.startswith(("linalg", "fft", "sparse", "special")):
        return False
    if op.name.startswith(("_", "masked.", "ops.", "torch.ops", "jiterator", "signal")):
        return False
    known = op.name.startswith("nn.functional") and any(word in op.name for word in FAMILIES)
    elementwise = type(op).__name__ == "UnaryUfuncInfo"
    return known or elementwise or op.name.split(".")[0] in SHAPES


OPS = [op for op in op_db if _chosen(op)]
# Their answers differ from call to call.
RANDOM = {"dropout", "alpha_dropout", "feature_alpha_dropout", "dropout2d", "dropout3d", "fractional_max_pool2d"}
RANDOM |= {"fractional_max_pool3d", "rrelu"}


class Call(nn.Module):
    """One call with its tensors as inputs; everything else is part of the model."""

    def __init__(self, function: Any, arguments: Any, inplace: bool) -> None:
        super().__init__()
        self.function, self.inplace = function, inplace
        self.leaves, self.spec = pytree.tree_flatten(arguments)

    def forward(self, *tensors: torch.Tensor) -> Any:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves]
        (x, *args), kwargs = pytree.tree_unflatten(leaves, self.spec)
        if not self.inplace:
            return self.function(x, *args, **kwargs)
        y = x * 1
        self.function(y.view_as(y), *args, **kwargs)
        return y


def _check(function: Any, sample: Any, inplace: bool) -> bool:
    """Whether the sample could be captured; it then answers as eager does."""
    model = Call(function, ((sample.input, *sample.args), sample.kwargs), inplace).eval()
    tensors = tuple(leaf for leaf in model.leaves if isinstance(leaf, torch.Tensor))
    try:
        with torch.no_grad():
            expected = model(*tensors)
    except RuntimeError:
        return False  # an in-place variant that would have to change its size or dtype
    try:
        fast = pk.optimize(model, tensors, dynamic_batch=False)
    except NotExportable:
        return False
    with torch.no_grad():
        torch.testing.assert_close(fast(*tensors), expected, equal_nan=True)
    assert all(entry.reason for entry in fast.report().left)
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", OPS, ids=lambda op: f"{op.name}-{op.variant_test_name}".rstrip("-"))
def test_it_answers_as_eager_does(op: Any) -> None:
    if op.name.removeprefix("nn.functional.") in RANDOM:
        pytest.skip("its answers are random")
    samples = list(itertools.islice(op.sample_inputs("cpu", torch.float32, requires_grad=False), 60))
    samples = [s for s in samples if isinstance(s.input, (torch.Tensor, list, tuple))]
    random.Random(0).shuffle(samples)
    captured = 0
    for sample in samples[:SAMPLES]:
        captured += _check(op.op, sample, inplace=False)
        if op.inplace_variant is not None and isinstance(sample.input, torch.Tensor):
            _check(op.inplace_variant, sample, inplace=True)
    assert captured or not samples, "no sample could be captured"
