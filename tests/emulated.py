"""The CUDA library's kernels on the emulated device: tests/emulator, built with -DPYKERNELS_CUDA_TESTS=ON.

The host's code is the library's own, the kernels are the PTX that its objects hold.
"""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import pytest
import torch

from pykernels.ops.names import ACTIVATIONS

LIBRARY = pathlib.Path(__file__).parent / "emulator" / "pykernels_cuda_emulated.so"
if os.environ.get("PYKERNELS_REQUIRE_EMULATOR") and not LIBRARY.exists():
    raise FileNotFoundError(f"{LIBRARY.name} was not built, and PYKERNELS_REQUIRE_EMULATOR forbids to skip its tests")
MARKS = [
    pytest.mark.emulated,
    pytest.mark.skipif(not LIBRARY.exists(), reason="the emulated device was not built: make test-emulated"),
]
FAMILIES = {
    "int8_gemm": "gemm",
    "int8_conv": "conv",
    "int8_few_channels": "few_channels",
}  # private ops, C++ namespaces

_Int, _Float, _Pointer = ctypes.c_int, ctypes.c_float, ctypes.c_void_p


def _struct(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items()), "__doc__": "That of a C++ header."})


Finish = _struct(
    "Finish",
    activation=_Int,
    residual=_Int,
    inverse=_Float,
    zero_point=_Int,
    low=_Int,
    high=_Int,
    residual_scale=_Float,
    residual_zero_point=_Int,
    residual_low=_Int,
    bfloat16=ctypes.c_bool,
    scaled=ctypes.c_bool,
    zero=_Float,
    offset=_Float,
    residual_factor=_Float,
    least=_Float,
    most=_Float,
)
Epilogue = _struct(
    "Epilogue",
    d=_Pointer,
    residual=_Pointer,
    row_scale=_Pointer,
    row_zero=_Pointer,
    row_scale_value=_Float,
    row_zero_value=_Int,
    column_scale=_Pointer,
    column_sum=_Pointer,
    bias=_Pointer,
    finish=Finish,
)
Gemm = _struct("Gemm", m=_Int, n=_Int, k=_Int, a=_Pointer, b=_Pointer, epilogue=Epilogue, stream=_Pointer)
Conv = _struct(
    "Conv",
    **dict.fromkeys(["images", "height", "width", "channels", "out_channels"], _Int),
    **dict.fromkeys(["kernel", "stride", "dilation", "before", "after"], _Int * 2),
    out_height=_Int,
    out_width=_Int,
    x=_Pointer,
    w=_Pointer,
    epilogue=Epilogue,
    stream=_Pointer,
)
FewChannels = _struct("FewChannels", conv=Conv, is_signed=ctypes.c_bool)


def _fold(f: Any, by_row: bool, adds: bool) -> None:
    """Of bytes, as csrc/cuda/epilogue/arguments.cpp does."""
    single = torch.tensor([f.inverse, f.residual_scale])
    f.scaled = not by_row and list(ACTIVATIONS)[f.activation] in ("none", "relu", "relu6") and f.residual != 2
    f.offset = f.zero = f.zero_point - f.low
    f.least = 0.0 if list(ACTIVATIONS)[f.activation] == "none" else f.zero
    top = (6 * single[0]).round().item() + f.zero
    f.most = min(top, 255.0) if list(ACTIVATIONS)[f.activation] == "relu6" else 255.0
    if adds:
        factor = (single[0] * single[1]).clamp(max=torch.finfo(torch.float32).max)
        f.residual_factor = factor.item()
        f.offset = (torch.tensor(f.offset) - (f.residual_zero_point - f.residual_low) * factor).item()


