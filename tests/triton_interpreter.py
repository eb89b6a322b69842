"""Without a GPU, Triton's kernels run under its interpreter, which it must know before it is imported."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch

from tests.coverage import compile_measured


def repair_interpreter() -> None:
    """Triton 3.6 turns one-element arrays into loop bounds with int(), which NumPy 2.4 refuses."""
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch
    # The language stays patched for each function: Triton does it again at every call, a third of the time.
    interpreter._LangPatchScope.restore = lambda self: None
    interpreter._patch_lang = cache(interpreter._patch_lang)
    interpreter.compile = compile_measured  # type: ignore[attr-defined]


if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    repair_interpreter()
