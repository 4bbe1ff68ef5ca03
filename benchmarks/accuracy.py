"""How much accuracy int8 costs, for us and for the rivals that are installed: trained networks on real photographs.

    python -m benchmarks.accuracy               # the 20 labelled photographs of the package foolbox, in two halves
    python -m benchmarks.accuracy --network mobilenet_v2    # instead of EfficientNet-Lite0
    python -m benchmarks.accuracy --data DIR    # DIR/calibration and DIR/evaluation, class index first in file names

Every column is measured on the evaluation photographs: top-1, top-5, agreement (the share of photographs with the same
top-1 class as fp32) and the relative error of the logits, |int8 - fp32| / |fp32|. "Simulated" runs the graph with its
quantize/dequantize nodes in plain torch; "kernels" is ``pykernels.optimize``, the product; they differ in rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.assets import Photographs, load_folder, load_foolbox_photographs
from pykernels.bench import zoo

Network = Callable[[torch.Tensor], torch.Tensor]
NETWORKS = {"efficientnet_lite0": zoo.efficientnet_lite0, "mobilenet_v2": zoo.mobilenet_v2_trained}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="efficientnet_lite0")
    parser.add_argument("--data", type=Path, help="folder that holds calibration/ and evaluation/")
    parser.add_argument("--swap", action="store_true", help="calibrate on the evaluation half and the other way round")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the rows to measure, by a part of their names")
    parser.add_argument("--threads", type=int, help="threads torch and the rivals may use")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model = NETWORKS[options.network]()
    calibration, evaluation = photographs(options.data)
    if options.network != "efficientnet_lite0":
        calibration, evaluation = calibration.normalized(), evaluation.normalized()
    if options.swap:
        calibration, evaluation = evaluation, calibration
    print(f"{options.network}, calibrated on {len(calibration)} photographs, evaluated on {len(evaluation)} others")
    print(f"{'':24}{'top-1':>8}{'top-5':>8}{'agree':>8}{'error':>9}{'prepared in':>13}")
    exact = logits(model, evaluation)
    print(row("fp32", exact, exact, evaluation))
    for name, prepare in networks():
        if options.only and not any(part in name for part in options.only):
            continue
        start = time.perf_counter()
        network = prepare(model, calibration.batches())
        seconds = time.perf_counter() - start
        print(row(name, logits(network, evaluation), exact, evaluation), f"{seconds:10.1f} s", flush=True)


def photographs(folder: Path | None) -> tuple[Photographs, Photographs]:
    """Calibration and evaluation photographs, never the same ones."""
    if folder is not None:
        return load_folder(folder / "calibration"), load_folder(folder / "evaluation")
    every = load_foolbox_photographs()
    half = len(every) // 2
    return (
        Photographs(every.images[:half], every.labels[:half], every.files[:half]),
        Photographs(every.images[half:], every.labels[half:], every.files[half:]),
    )


def logits(network: Network, images: Photographs) -> torch.Tensor:
    """fp32 [N, 1000], computed in batches."""
    with torch.no_grad():
        return torch.cat([network(batch) for batch in images.batches()])


def row(name: str, values: torch.Tensor, exact: torch.Tensor, images: Photographs) -> str:
    """One line of the table."""
    best = values.argmax(1)
    top1 = (best == images.labels).float().mean()
    top5 = (values.topk(5).indices == images.labels[:, None]).any(1).float().mean()
    agreement = (best == exact.argmax(1)).float().mean()
    error = (values - exact).norm() / exact.norm()
    return f"{name:24}{top1:8.1%}{top5:8.1%}{agreement:8.1%}{error:9.4f}"


def networks() -> Iterator[tuple[str, Callable[[torch.nn.Module, list[torch.Tensor]], Network]]]:
    """Every int8 network this installation can make, with what makes it from (model, calibration batches)."""
    yield "ours int8, simulated", ours_simulated
    yield "ours int8, no refining", lambda model, batches: ours_simulated(model, batches, refine=False)
    if library_loads():
        yield "ours int8, kernels", ours_kernels
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        yield "onnxruntime int8", onnxruntime_int8
    if importlib.util.find_spec("openvino") and importlib.util.find_spec("nncf"):
        yield "openvino + nncf int8", openvino_int8


def ours_simulated(model: torch.nn.Module, batches: list[torch.Tensor], refine: bool = True) -> Network:
    from pykernels.quantization import quantize

    return quantize(model, (batches[0],), batches, refine=refine)


def library_loads() -> bool:
    """Whether the compiled ops are there (this script also runs from a checkout that was not built)."""
    try:
        import pykernels

        return hasattr(pykernels, "optimize") and hasattr(torch.ops.pykernels.qconv2d, "default")
    except (ImportError, AttributeError, RuntimeError):
        return False


def ours_kernels(model: torch.nn.Module, batches: list[torch.Tensor]) -> Network:
    import pykernels

    return pykernels.optimize(model, (batches[0],), precision="int8", calibration=batches)


def onnx_file(model: torch.nn.Module, folder: str) -> str:
    path = f"{folder}/model.onnx"
    axes = {"x": {0: "batch"}, "y": {0: "batch"}}
    torch.onnx.export(
        model,
        (torch.zeros(1, 3, 224, 224),),
        path,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes=axes,
        dynamo=False,
    )
    return path


def onnxruntime_int8(model: torch.nn.Module, batches: list[torch.Tensor]) -> Network:
    """Static quantization as ONNX Runtime's documentation advises for x86: per channel, u8 activations, s8 weights."""
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    with tempfile.TemporaryDirectory() as folder:
        prepared, result = f"{folder}/prepared.onnx", f"{folder}/int8.onnx"
        quant_pre_process(onnx_file(model, folder), prepared)
        quantize_static(
            prepared, result, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )
        session = onnxruntime.InferenceSession(Path(result).read_bytes(), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino_int8(model: torch.nn.Module, batches: list[torch.Tensor]) -> Network:
    import nncf
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        network = openvino.convert_model(onnx_file(model, folder))
    dataset = nncf.Dataset([batch[i : i + 1].numpy() for batch in batches for i in range(len(batch))])
    compiled = openvino.compile_model(nncf.quantize(network, dataset, preset=nncf.QuantizationPreset.MIXED), "CPU")
    return lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0]))


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main()
