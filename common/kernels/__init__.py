"""Fused kernels, in Triton. What each computes is defined by the method of the same name in `common.models.ops`."""
