"""Compiled kernels for CPUs (Numba)."""
