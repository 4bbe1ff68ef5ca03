"""`pykernels optimize model.onnx` and `pykernels serve model.onnx`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("onnx")

from onnx import helper

import pykernels as pk
from pykernels.cli import serve as command
from pykernels.cli.main import app
from tests.from_onnx.onnx_models import answers, model, saved


def pykernels(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", done.output).split())


def line(sizes: list[Any], kind: Any = np.float32, quantized: bool = False) -> Any:
    nodes = [helper.make_node("MatMul", ["d" if quantized else "x", "w"], ["y"], name="product")]
    if quantized:
        nodes.insert(0, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]))
        nodes.insert(1, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]))
        nodes.insert(2, helper.make_node("DequantizeLinear", ["b", "s"], ["w"]))
    weight = np.arange(12).reshape(4, 3)
    constants = {"b": weight.astype(np.int8), "s": np.float32(0.5), "z": np.uint8(128), "w": weight.astype(kind)}
    constants.pop("w" if quantized else "b")
    return model(nodes, {"x": (kind, sizes)}, ["y"], constants, opset=19)


def test_optimize_takes_the_sizes_of_the_file(tmp_path: Path) -> None:
    proto = line(["batch", 4])
    pykernels("optimize", saved(proto, tmp_path), "-o", tmp_path / "net.pk")
    x = torch.randn(5, 4)
    torch.testing.assert_close(pk.load(tmp_path / "net.pk")(x), answers(proto, x)[0])


def test_optimize_takes_sizes_that_the_file_leaves_free(tmp_path: Path) -> None:
    path = saved(line(["batch", "length", 4], np.float16), tmp_path)
    text = pykernels("optimize", path, "-o", tmp_path / "net.pk", status=1)
    assert (
        "--input-shape: " in text and "leaves sizes free, so an example is needed: x: float16[batch, length, 4]" in text
    )
    pykernels("optimize", path, "-o", tmp_path / "net.pk", "--input-shape", "2,3,4")
    assert pk.load(tmp_path / "net.pk").example == [(torch.float16, [2, 3, 4])]
    assert "2 shapes for" in pykernels("optimize", path, "-o", tmp_path / "n.pk", "--input-shape", "2,4;1", status=1)


@pytest.mark.parametrize(
    "command, message",
    [
        (["optimize", "{file}", "-o", "{folder}/net.pk"], "MODEL: {file}: not an ONNX model"),
        (["optimize", "{folder}/none.onnx", "-o", "{folder}/net.pk"], "MODEL: [Errno 2] No such file"),
        (["optimize", "{folder}/net.py:make", "-o", "{folder}/net.pk"], "--input-shape: "),
        (["compress", "{file}", "-o", "{folder}/net.pk", "--input-shape", "1,4"], "MODEL: compress prunes and trains"),
    ],
)
def test_mistakes_are_named(command: list[str], message: str, tmp_path: Path) -> None:
    names = {"file": tmp_path / "bad.onnx", "folder": tmp_path}
    names["file"].write_bytes(b"nothing")
    assert message.format(**names) in pykernels(*(word.format(**names) for word in command), status=1)


@pytest.mark.parametrize("quantized", [False, True])
def test_serve_optimizes_the_file_on_the_way_in(
    quantized: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("starlette", "tritonclient", "uvicorn"):
        pytest.importorskip(name)
    proto, x, served = line(["batch", 4], quantized=quantized), torch.tensor([[0.5, -1.0, 2.0, 0.0]]), []
    monkeypatch.setattr(command, "_run", lambda options, *_: served.append(pk.load(options.models["line"])))
    pykernels("serve", f"line={saved(proto, tmp_path)}", "--in-process")
    torch.testing.assert_close(served[0](x), answers(proto, x)[0])
    assert ("int8" in str(served[0].report()).splitlines()[0]) is quantized
