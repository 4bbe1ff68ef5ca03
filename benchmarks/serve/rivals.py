"""One network behind several servers: ours, other runtimes behind our server, and our network behind another server.

    python -m benchmarks.serve.rivals                                  # mobilenet_v2: those that are installed
    python -m benchmarks.serve.rivals --mlserver .venv-mlserver/bin/python

- `pykernels`: `pykernels serve --in-process`.
- `onnxruntime`, `openvino`: the same server and application, batches and threads, with that runtime in the network's
  place. Batches of theirs are not held to the bits of single rows (`--batch-error`), or they would be served without.
- `mlserver`: MLServer (tried: 1.7.1, uvloop 0.21, fastapi 0.115, starlette 0.46) with our network in a runtime
  of its own, adaptive batches of the same size, and as many parallel workers as the others have instances. It needs
  other versions of what we need, so it has an interpreter of its own, with torch and pykernels beside it.

fp32, 600 KB a request by NVIDIA's client over gRPC, since MLServer takes no tensors as bytes over HTTP; one thread a
call. Servers are asked in turn, a round each with a pause between; the medians of the rounds are printed. Latency: one
client. Throughput: as many as fill batches. All servers wait meanwhile, and clients share the cores with the one that
is asked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import pykernels as pk
from benchmarks.serve.in_process import INPUT, client, rate, timed
from pykernels.bench import zoo
from pykernels.bench.machine import machine
from pykernels.serve.model import UNTRIED

SHAPE = (1, 3, 224, 224)
PATIENCE = 120.0  # seconds for a server to start

MLSERVER = """
import numpy as np
import torch
from mlserver import MLModel, types

import pykernels as pk


class Network(MLModel):
    async def load(self):
        torch.set_num_threads(1)
        self.network = pk.load(self.settings.parameters.uri)
        return True

    async def predict(self, payload):
        (given,) = payload.inputs
        x = np.asarray(given.data.root, np.float32).reshape(given.shape)
        y = self.network(torch.from_numpy(x))
        out = types.ResponseOutput(name="output_0", shape=list(y.shape), datatype="FP32", data=y.flatten().tolist())
        return types.InferenceResponse(model_name=self.name, outputs=[out])
"""


class Runtime:
    """Another runtime's network, called like one of ours.

    Args:
        kind: ``onnxruntime`` or ``openvino``.
        path: of an ONNX file of one input with a free batch size, and one output.
    """

    def __init__(self, kind: str, path: str) -> None:
        self.input_names, self.output_names = [INPUT], ["output_0"]
        self.example: list[tuple[torch.dtype, list[int]] | None] = [(torch.float32, list(SHAPE))]
        self.free, self.dynamic = [[0]], True
        if kind == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            self._run = lambda x: session.run(None, {INPUT: x})[0]
        else:
            import openvino

            # A call's work is done on the calling thread's cores; each thread has a request of its own.
            core = openvino.Core()
            compiled = core.compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1})
            self._run = lambda x: compiled.create_infer_request().infer([x])[0]

    def nested(self, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(inputs), {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self._run(x.numpy()))


def serve(kind: str, path: str, instances: int, batch: int) -> None:
    """Our server with another runtime in the network's place."""
    from pykernels.serve import in_process, model
    from pykernels.serve.service import Options

    model._load = lambda path, limits: Runtime(kind, str(path))  # type: ignore[assignment]
    options = Options(models={"net": path}, instances=instances, batch=batch, batch_error=1e-2)
    place = "127.0.0.1"
    told = f"http://{place}:{{}}  grpc://{place}:{{}}"
    in_process.serve(options, place, 0, 0, lambda http, grpc: print(told.format(http, grpc), flush=True))


@contextlib.contextmanager
def process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """It runs while the context lasts."""
    begun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, **options)
    try:
        yield begun
    finally:
        begun.terminate()
        try:
            begun.wait(30)
        except subprocess.TimeoutExpired:  # MLServer may wait for a worker that has died
            begun.kill()
            begun.wait()


@contextlib.contextmanager
def ours(network: list[str]) -> Iterator[str]:
    """The address of a server of ours."""
    with process([sys.executable, "-m", *network]) as begun:
        assert begun.stdout is not None
        http, address = (place.partition("://")[2] for place in begun.stdout.readline().split())
        while UNTRIED in urllib.request.urlopen(f"http://{http}/v2/models/net/config").read().decode():
            time.sleep(0.1)
        yield address


