"""Numba's compiler, with a cache that knows a kernel by what it is built from, not by where it lies.

Numba's own cache looks at the one file that holds the function, and files it under that file's path. Our kernels are
built from `simd.py`: after an edit there, Numba would go on running the machine code of before. And a fresh checkout
would compile for minutes what the one beside it has. So the cache is a folder named after a digest of the sources, in
the project's cache: every checkout with the same kernels shares it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from numba import njit
from numba.core import caching
from numba.core import config as numba_config

from common.execution.cache import cache_root

# pyright: basic
# Numba carries no types.

HERE = Path(__file__).parent
SOURCES = ("compiled.py", "simd.py", "cpu_*.py")
"""Files of a folder that kernels for Numba are built from."""
config: Any = numba_config  # Numba fills it when it is imported


def sources(*folders: Path) -> list[Path]:
    return sorted({path for folder in folders for pattern in SOURCES for path in folder.glob(pattern)})


def digest(paths: Iterable[Path]) -> str:
    """Of the names and contents of these files."""
    found = hashlib.sha256()
    for path in paths:
        text = path.read_bytes()
        found.update(f"{path.name} {len(text)} ".encode() + text)
    return found.hexdigest()[:16]


class _Locator(caching._CacheLocator):
    """Tells Numba the folder; $NUMBA_CACHE_DIR is taken before the project's cache."""

    def __init__(self, line: int, source: Path) -> None:
        self._line, self._digest = line, digest(sources(HERE, source.parent))
        self._folder = Path(config.CACHE_DIR or cache_root()) / f"numba-{self._digest}"

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return self._digest

    def get_disambiguator(self) -> str:
        return str(self._line)

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:
        """None, for Numba's own places, where the folder cannot be written."""
        locator = cls(py_func.__code__.co_firstlineno, Path(py_file))
        try:
            locator.ensure_cache_path()
        except OSError:
            return None
        return locator


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator, *caching.CompileResultCacheImpl._locator_classes]  # noqa: RUF012


class _Cache(caching.FunctionCache):
    _impl_class = _CacheImpl


def compiled(parallel: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit(cache=True)`; the digest is of the files beside this one and of those beside the function."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, parallel=parallel, error_model="numpy")(function)
        dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate
