"""Triton kernels, one file a family: the CUDA implementation of ops whose CPU implementation stands in csrc/cpu.

`pykernels/cuda/registry.py` registers them; nothing here is imported before the first call on a CUDA tensor. The
launchers take tensors of any device, so that the tests can run them on the CPU in Triton's interpreter.
"""
