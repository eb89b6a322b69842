"""Fused kernels: Triton's for a GPU, Numba's for a CPU. What each computes is defined by the method of the same name in
`common.models.ops`."""
