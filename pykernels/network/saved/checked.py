"""Calls of torch that trust their callers: what some kernels on the CPU assume of shapes is checked here first.

A call with shapes that do not fit reads past the end of a tensor there. Whoever writes a model gets such an error from
the layer above; a file has no layer above. So loaded graphs call these in place of the overloads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

aten = torch.ops.aten

__all__ = ["CHECKED"]


def _require(holds: Any, what: str) -> None:
    if not holds:
        raise ValueError(what)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``scaled_dot_product_attention``; key and value have as many rows."""
    _require(min(query.dim(), key.dim(), value.dim()) >= 2, "attention: at least 2 dimensions each are needed")
    _require(key.shape[-2] == value.shape[-2], "attention: key and value differ in their rows")
    return aten.scaled_dot_product_attention.default(query, key, value, *args, **kwargs)


def flash_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """``_scaled_dot_product_flash_attention_for_cpu``; [N, H, L, E], [N, H, S, E], [N, H, S, E]."""
    _require(query.dim() == 4 and key.shape == value.shape, "attention: 4 dimensions, key and value of one shape")
    same = [query.shape[i] == key.shape[i] for i in (0, 1, 3)]
    _require(all(same), "attention: query and key differ in batch, heads or their width")
    return aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value, *args, **kwargs)


def batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    var: torch.Tensor,
    momentum: float,
    eps: float,
) -> Any:
    """``_native_batch_norm_legit_no_training``; every parameter is [channels]."""
    for parameter in (weight, bias, mean, var):
        _require(parameter is None or list(parameter.shape) == [x.shape[1]], "batch norm: a parameter for each channel")
    return aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)


def lstm(
    x: torch.Tensor,
    state: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> Any:
    """``lstm``; in each direction weights [4 * H, inputs] and [4 * H, H or the projection's], biases [4 * H]."""
    _require(x.dim() in (2, 3) and len(state) == 2, "lstm: an input of 2 or 3 dimensions and two states")
    hidden, cell = state
    projected, width, ways = hidden.shape[-1] != cell.shape[-1], cell.shape[-1], 2 if bidirectional else 1
    each = 2 + (2 if has_biases else 0) + (1 if projected else 0)
    _require(layers > 0 and len(params) == layers * ways * each, "lstm: parameters of another number of layers")
    batch = [x.shape[0 if batch_first else 1]] if x.dim() == 3 else []
    _require(list(hidden.shape[:-1]) == [layers * ways, *batch], "lstm: a state that does not fit the input")
    _require(cell.shape[:-1] == hidden.shape[:-1], "lstm: two states that do not fit")
    inputs = x.shape[-1]
    for layer in range(layers):
        for way in range(ways):
            first = (layer * ways + way) * each
            shapes = [[4 * width, inputs], [4 * width, hidden.shape[-1]]]
            shapes += [[4 * width]] * 2 if has_biases else []
            shapes += [[hidden.shape[-1], width]] if projected else []
            found = [list(parameter.shape) for parameter in params[first : first + each]]
            _require(found == shapes, f"lstm: parameters of layer {layer} are {found}, not {shapes}")
        inputs = ways * hidden.shape[-1]
    return aten.lstm.input(x, state, params, has_biases, layers, dropout, train, bidirectional, batch_first)


CHECKED: dict[Any, Callable[..., Any]] = {
    aten.scaled_dot_product_attention.default: attention,
    aten._scaled_dot_product_flash_attention_for_cpu.default: flash_attention,
    aten._native_batch_norm_legit_no_training.default: batch_norm,
    aten.lstm.input: lstm,
}
