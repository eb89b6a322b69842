"""Numba's compiler, with a cache that notices an edit in any of the kernels' files.

Numba's own cache looks at the one file that holds the function. Our kernels are built from `simd.py`: after an edit
there, Numba would go on running the machine code of before. So the cache lies in a folder that is named after a digest
of the sources.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import config as numba_config

# pyright: basic
# Numba carries no types.

HERE = Path(__file__).parent
config: Any = numba_config  # Numba fills it when it is imported


def digest(*folders: Path) -> str:
    """Of the names and contents of all Python files in these folders."""
    found = hashlib.sha256()
    for path in sorted({path for folder in folders for path in folder.glob("*.py")}):
        text = path.read_bytes()
        found.update(f"{path.name} {len(text)} ".encode() + text)
    return found.hexdigest()[:16]


def compiled(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True)`; the digest is of the files beside this one and of those beside the function.

    Where the folder of the sources cannot be written, Numba falls back to its own place in the user's cache.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, parallel=parallel, error_model="numpy")(function)
        name = f"numba-{digest(HERE, Path(function.__code__.co_filename).parent)}"
        chosen = config.CACHE_DIR  # by the user, in $NUMBA_CACHE_DIR
        try:  # Numba reads it once, here; nobody else in the process shall see our folder
            config.CACHE_DIR = str(Path(chosen or HERE / "__pycache__") / name)
            dispatcher.enable_caching()
        finally:
            config.CACHE_DIR = chosen
        return dispatcher

    return decorate
