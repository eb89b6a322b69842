"""Writing results: a file is whole, or it is the one that was there before."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import UserError, require


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """`write` gets a path next to `path`, with the same ending; the finished file then takes `path`'s place."""
    path = Path(path)
    scratch = _scratch_beside(path)
    try:
        write(scratch)
        scratch.chmod(0o644)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def check_writable(*paths: Path) -> None:
    """Makes the folders of these files. `UserError` if one cannot be written: better now than after an hour's work."""
    for path in paths:
        try:
            folder = path.is_dir()
        except OSError as error:  # a name that is too long
            raise UserError(f"cannot write {str(path)[:200]}: {error.strerror}. Name a file") from error
        require(not folder, f"cannot write {path}: it is a folder. Name a file")
        _scratch_beside(path).unlink()


def _scratch_beside(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}. Choose another folder") from error
    os.close(handle)
    return Path(name)


def write_json(path: str | Path, value: Any, indent: int | None = 2) -> None:
    text = json.dumps(value, indent=indent, allow_nan=False) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def read_json(path: str | Path) -> dict[str, Any]:
    """A results file; `UserError` where it is missing or no results file."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. Run `python -m benchmarks compare` first") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}): delete it or choose another") from error
    if not isinstance(value, dict) or "records" not in value:
        raise UserError(f"{path} is no results file (it has no 'records'): choose the JSON of a bench run")
    return value
