"""The other end of `remote.py`, run as a script by an interpreter that need not have pykernels: it prepares one network
and runs it when it is told to.

Requests and answers are lines of JSON. What libraries print goes to stderr.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

Run = Callable[[], Any]


def executorch(program: Any, inputs: tuple[Any, ...], batches: Sequence[Any], precision: str, threads: int) -> Run:
    """XNNPACK through ExecuTorch's runtime; operators that it does not take run on ExecuTorch's portable kernels."""
    xnnpack = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir = importlib.import_module("executorch.exir")
    portable = importlib.import_module("executorch.extension.pybindings.portable_lib")
    if precision == "int8":
        quantizers = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
        pt2e = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        config = quantizers.get_symmetric_quantization_config(is_per_channel=True)
        prepared = pt2e.prepare_pt2e(program.module(), quantizers.XNNPACKQuantizer().set_global(config))
        for batch in batches:
            prepared(batch)
        program = torch.export.export(pt2e.convert_pt2e(prepared), inputs)
    lowered = exir.to_edge_transform_and_lower(
        program,
        partitioner=[xnnpack.XnnpackPartitioner()],
        compile_config=exir.EdgeCompileConfig(_check_ir_validity=False),
    ).to_executorch()
    portable._unsafe_reset_threadpool(threads)
    runtime = importlib.import_module("executorch.runtime").Runtime.get()
    forward = runtime.load_program(lowered.buffer).load_method("forward")

    def run(alive: Any = lowered) -> Any:  # the program reads the buffer and does not own it
        return forward.execute(inputs)[0]

    return run


def litert(program: Any, inputs: tuple[Any, ...], batches: Sequence[Any], precision: str, threads: int) -> Run:
    """LiteRT with its XNNPACK delegate, which is in force by default; int8 takes and gives bytes."""
    converter = importlib.import_module("litert_torch")
    runtime = importlib.import_module("ai_edge_litert.interpreter")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model.tflite")
        converter.convert(program.module(), inputs).export(path)
        content = pathlib.Path(path).read_bytes()
        if precision == "int8":
            quantizer = importlib.import_module("ai_edge_quantizer.quantizer")
            recipe = importlib.import_module("ai_edge_quantizer.recipe")
            signatures = runtime.Interpreter(model_path=path).get_signature_list()
            ((signature, names),) = signatures.items()
            making = quantizer.Quantizer(path, recipe.static_wi8_ai8())
            seen = making.calibrate({signature: [{names["inputs"][0]: batch.numpy()} for batch in batches]})
            content = bytes(making.quantize(seen).quantized_model)
    ready = runtime.Interpreter(model_content=content, num_threads=threads)
    ready.allocate_tensors()
    (source,), (target,) = ready.get_input_details(), ready.get_output_details()
    x = inputs[0]
    if source["dtype"].__name__ == "int8":
        scale, zero = source["quantization"]
        x = (x / scale + zero).round().clamp(-128, 127)
    ready.set_tensor(source["index"], x.numpy().astype(source["dtype"]))

    def run() -> Any:
        ready.invoke()
        y = torch.from_numpy(ready.get_tensor(target["index"]))
        scale, zero = target["quantization"]
        return (y.float() - zero) * scale if y.dtype == torch.int8 else y

    return run


ENGINES: dict[str, Callable[..., Run]] = {"executorch": executorch, "litert": litert}


def prepare(request: dict[str, Any]) -> Run:
    folder = pathlib.Path(request["folder"])
    torch.set_num_threads(request["threads"])
    program = torch.export.load(folder / "model.pt2")
    inputs, batches = (torch.load(folder / name, weights_only=True) for name in ("inputs.pt", "calibration.pt"))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return ENGINES[request["engine"]](program, inputs, batches, request["precision"], request["threads"])


def serve(requests: Any, answers: Any) -> None:
    """Answer requests until there are no more."""
    run: Run | None = None
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            if request["do"] == "prepare":
                run = prepare(request)
            elif request["do"] == "answer":
                assert run is not None
                torch.save(torch.as_tensor(run()).clone(), request["path"])
            else:
                assert run is not None
                start = time.perf_counter()
                for _ in range(request["times"]):
                    run()
                answer["seconds"] = time.perf_counter() - start
        except ImportError as absent:
            answer["absent"] = str(absent)
        except Exception as error:
            text = str(error).strip()
            answer["failed"] = f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # Converters print at length, from C++ too: their stdout is our stderr, the answers go where stdout was.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        serve(sys.stdin, answers)
