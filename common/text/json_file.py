"""Small files of a model's folder, which somebody else wrote: held to a size before they are read, here or by a library
that has no limit of its own."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import refusing, require

LARGEST, ITEMS = 4 << 20, 400_000  # An index of 405 billion weights has 0.1 MB. As objects they take below 64 MiB
TOKEN, TOKEN_ITEMS, MOST_TOKENS = b'"single_word"', 13, 75_000  # Of added tokens most items are true, false and keys
_WIDE = re.compile(rb"[\xf0-\xf4]|\\u[dD]")


def is_there(path: Path, largest: int = 1 << 62) -> bool:
    """False where nothing has that name; `UserError` for a folder, a pipe, or more bytes than `largest`."""
    with refusing(str(path)):
        if there := path.exists():
            require(path.is_file(), f"{path} is no file, but a folder, a pipe or a device: take it away")
            require(path.stat().st_size <= largest, f"{path} cannot be read: it has more than {largest:,} bytes")
    return there


def check_file(path: Path, largest: int, items: int) -> None:
    """`UserError` for a file, if it is there, that a library would need more time and memory for than a real one."""
    if is_there(path, largest):
        with refusing(str(path)), path.open("rb") as file:
            _check_items(path, iter(lambda: file.read(1 << 20), b""), items)


def read_json(path: Path, missing: dict[str, Any] | None = None, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object, `missing` where there is no file; `UserError` for anything else, or more bytes than `largest`."""
    if not is_there(path, largest) and missing is not None:
        return missing
    with refusing(str(path)):
        data = path.read_bytes()
        width = 1 if data.isascii() and b"\\u" not in data else 4 if _WIDE.search(data) else 2  # of one character
        require(len(data) * (1 + 2 * width) <= 50 << 20, f"{path} cannot be read: as text it has too many bytes")
        _check_items(path, [data], ITEMS + TOKEN_ITEMS * min(data.count(TOKEN), MOST_TOKENS))
        value = json.loads(data.decode("utf-8-sig"))
    require(isinstance(value, dict), f"{path} must hold a JSON object")
    return value


def _check_items(path: Path, parts: Iterable[bytes], most: int) -> None:
    marks = [b"\n"] if path.suffix == ".txt" else [b",", b"[", b"{", b":"]
    found = sum(part.count(mark) for part in parts for mark in marks)
    require(found <= most, f"{path} cannot be read: it has about {found:,} values, and {most:,} is the most")


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