@contextlib.contextmanager
def mlserver(python: str, net: pathlib.Path, instances: int, batch: int) -> Iterator[str]:
    """The address of MLServer with our network."""
    folder = net.parent / f"mlserver-{batch}"
    folder.mkdir()
    (folder / "network.py").write_text(MLSERVER)
    with contextlib.ExitStack() as held:
        ports = []
        for _ in range(3):
            listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(listener.getsockname()[1])
    http, grpc, metrics = ports
    settings = {"host": "127.0.0.1", "http_port": http, "grpc_port": grpc, "metrics_port": metrics, "debug": False}
    (folder / "settings.json").write_text(json.dumps({**settings, "parallel_workers": instances}))
    one = {"name": "net", "implementation": "network.Network", "parameters": {"uri": str(net)}}
    wait = {"max_batch_size": batch, "max_batch_time": 0.005} if batch > 1 else {}
    (folder / "model-settings.json").write_text(json.dumps({**one, **wait}))
    path = os.pathsep.join([str(folder), os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [python, "-c", "from mlserver.cli import main; main()", "start", str(folder)]
    with process(command, cwd=folder, env={**os.environ, "PYTHONPATH": path}):
        end = time.monotonic() + PATIENCE
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{http}/v2/models/net/ready").read()
                break
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
        yield f"127.0.0.1:{grpc}"


def compared(folder: pathlib.Path, asked_for: argparse.Namespace, instances: int, batch: int) -> dict[str, Any]:
    """The servers by name, as context managers that yield an address."""
    net, onnx = folder / "net.pk", folder / "net.onnx"
    alike = ["--replicas", str(instances), "--max-batch", str(batch)]
    command = ["pykernels", "serve", f"net={net}", "--in-process", "--port", "0", "--grpc-port", "0", *alike]
    found: dict[str, Any] = {"pykernels": ours(command)}
    for kind in ("onnxruntime", "openvino"):
        if importlib.util.find_spec(kind) is not None:
            again = ["benchmarks.serve.rivals", "--serve", kind, str(onnx), str(instances), str(batch)]
            found[kind] = ours(again)
    if asked_for.mlserver is not None:
        found["mlserver"] = mlserver(asked_for.mlserver, net, instances, batch)
    return {name: made for name, made in found.items() if asked_for.only is None or name in asked_for.only}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="mobilenet_v2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a round")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds before each round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mlserver", metavar="PYTHON", help="an interpreter with MLServer")
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    asked_for = parser.parse_args()
    if asked_for.serve is not None:
        kind, path, instances, batch = asked_for.serve
        serve(kind, path, int(instances), int(batch))
        return
    x, cores = torch.randn(SHAPE), len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        module = zoo.build(asked_for.network).eval()
        pk.optimize(module, (x,)).save(folder / "net.pk")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            free = {name: {0: "batch"} for name in (INPUT, "output_0")}
            names: dict[str, Any] = {"input_names": [INPUT], "output_names": ["output_0"], "dynamic_axes": free}
            torch.onnx.export(module, (x,), str(folder / "net.onnx"), dynamo=False, **names)
        for what, instances, batch in (("latency", 1, 1), ("throughput", cores, asked_for.batch)):
            with contextlib.ExitStack() as stack:
                places = {
                    name: stack.enter_context(made)
                    for name, made in compared(folder, asked_for, instances, batch).items()
                }
                calls = {name: client("grpc", place) for name, place in places.items()}
                found: dict[str, list[float]] = {name: [] for name in places}
                for _ in range(asked_for.rounds):
                    for name, place in places.items():
                        time.sleep(asked_for.pause)
                        if what == "latency":
                            found[name].append(1e3 * statistics.median(timed(calls[name], x, asked_for.seconds)))
                        else:
                            found[name].append(rate("grpc", place, SHAPE, 2 * cores * batch, asked_for.seconds))
            unit = "p50, ms" if what == "latency" else f"images/s, batches of up to {batch}"
            print(f"\n{asked_for.network}, fp32, {instances} instance(s) of one thread: {unit}")
            for name, rounds in found.items():
                print(
                    f"{name:12} {statistics.median(rounds):8.2f}   {min(rounds):8.2f} to {max(rounds):.2f}", flush=True
                )


if __name__ == "__main__":
    main()
