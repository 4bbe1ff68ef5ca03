"""ONNX's recurrent layers, whose gates stand in another order than torch's."""

from __future__ import annotations

from typing import Any

import torch

from pykernels.from_onnx.table import Refused, operator

__all__: list[str] = []

_LSTM = (0, 2, 3, 1)  # torch's input, forget, cell, output of ONNX's input, output, forget, cell
_GRU = (1, 0, 2)  # reset, update, new of update, reset, new
_DIRECTIONS = ("forward", "reverse", "bidirectional")
_DEFAULTS = {
    "lstm": ["sigmoid", "tanh", "tanh"],
    "gru": ["sigmoid", "tanh"],
    "rnn_tanh": ["tanh"],
    "rnn_relu": ["relu"],
}


@operator("LSTM", several=True)
def lstm(
    x: torch.Tensor,
    weight: torch.Tensor,
    recurrence: torch.Tensor,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    cell: torch.Tensor | None = None,
    peepholes: torch.Tensor | None = None,
    *,
    activations: list[str] | None = None,
    direction: str = "forward",
    hidden_size: int,
    input_forget: int = 0,
    layout: int = 0,
    outputs: int,
) -> tuple[torch.Tensor, ...]:
    """[T, N, in] -> [T, directions, N, hidden], and the last states [directions, N, hidden]."""
    if peepholes is not None or input_forget:
        raise Refused("peepholes, or input_forget")
    parameters = _parameters(weight, recurrence, bias, _LSTM)
    first = [_state(x, weight, hidden_size, state) for state in (hidden, cell)]
    _check("lstm", lengths, activations, layout)
    return _run(torch.lstm, x, first, parameters, bias is not None, direction)


@operator("GRU", several=True)
def gru(
    x: torch.Tensor,
    weight: torch.Tensor,
    recurrence: torch.Tensor,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    *,
    activations: list[str] | None = None,
    direction: str = "forward",
    hidden_size: int,
    layout: int = 0,
    linear_before_reset: int = 0,
    outputs: int,
) -> tuple[torch.Tensor, ...]:
    if not linear_before_reset:
        raise Refused("linear_before_reset 0, where torch multiplies after the product")
    _check("gru", lengths, activations, layout)
    parameters = _parameters(weight, recurrence, bias, _GRU)
    return _run(torch.gru, x, _state(x, weight, hidden_size, hidden), parameters, bias is not None, direction)


@operator("RNN", several=True)
def rnn(
    x: torch.Tensor,
    weight: torch.Tensor,
    recurrence: torch.Tensor,
    bias: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    *,
    activations: list[str] | None = None,
    direction: str = "forward",
    hidden_size: int,
    layout: int = 0,
    outputs: int,
) -> tuple[torch.Tensor, ...]:
    curved = (activations or ["Tanh"])[0].lower() != "relu"
    _check("rnn_tanh" if curved else "rnn_relu", lengths, activations, layout)
    parameters = _parameters(weight, recurrence, bias, (0,))
    layer = torch.rnn_tanh if curved else torch.rnn_relu
    return _run(layer, x, _state(x, weight, hidden_size, hidden), parameters, bias is not None, direction)


def _check(kind: str, lengths: Any, activations: list[str] | None, layout: int) -> None:
    if lengths is not None or layout:
        raise Refused("lengths of sequences, or layout 1")
    usual = _DEFAULTS[kind]
    given = [name.lower() for name in activations or usual]
    if any(given[start : start + len(usual)] != usual for start in range(0, len(given), len(usual))):
        raise Refused(f"activations {', '.join(activations or [])}")


def _parameters(
    weight: torch.Tensor, recurrence: torch.Tensor, bias: torch.Tensor | None, gates: tuple[int, ...]
) -> list[torch.Tensor]:
    """Of each direction the two weights and the two biases, with the gates in torch's order."""

    def ordered(values: torch.Tensor) -> torch.Tensor:
        parts = values.chunk(len(gates))
        return torch.cat([parts[gate] for gate in gates])

    rows = len(gates) * recurrence.shape[-1]
    sizes = [t.shape[:2] for t in (weight, recurrence)] + (
        [] if bias is None else [(bias.shape[0], bias.shape[-1] // 2)]
    )
    if weight.dim() != 3 or recurrence.dim() != 3 or any(tuple(s) != (weight.shape[0], rows) for s in sizes):
        raise Refused("weights whose sizes do not fit")
    found = []
    for d in range(weight.shape[0]):
        found += [ordered(weight[d]), ordered(recurrence[d])]
        if bias is not None:
            found += [ordered(half) for half in bias[d].chunk(2)]
    return found


def _state(x: torch.Tensor, weight: torch.Tensor, size: int, given: torch.Tensor | None) -> torch.Tensor:
    """The first state: zeros where the file has none."""
    return x.new_zeros(weight.shape[0], x.shape[1], size) if given is None else given


def _run(
    layer: Any, x: torch.Tensor, first: Any, parameters: list[torch.Tensor], biased: bool, direction: str
) -> tuple[torch.Tensor, ...]:
    backwards, both = direction == "reverse", direction == "bidirectional"
    if direction not in _DIRECTIONS or len(parameters) != (1 + both) * (4 if biased else 2):
        raise Refused(f"direction {direction!r:.40} with weights of other directions")
    y, *last = layer(x.flip(0) if backwards else x, first, parameters, biased, 1, 0.0, False, both, False)
    y = y.reshape(y.shape[0], y.shape[1], 2 if both else 1, -1).transpose(1, 2)
    return (y.flip(0) if backwards else y, *last)
