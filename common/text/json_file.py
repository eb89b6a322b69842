"""JSON files of a model's folder."""

import json
from pathlib import Path
from typing import Any

from common.errors import refusing, require

LARGEST = 4 << 20  # Bytes: an index of 405 billion weights has 0.1 MB. In memory JSON may be 20 times as large.


def read_json(path: Path, missing: dict[str, Any] | None = None, largest: int = LARGEST) -> dict[str, Any]:
    """A JSON object, `missing` where there is no file; `UserError` for anything else, or more bytes than `largest`."""
    if missing is not None and not path.is_file():
        return missing
    with refusing(str(path)):
        require(path.stat().st_size <= largest, f"{path} cannot be read: it has more than {largest:,} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    require(isinstance(value, dict), f"{path} must hold a JSON object")
    return value


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
