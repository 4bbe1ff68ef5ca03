"""ONNX files as torch.fx graphs: `load` reads one; of such a graph `source_of` tells what its inputs are."""

from pykernels.from_onnx.graph import load
from pykernels.from_onnx.inputs import Declared, Source, check, example_of, source_of

__all__ = ["Declared", "Source", "check", "example_of", "load", "source_of"]
