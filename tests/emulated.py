"""The CUDA library's kernels on the emulated device: tests/emulator, built with -DPYKERNELS_CUDA_TESTS=ON.

The host's code is the library's own, the kernels are the PTX that its objects hold.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import subprocess
import tempfile
from typing import Any

import torch

LIBRARY = pathlib.Path(__file__).parent / "emulator" / "pykernels_cuda_emulated.so"
ACTIVATIONS = ("none", "relu", "relu6", "hardswish", "hardsigmoid", "silu", "sigmoid", "gelu", "tanh")  # activation.h

_Int, _Float, _Pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p


class Finish(ctypes.Structure):
    """gemm.h's."""

    _fields_ = [
        ("activation", _Int),
        ("residual", _Int),
        ("inverse", _Float),
        ("zero_point", _Int),
        ("low", _Int),
        ("high", _Int),
        ("residual_scale", _Float),
        ("residual_zero_point", _Int),
        ("residual_low", _Int),
        ("bfloat16", ctypes.c_bool),
    ]


class Problem(ctypes.Structure):
    """gemm.h's."""

    _fields_ = [
        ("m", _Int),
        ("n", _Int),
        ("k", _Int),
        ("a", _Pointer),
        ("b", _Pointer),
        ("d", _Pointer),
        ("residual", _Pointer),
        ("row_scale", _Pointer),
        ("row_zero", _Pointer),
        ("row_scale_value", _Float),
        ("row_zero_value", _Int),
        ("column_scale", _Pointer),
        ("column_sum", _Pointer),
        ("bias", _Pointer),
        ("finish", Finish),
        ("stream", _Pointer),
    ]


def ptx(library: pathlib.Path) -> list[str]:
    """Of every object in a library."""
    import triton

    tool = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([tool, "-xptx", "all", library], cwd=folder, check=True, capture_output=True)
        return [path.read_text() for path in sorted(pathlib.Path(folder).glob("*.ptx"))]


class Emulator:
    """The device. It does copies and wgmma as late as the hardware might, or, when `kind`, at once."""

    def __init__(self, library: pathlib.Path = LIBRARY) -> None:
        self._library = ctypes.CDLL(str(library))
        for name in ("emulator_load", "emulator_launch", "gemm_run", "gemm_name"):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.emulator_allow.argtypes = [_Pointer, ctypes.c_size_t, _Int]
        self.configurations: dict[str, tuple[int, int]] = {}
        for index in range(self._library.gemm_configs()):
            name = self._library.gemm_name(index).decode()
            self.configurations[name] = index, self._library.gemm_arch(index)

    def load(self, text: str) -> None:
        """Add a PTX module; the first of two kernels of one name is run."""
        if complaint := self._library.emulator_load(text.encode()):
            raise ValueError(complaint.decode())

    def unload(self) -> None:
        """Forget all modules."""
        self._library.emulator_unload()

    def launch(
        self, kernel: str, grid: int, threads: int, *arguments: Any, cluster: int = 1, shared: int = 0, arch: int = 90
    ) -> None:
        """Run a kernel by its name on tensors, integers (32 bits) and floats; RuntimeError says what went wrong."""
        self._library.emulator_forbid()
        values: list[Any] = []
        for argument in arguments:
            if isinstance(argument, torch.Tensor):
                self._library.emulator_allow(argument.data_ptr(), argument.numel() * argument.element_size(), 1)
                values.append(ctypes.c_void_p(argument.data_ptr()))
            else:
                values.append((ctypes.c_float if isinstance(argument, float) else ctypes.c_int)(argument))
        pointers = (_Pointer * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_uint32 * 9)(grid, 1, 1, threads, 1, 1, cluster, 1, 1)
        self._library.emulator_device(arch, 4)
        if complaint := self._library.emulator_launch(kernel.encode(), sizes, shared, pointers):
            raise RuntimeError(complaint.decode())

    def kind(self, kind: bool) -> None:
        self._library.emulator_kind(int(kind))

    def int8_gemm(self, config: str, given: dict[str, Any], out: torch.Tensor, multiprocessors: int = 4) -> None:
        """As `_cuda_int8_gemm` with CPU tensors; RuntimeError says what went wrong on the device."""
        index, arch = self.configurations[config]
        p, byte = Problem(), not out.is_floating_point()
        (p.m, p.k), p.n = given["a"].shape, given["b"].shape[0]
        tensors = {"a": "a", "b": "b", "residual": "residual", "row_scale": "row_scale", "row_zero": "row_zero_point",
                   "column_scale": "column_scale", "column_sum": "column_sum", "bias": "bias"}  # fmt: skip
        self._library.emulator_forbid()
        for field, name in tensors.items():
            if (t := given[name]) is not None:
                setattr(p, field, t.data_ptr())
                self._library.emulator_allow(t.data_ptr(), t.numel() * t.element_size(), 0)
        p.d = out.data_ptr()
        self._library.emulator_allow(p.d, out.numel() * out.element_size(), 1)
        p.row_scale_value, p.row_zero_value = given["x_scale"], given["x_zero_point"]
        f = p.finish
        f.activation = ACTIVATIONS.index(given["activation"])
        f.residual = 0 if given["residual"] is None else ("before", "after").index(given["residual_order"]) + 1
        f.bfloat16 = out.dtype == torch.bfloat16
        if byte:
            f.inverse = (1.0 / torch.tensor(given["out_scale"])).item()
            f.zero_point = given["out_zero_point"]
            f.low = 0 if out.dtype == torch.uint8 else -128
            f.high = f.low + 255
            f.residual_scale, f.residual_zero_point = given["residual_scale"], given["residual_zero_point"]
            f.residual_low = 0 if given["residual"] is None or given["residual"].dtype == torch.uint8 else -128
        self._library.emulator_device(arch, multiprocessors)
        width = {1: 0, 2: 1, 4: 2}[out.element_size()]
        if complaint := self._library.gemm_run(index, width, ctypes.byref(p)):
            raise RuntimeError(complaint.decode())


@functools.cache
def emulator() -> Emulator:
    """With the PTX of the library's own objects."""
    made = Emulator()
    for text in ptx(LIBRARY):
        made.load(text)
    return made
