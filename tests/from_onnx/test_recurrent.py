"""Recurrent layers against ONNX's reference implementation, and against torch's modules as its exporter writes them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")

from onnx import helper

import pykernels as pk
from pykernels.from_onnx import load
from tests.from_onnx.onnx_models import answers, model, saved


def parameters(gates: int, directions: int, inputs: int = 4, hidden: int = 5) -> dict[str, Any]:
    random = np.random.default_rng(gates)
    shapes = {"w": (gates * hidden, inputs), "r": (gates * hidden, hidden), "b": (2 * gates * hidden,)}
    return {name: random.standard_normal((directions, *shape)).astype(np.float32) for name, shape in shapes.items()}


def layer(kind: str, outputs: list[str], directions: int = 1, inputs: list[str] | None = None, **how: Any) -> Any:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    node = helper.make_node(kind, inputs or ["x", "w", "r", "b"], outputs, name="layer", hidden_size=5, **how)
    return model(
        [node], {"x": (np.float32, [7, 2, 4])}, [name for name in outputs if name], parameters(gates, directions)
    )


@pytest.mark.parametrize(
    "proto",
    [
        layer("LSTM", ["y", "h", "c"]),
        layer("LSTM", ["", "", "c"], inputs=["x", "w", "r"]),
        layer("GRU", ["y", "h"], linear_before_reset=1),
        layer("RNN", ["y", "h"]),
    ],
    ids=["LSTM", "the cell alone", "GRU", "RNN"],
)
def test_a_recurrent_layer_answers_as_its_reference(proto: Any, tmp_path: Path) -> None:
    x = torch.randn(7, 2, 4)
    found = load(saved(proto, tmp_path))(x)
    found = list(found.values()) if isinstance(found, dict) else [found]
    for y, expected in zip(found, answers(proto, x), strict=True):
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_layers_of_torch_come_back(kind: str, tmp_path: Path) -> None:
    """Two layers in both directions, states and all."""
    module = getattr(nn, kind)(4, 5, 2, bidirectional=True).eval()
    x, path = torch.randn(7, 2, 4), tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (x,), str(path), dynamo=False)
    fast = pk.optimize(path)
    with torch.no_grad():
        y, states = module(x)
    found = list(fast(x).values())
    for answer, expected in zip(found, [y, *(states if kind == "LSTM" else [states])], strict=True):
        torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("RNN", 1)])
def test_a_layer_that_runs_backwards(kind: str, gates: int, tmp_path: Path) -> None:
    """It reads the last element first, and answers in the order of the elements."""
    x = torch.randn(7, 2, 4)
    ahead, back = (
        load(saved(layer(kind, ["y", "h"], direction=way), tmp_path))(t)
        for way, t in (("forward", x.flip(0)), ("reverse", x))
    )
    torch.testing.assert_close(back["y"], ahead["y"].flip(0))
    torch.testing.assert_close(back["h"], ahead["h"])


@pytest.mark.parametrize(
    "proto, why",
    [
        (layer("GRU", ["y"]), "linear_before_reset 0"),
        (layer("LSTM", ["y"], activations=["Relu", "Tanh", "Tanh"]), "activations Relu, Tanh, Tanh"),
        (layer("LSTM", ["y"], input_forget=1), "peepholes, or input_forget"),
        (layer("RNN", ["y"], layout=1), "lengths of sequences, or layout 1"),
        (layer("RNN", ["y"], direction="sideways"), "direction 'sideways' with weights of other directions"),
        (layer("RNN", ["y"], direction="bidirectional"), "direction 'bidirectional' with weights of other directions"),
        (layer("LSTM", ["y"], inputs=["x", "r", "w"]), "weights whose sizes do not fit"),
    ],
    ids=["GRU", "activations", "input_forget", "layout", "direction", "directions", "weights"],
)
def test_layers_that_torch_has_not_are_refused(proto: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"model.onnx: not understood: \w+ \(layer: .*{why}"):
        pk.optimize(saved(proto, tmp_path), torch.randn(7, 2, 4))
