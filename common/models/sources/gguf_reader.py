"""The header of a GGUF file: its metadata, and where each tensor lies.
`gguf.GGUFReader` makes several objects for each number of an array that a file only claims to have. Here every count,
length and offset is held against the bytes that are there before anything of its size is made."""

import mmap
import sys
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from common.errors import UserError, require
from common.text.json_file import is_there

T = TypeVar("T")

MAX_KEYS, MAX_TENSORS, MAX_NUMBERS = 4096, 1 << 16, 1 << 20  # Of an array's numbers: the largest vocabulary has 262,144
MAX_TEXT, MAX_TEXTS = 1 << 18, 50 << 20  # Bytes of one; of all together, and of Python's objects of them

_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GGUFTensor:
    """shape: as in PyTorch, the file's dimensions reversed. data: bytes [..., bytes of a row]."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


class Metadata:
    """The values by key, asked for by type, so that a wrong one is refused by its key's name."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values

    def get(self, key: str, kind: type[T]) -> T | None:
        """None where the file lacks the key. A whole number does for a float; true and false are no numbers."""
        value, plain = self.values.get(key), get_origin(kind) or kind
        if kind is float and type(value) is int:
            value = float(value)
        right = value is None or (isinstance(value, plain) and (kind is bool or type(value) is not bool))
        self.require(right, f"{key} must be {plain.__name__}, not {self.show(key)}")
        return cast("T | None", value)

    def need(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The default where the file lacks the key; `UserError` without one."""
        found = self.get(key, kind)
        value = default if found is None else found
        if value is None:
            raise UserError(f"{self.name}: the metadata lacks {key}")
        return value

    def show(self, key: str) -> str:
        value = self.values.get(key)
        return f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:80]

    def require(self, condition: bool, what: str) -> None:
        require(condition, f"{self.name}: {what}: download or convert it again")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors by name. What is wrong raises, of whatever kind: call it in `refusing`."""
    require(is_there(path), f"there is no file {path}")
    with path.open("rb") as file:
        require(file.read(4) == b"GGUF", f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(data)
    version = header.number("u4")
    require(version in (2, 3), f"{path} is of GGUF version {version}, or big-endian: convert it to version 2 or 3")
    num_tensors, num_values = header.number("u8"), header.number("u8")
    too_many = f"{path} has {num_values:,} keys and {num_tensors:,} tensors: it is damaged, or no language model"
    require(num_values <= MAX_KEYS and num_tensors <= MAX_TENSORS, too_many)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = header.text()
        require(key not in metadata, f"{path} has the key {key[:80]!r} twice: download or convert it again")
        metadata[key] = header.value(header.number("u4"))
    infos: dict[str, tuple[list[int], GGMLQuantizationType, int]] = {}
    for _ in range(num_tensors):
        name = header.text()
        require(name not in infos, f"{path} has the tensor {name[:80]!r} twice: download or convert it again")
        dimensions = header.numbers("u8", min(header.number("u4"), 5)).tolist()
        infos[name] = dimensions, GGMLQuantizationType(header.number("u4")), header.number("u8")
    alignment = Metadata(str(path), metadata).need("general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, which is no power of two")
    tensors: dict[str, GGUFTensor] = {}
    start, expected = -(-header.at // alignment) * alignment, 0
    for name, (dimensions, kind, offset) in infos.items():
        block, size = GGML_QUANT_SIZES[kind]
        if not 1 <= len(dimensions) <= 4 or min(dimensions) < 1 or dimensions[0] % block:
            raise ValueError(f"tensor {name[:80]} of type {kind.name} has dimensions {dimensions[:5]}")
        count = prod(dimensions) // block * size
        if offset != expected or start + offset + count > len(data):
            raise ValueError(f"tensor {name[:80]} is not where it must be, or reaches beyond the end of the file")
        expected = -(-(offset + count) // alignment) * alignment
        shape = tuple(reversed(dimensions))
        raw = np.frombuffer(data, np.uint8, count, start + offset)
        tensors[name] = GGUFTensor(kind, shape, raw.reshape(*shape[:-1], -1))
    return metadata, tensors


class _Header:
    """Reads from the start of a file's bytes; `at` is the offset of the next byte."""

    def __init__(self, data: mmap.mmap) -> None:
        self.at = 4
        self._data = data
        self._left = MAX_TEXTS

    def numbers(self, code: str, count: int) -> np.ndarray:
        dtype = np.dtype("<" + code)
        self._require(count * dtype.itemsize if count <= MAX_NUMBERS else 1 << 64)
        result = np.frombuffer(self._data, dtype, count, self.at)
        self.at += result.nbytes
        return result

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0].item()

    def text(self) -> str:
        start = self.at + 8
        length = int.from_bytes(self._data[self.at : start], "little")
        self._require(8 + length if length <= min(MAX_TEXT, self._left) else 1 << 64)
        self.at = start + length
        text = self._data[start : self.at].decode()
        self._left -= sys.getsizeof(text) + 8 + length
        return text

    def value(self, kind: int) -> Any:
        """A number, true or false, text, an array of numbers (not copied) or a list of texts."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("u4"), self.number("u8")
        if kind != _STRING:
            return self.numbers(_NUMBERS[kind], count)
        self._require(count * 8)
        return [self.text() for _ in range(count)]

    def _require(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise ValueError("it ends within its header, or claims to have more than it has, or than any model")
