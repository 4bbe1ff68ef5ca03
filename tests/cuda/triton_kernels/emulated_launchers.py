"""Runs launchers of cuda/triton on CPU tensors: their kernels' PTX, compiled as for a launch on a GPU, emulated.

What Triton finds out about the arguments, and how it passes them on, is Triton's own (JITFunction.run and the launcher
of backends/nvidia/driver.py), but for what asks for a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import pytest
import torch
import triton
from emulated import Emulator
from interpreter import _answer, stand_in
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit
from triton.tools.tensor_descriptor import TensorDescriptor

NUMBERS = {
    "i1": ctypes.c_uint8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32, "i64": ctypes.c_int64,
    "u1": ctypes.c_uint8, "u8": ctypes.c_uint8, "u16": ctypes.c_uint16, "u32": ctypes.c_uint32, "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float, "fp64": ctypes.c_double,
}  # fmt: skip


def _without_machine_code(*stage: Any) -> tuple[str, str] | None:
    """Triton's hook into what compiles: asked for its name, or given the backend, its stages and more."""
    if not stage:
        return "ptx", "ptx"
    stage[1]["cubin"] = lambda text, metadata: b""
    return None


@functools.cache
def _binder(kernel: Any, target: GPUTarget) -> tuple[Any, Any]:
    backend = make_backend(target)
    return backend, jit.create_function_from_signature(kernel.signature, kernel.params, backend)


class EmulatedGPU:
    """Calls launchers, as the interpreter does, on an emulated GPU.

    Attributes:
        machine: compute capability times 10, and multiprocessors.
        ptx: of the kernels of the last call.
    """

    def __init__(self, device: Emulator, machine: tuple[int, int]) -> None:
        self.machine = machine
        self.ptx = ""
        self._device = device
        self._compiled: dict[Any, Any] = {}

    def _specialized(self, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The kernel compiled for these arguments, its name on the device, and the arguments with their types."""
        target = GPUTarget("cuda", self.machine[0], 32)
        backend, bind = _binder(kernel, target)
        kwargs["debug"] = False
        bound, specialization, given = bind(*args, **kwargs)
        key = (kernel, str(specialization), str(given))
        options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, given)
        if key not in self._compiled:
            source = ASTSource(kernel, signature, constants, attributes)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _without_machine_code)
                found = triton.compile(source, target=target, options=options.__dict__)
            # All that is compiled of one kernel has one name.
            own = f"{found.metadata.name}_{len(self._compiled)}"
            self._device.load(found.asm["ptx"].replace(found.metadata.name, own))
            self._compiled[key] = found, own
        return *self._compiled[key], [(signature[name], value) for name, value in bound.items()]

    def _descriptor(self, x: TensorDescriptor, form: dict[str, Any]) -> list[Any]:
        """A descriptor of bytes, then its shape and its strides."""
        assert form["elem_size"] == 1 and x.padding == "zero" and not form["fp4_padded"] and x.base.is_contiguous()
        made = self._device.tensor_map(x.base.view(torch.uint8), tuple(reversed(form["block_size"])), form["swizzle"])
        return [made, *map(ctypes.c_int32, x.shape), *map(ctypes.c_int64, x.strides)]

    def _run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found, name, arguments = self._specialized(kernel, args, kwargs)
        forms = iter(getattr(found.metadata, "tensordesc_meta", None) or [])
        memory: list[torch.Tensor] = []
        values: list[Any] = []
        for kind, value in arguments:
            if isinstance(value, torch.Tensor):
                memory.append(value)
                values.append(ctypes.c_void_p(value.data_ptr()))
            elif isinstance(value, TensorDescriptor):
                memory.append(value.base)
                values += self._descriptor(value, next(forms))
            elif kind != "constexpr":
                values.append(NUMBERS[kind](value))
        assert not found.metadata.global_scratch_size and not found.metadata.profile_scratch_size
        values += [ctypes.c_void_p(), ctypes.c_void_p()]  # those two
        threads, shared = 32 * found.metadata.num_warps, found.metadata.shared
        self._device.start(name, (*grid, 1, 1)[:3], threads, values, memory, shared, self.machine[0])
        self.ptx += found.asm["ptx"]

    def answer(self, module: str, name: str, *arguments: Any, **named: Any) -> Any:
        """What `pykernels.cuda.triton.<module>.<name>` returns."""
        self.ptx = ""
        with pytest.MonkeyPatch.context() as patch, stand_in(self.machine):
            patch.setattr(jit.JITFunction, "run", lambda kernel, *args, **kwargs: self._run(kernel, *args, **kwargs))
            return _answer(module, name, arguments, named)

    def __call__(self, module: str, name: str, *arguments: Any) -> tuple[Any, ...]:
        """The arguments as `pykernels.cuda.triton.<module>.<name>` leaves them."""
        self.answer(module, name, *arguments)
        return arguments
