"""int8 quantization on torchao's PT2E flow: a quantizer that says what our kernels can run, and recipes around it."""

from __future__ import annotations

try:
    import torchao.quantization.pt2e  # noqa: F401
except ImportError as error:
    raise ImportError(
        "pykernels.quantization builds on torchao's PT2E flow, which could not be imported: pip install 'torchao>=0.14'"
    ) from error

from .quantizer import Int8Quantizer
from .recipes import QuantizationRecord, export_graph, quantize
from .training import convert_qat, eval_mode, prepare_qat, train_mode

__all__ = [
    "Int8Quantizer",
    "QuantizationRecord",
    "convert_qat",
    "eval_mode",
    "export_graph",
    "prepare_qat",
    "quantize",
    "train_mode",
]
