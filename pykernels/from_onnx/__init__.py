"""ONNX files as torch.fx graphs: `load` reads one, `declared` tells what the inputs of such a graph are."""

from pykernels.from_onnx.graph import Declared, declared, load

__all__ = ["Declared", "declared", "load"]
