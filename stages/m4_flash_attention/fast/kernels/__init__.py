"""Kernels: Triton for a GPU, Numba for a CPU."""
