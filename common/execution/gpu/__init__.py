"""Fused kernels for GPUs (Triton)."""
