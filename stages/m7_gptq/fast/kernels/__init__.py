"""Compiled kernels (Triton, Numba) that multiply by a weight that stays in 4 or 8 bits."""
