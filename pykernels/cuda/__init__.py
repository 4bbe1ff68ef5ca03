"""CUDA devices: which ops run there, their Triton kernels, the CUDA library and its tables, CUDA graphs."""
