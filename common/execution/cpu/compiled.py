"""Numba's compiler, with a cache that knows a kernel by what it is built from, not by where it lies.

Numba's own cache looks at the one file that holds the function, and files it under that file's path. So after an edit
in `simd.py`, from which our kernels are built, Numba would run the old machine code, and a fresh checkout would compile
everything again. Here the cache is a folder named after a digest of the sources, which all checkouts share.
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
ROOT = HERE.parents[2]
SOURCES = ("compiled.py", "simd*.py", "cpu_*.py")  # files of a folder that kernels for Numba are built from
config: Any = numba_config  # Numba fills it when it is imported


def sources(*folders: Path) -> list[Path]:
    return sorted({path for folder in folders for pattern in SOURCES for path in folder.glob(pattern)})


def digest(paths: Iterable[Path]) -> str:
    """Of the paths (below the repository) and contents of these files: machine code names the modules it calls, so a
    kernel that was moved must not share a folder with the same one in an older checkout."""
    found = hashlib.sha256()
    for path in paths:
        text, name = path.read_bytes(), path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
        found.update(f"{name} {len(text)} ".encode() + text)
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
    """`numba.njit(cache=True)`; the digest is of the files next to this one and next to the function."""

    def decorate(function: Callable[..., Any]) -> Any:
        dispatcher: Any = njit(nogil=True, parallel=parallel, error_model="numpy")(function)
        dispatcher._cache = _Cache(function)
        return dispatcher

    return decorate
