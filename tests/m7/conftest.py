"""Triton's kernels under its interpreter, where there is no GPU: the preparations are m4's."""

from __future__ import annotations

from tests.m4 import conftest

__all__ = ["conftest"]