def _extent(t: torch.Tensor) -> int:
    """Bytes from its first element to its last."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


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
        for name in ("emulator_load", "emulator_launch", *self._functions("run"), *self._functions("name")):
            getattr(self._library, name).restype = ctypes.c_char_p
        self._library.emulator_allow.argtypes = [_Pointer, ctypes.c_size_t, _Int]
        self.configurations = {op: self._configurations(family) for op, family in FAMILIES.items()}

    @staticmethod
    def _functions(what: str) -> list[str]:
        return [f"{family}_{what}" for family in FAMILIES.values()]

    def _configurations(self, family: str) -> dict[str, tuple[int, int]]:
        """Index and needed compute capability (times 10) of each, by name."""
        count, name, arch = (getattr(self._library, f"{family}_{what}") for what in ("configs", "name", "arch"))
        return {name(index).decode(): (index, arch(index)) for index in range(count())}

    def load(self, text: str) -> None:
        """Add a PTX module; the first of two kernels of one name is run."""
        if complaint := self._library.emulator_load(text.encode()):
            raise ValueError(complaint.decode())

    def unload(self) -> None:
        """Forget all modules."""
        self._library.emulator_unload()

    def launch(
        self, kernel: str, threads: int, *arguments: torch.Tensor, shared: int = 0, reads: torch.Tensor | None = None
    ) -> None:
        """Run one block of a kernel on tensors by their addresses; RuntimeError says what went wrong.

        `reads` is what the kernel comes to by other ways.
        """
        self._library.emulator_forbid()
        for t in arguments:
            self._library.emulator_allow(t.data_ptr(), t.numel() * t.element_size(), 1)
        if reads is not None:
            self._library.emulator_allow(reads.data_ptr(), reads.numel() * reads.element_size(), 0)
        self._start(kernel, (1, 1, 1), threads, [_Pointer(t.data_ptr()) for t in arguments], shared, 90)

    def start(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        threads: int,
        values: list[Any],
        memory: list[torch.Tensor],
        shared: int,
        arch: int,
    ) -> None:
        """Run a kernel of `values`, numbers of ctypes and descriptors, which may use `memory`, on sm_`arch`.

        It may read whole words of which a byte is a tensor's, but write the tensor's bytes alone.
        """
        self._library.emulator_forbid()
        for t in memory:
            self._library.emulator_allow(t.data_ptr(), _extent(t), 1)
            self._words(t)
        self._start(kernel, grid, threads, values, shared, arch)

    def _start(
        self, kernel: str, grid: tuple[int, int, int], threads: int, values: list[Any], shared: int, arch: int
    ) -> None:
        addresses = (v.data_ptr() if isinstance(v, torch.Tensor) else ctypes.addressof(v) for v in values)
        pointers = (_Pointer * len(values))(*addresses)
        sizes = (ctypes.c_uint32 * 9)(*grid, threads, 1, 1, 1, 1, 1)
        self._library.emulator_device(arch, 4)
        if complaint := self._library.emulator_launch(kernel.encode(), sizes, shared, pointers):
            raise RuntimeError(complaint.decode())

    def tensor_map(
        self,
        x: torch.Tensor,
        box: tuple[int, ...],
        swizzle: int = 0,
        steps: tuple[int, ...] | None = None,
        corners: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
    ) -> torch.Tensor:
        """A TMA descriptor of a tensor of bytes, to be passed to a kernel by its address.

        Args:
            x: uint8, its last dimension contiguous.
            box: tiles, innermost dimension first; with `corners`, channels and pixels of im2col.
            swizzle: 0 none, 1, 2, 3: of rows of 32, 64, 128 bytes.
            steps: traversal strides, innermost first.
        """
        rank = x.dim()
        out = torch.zeros(192, dtype=torch.uint8)
        out = out[-out.data_ptr() % 64 :][:128]
        sizes = (ctypes.c_uint64 * rank)(*reversed(x.shape))
        strides = (ctypes.c_uint64 * rank)(*reversed(x.stride()[:-1]))
        lower, upper = [(_Int * len(c))(*c) for c in corners] if corners else (None, None)
        code = self._library.emulator_tensor_map(
            _Pointer(out.data_ptr()), rank, _Pointer(x.data_ptr()), sizes, strides, (ctypes.c_uint32 * len(box))(*box),
            (ctypes.c_uint32 * rank)(*(steps or (1,) * rank)), lower, upper, swizzle)  # fmt: skip
        if code:
            raise ValueError(f"the driver refuses the descriptor: {code}")
        return out

    def kind(self, kind: bool) -> None:
        self._library.emulator_kind(int(kind))

    def _memory(self, tensor: torch.Tensor | None, writable: bool = False) -> int | None:
        """Its address, of which the kernel may read, or write, what the tensor covers."""
        if tensor is None:
            return None
        self._library.emulator_allow(tensor.data_ptr(), tensor.numel() * tensor.element_size(), int(writable))
        return tensor.data_ptr()

    def _epilogue(self, given: dict[str, Any]) -> Any:
        e, out, r = Epilogue(), given["out"], given["residual"]
        e.d, e.residual = self._memory(out, True), self._memory(r)
        e.row_scale, e.row_zero = self._memory(given.get("row_scale")), self._memory(given.get("row_zero_point"))
        e.row_scale_value, e.row_zero_value = given["x_scale"], given["x_zero_point"]
        for name in ("column_scale", "column_sum", "bias"):
            setattr(e, name, self._memory(given[name]))
        f = e.finish
        f.activation = list(ACTIVATIONS).index(given["activation"])
        f.residual = 0 if r is None else ("before", "after").index(given["residual_order"]) + 1
        f.bfloat16 = out.dtype == torch.bfloat16
        if not out.is_floating_point():
            f.inverse = (1.0 / torch.tensor(given["out_scale"])).item()
            f.zero_point = given["out_zero_point"]
            f.low = 0 if out.dtype == torch.uint8 else -128
            f.high = f.low + 255
            f.residual_scale, f.residual_zero_point = given["residual_scale"], given["residual_zero_point"]
            f.residual_low = 0 if r is None or r.dtype == torch.uint8 else -128
            _fold(f, given.get("row_scale") is not None, r is not None)
        return e

    def _words(self, tensor: torch.Tensor) -> None:
        """Allow to read the whole words of which a byte is the tensor's."""
        begin, end = tensor.data_ptr() // 4 * 4, -(-(tensor.data_ptr() + _extent(tensor)) // 4) * 4
        self._library.emulator_allow(begin, end - begin, 0)

    def _conv(self, given: dict[str, Any]) -> Any:
        (images, c, h, w), (left, right, top, bottom), out = given["x"].shape, given["padding"], given["out"]
        return Conv(
            images, h, w, c, out.shape[1], given["kernel_size"], given["stride"], given.get("dilation", (1, 1)),
            (top, left), (bottom, right), *out.shape[2:], self._memory(given["x"]), self._memory(given["w"]),
            self._epilogue(given),
        )  # fmt: skip

    def run(self, op: str, config: str, given: dict[str, Any], multiprocessors: int = 4) -> None:
        """A private op of the library on CPU tensors, without its checks; RuntimeError says what went wrong."""
        self._library.emulator_forbid()
        out = given["out"]
        if op == "int8_gemm":
            (m, k), n = given["a"].shape, given["b"].shape[0]
            problem = Gemm(m, n, k, self._memory(given["a"]), self._memory(given["b"]), self._epilogue(given))
        else:
            problem = self._conv(given)
        if op == "int8_few_channels":
            self._words(given["x"])
            signed = given["x"].dtype == torch.int8
            problem.epilogue.row_zero_value += 128 if signed else 0
            problem = FewChannels(problem, signed)
        index, arch = self.configurations[op][config]
        self._library.emulator_device(arch, multiprocessors)
        run = getattr(self._library, f"{FAMILIES[op]}_run")
        if complaint := run(index, {1: 0, 2: 1, 4: 2}[out.element_size()], ctypes.byref(problem)):
            raise RuntimeError(complaint.decode())


@functools.cache
def emulator() -> Emulator:
    """With the PTX of the library's own objects."""
    made = Emulator()
    for text in ptx(LIBRARY):
        made.load(text)
    return made
