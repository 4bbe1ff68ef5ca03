"""`pykernels serve`: what it serves, how it ends, and what it says when it is held wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner

import pykernels as pk
from pykernels.cli import serve as command
from pykernels.cli.main import app
from pykernels.parallel import split

MODEL = """
import torch
from torch import nn

def make():
    torch.manual_seed(3)
    return nn.Linear(4, 3)
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "line.pk"
    pk.optimize(nn.Linear(4, 3), (torch.randn(2, 4),)).save(path)
    return path


def serve(*arguments: object, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)], env={"COLUMNS": "200", "TERM": "dumb"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == status, done.output
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served, in place of serving it."""
    found: list[Any] = []
    monkeypatch.setattr(command, "_run", lambda options, _, *place: found.extend([options, *place]))
    return found


def test_files_are_named_by_themselves_or_as_they_are_told(net: Path, asked: list[Any]) -> None:
    serve(net, f"other={net}", "--in-process", "--max-batch", 4, "--replicas", 1, "--p99-ms", 50)
    options = asked[0]
    assert options.models == {"line": str(net), "other": str(net)}
    assert (options.threads, options.instances, options.batch, options.p99_ms) == (1, 1, 4, 50.0)
    assert asked[1:] == ["127.0.0.1", 8000, 8001, True] and not options.control


def test_a_folder_is_served_as_it_is(net: Path, asked: list[Any]) -> None:
    serve(net.parent, "--in-process")
    assert asked[0].models == str(net.parent)


def test_a_folder_of_parts_is_one_network_which_takes_a_core_for_each(asked: list[Any], tmp_path: Path) -> None:
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    split(pk.optimize(layers, (torch.randn(2, 4),)), 2, rounds=1).save(tmp_path / "big")
    serve(tmp_path / "big", "--in-process", "--replicas", 1)
    assert asked[0].models == {"big": str(tmp_path / "big")}
    assert (asked[0].parts, asked[0].instances, asked[0].cores) == (2, 1, 2)
    serve(f"other={tmp_path / 'big'}", "--in-process", "--threads", 2)
    assert asked[5].models == {"other": str(tmp_path / "big")} and asked[5].cores >= 4
    (tmp_path / "big" / "part-2-of-2.pk").unlink()
    said = serve(f"big={tmp_path / 'big'}", "--in-process", status=1)
    assert "NETWORKS: big: the files of all parts of one network are needed" in said.replace("\n", " ")


def test_a_setup_says_how_unless_the_command_does(net: Path, asked: list[Any], tmp_path: Path) -> None:
    pk.Setup(threads=1, instances=2, batch=8).save(tmp_path / "setup.json")
    serve(net, "--in-process", "--setup", tmp_path / "setup.json", "--replicas", 1)
    assert (asked[0].threads, asked[0].instances, asked[0].batch) == (1, 1, 8)


def test_a_model_is_optimized_on_the_way_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    answers = []
    x = torch.randn(2, 4)
    monkeypatch.setattr(command, "_run", lambda options, *_: answers.append(pk.load(options.models["model"])(x)))
    serve(f"{tmp_path / 'model.py'}:make", "--in-process", "--input-shape", "2,4")
    torch.manual_seed(3)
    assert torch.allclose(answers[0], nn.Linear(4, 3)(x), atol=1e-6)


def test_mistakes_are_told_before_a_model_is_optimized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_optimize", lambda *_: pytest.fail("it is optimized first"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (tmp_path / "net.onnx").write_bytes(b"something")
    (tmp_path / "token").write_text("")
    for name, arguments, message in (
        ("net", ["--device", "cuda"], "--device: cuda cannot be used: "),
        ("net", ["--device", "tpu"], "--device: 'tpu' is no device"),
        ("net", ["--p99-ms", "0"], "--p99-ms: must be a finite number above 0"),
        ("net", ["--token-file", tmp_path / "token"], "--token-file: "),
        ("a/b", [], "NETWORKS: 'a/b' is no name"),
    ):
        said = serve(f"{name}={tmp_path / 'net.onnx'}", "--in-process", *arguments, status=1)
        assert message in said.replace("\n", " ")


def test_a_model_that_is_served_by_two_names_is_optimized_once(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(command, "_optimize", lambda *arguments: made.append(arguments[-1]))
    (tmp_path / "net.onnx").write_bytes(b"something")
    serve(f"a={tmp_path / 'net.onnx'}", f"b={tmp_path / 'net.onnx'}", "--in-process")
    assert asked[0].models == {"a": str(made[0]), "b": str(made[0])} and len(made) == 1


def test_others_are_let_in_with_a_warning_unless_there_is_a_token(net: Path, asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    assert "need no token" in serve(net, "--in-process", "--host", "0.0.0.0")
    assert "need no token" not in serve(net, "--in-process", "--host", "0.0.0.0", "--token-file", tmp_path / "token")
    assert "need no token" not in serve(net, "--in-process", "--host", "::1")


def test_a_cluster_is_told_and_nothing_is_served(net: Path, asked: list[Any], tmp_path: Path) -> None:
    said = serve(net, "--replicas", 3, "--write-config", tmp_path / "deploy")
    assert "rayservice.yaml" in said and not asked
    (application,) = yaml.safe_load((tmp_path / "deploy" / "serve.yaml").read_text())["applications"]
    assert application["args"]["replicas"] == 3 and application["args"]["instances"] == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["none.pk"], "NETWORKS: there is no file none.pk"),
        (["{net}", "line={net}"], "NETWORKS: 'line' is there twice; NAME=FILE gives another name"),
        (["net.onnx"], "NETWORKS: there is no file net.onnx"),
        (["{folder}/bad.onnx"], "bad.onnx: not "),
        (["model.py"], "NETWORKS: model.py: which callable returns the model? model.py:make, say"),
        (["model.py:make"], "--input-shape: model.py:make needs the shape of an example"),
        (["none:make", "--input-shape", "1,4"], "MODEL: none:make: No module named 'none'"),
        (["{net}", "--p99-ms", "-1"], "--p99-ms: must be a finite number above 0"),
        (["{net}", "--token-file", "{folder}/none"], "No such file"),
        (["{net}", "--setup", "{folder}/none"], "--setup: "),
        (["{net}", "--replicas", "999"], "--replicas, --threads: 999 instances of 1 threads need 999 cores"),
        (["bad/name={net}"], "NETWORKS: 'bad/name' is no name"),
        (["bad={folder}/bad.pk"], "NETWORKS: model 'bad' version 1 cannot be loaded"),
        (["{folder}/empty"], "NETWORKS: there is no net.pk in"),
    ],
)
def test_mistakes_are_named(net: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "bad.pk").write_bytes(b"nothing")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    given = [argument.format(net=net, folder=tmp_path) for argument in arguments]
    said = serve(*given, "--in-process", "--port", 0, "--grpc-port", 0, status=1)
    assert message in said.replace("\n", " ")


def test_what_is_not_installed_is_named(net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "starlette" else object())
    assert "serve: starlette is missing: pip install 'pykernels[serve]'" in serve(net, "--in-process", status=1)


def test_it_serves_until_it_is_told_to_stop_and_answers_what_it_took(net: Path, tmp_path: Path) -> None:
    options = ["--in-process", "--replicas", "1", "--port", "0", "--grpc-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pykernels", "serve", net, *options],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert process.stdout is not None
        http = process.stdout.readline().split()[0]
        x = torch.randn(2, 4)
        body = json.dumps({"instances": x.tolist()}).encode()

        def ask() -> Any:
            return json.load(urllib.request.urlopen(f"{http}/v1/models/line:predict", body, timeout=60))

        assert torch.equal(torch.tensor(ask()["predictions"]), pk.load(net)(x))
        answered: list[Any] = []
        threads = [threading.Thread(target=lambda: answered.append(ask())) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert len(answered) == 8 and time.monotonic() - begin < 25
    finally:
        process.kill()
        process.wait()


def test_nothing_of_it_is_imported_before_it_is_used() -> None:
    heavy = "starlette", "fastapi", "grpc", "ray", "uvicorn", "tritonclient", "prometheus_client"
    modules = "pykernels, pykernels.cli.main, pykernels.serve.service"
    code = f"import sys, {modules}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
