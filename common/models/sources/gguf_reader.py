"""The header of a GGUF file: its metadata, and where each tensor lies.

Written here because `gguf.GGUFReader` makes several objects for each number of an array that the file merely claims to
have. Here every count, length and offset is held against the bytes that are there before anything of its size is made.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any, TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from common.errors import UserError, one_line, require

T = TypeVar("T", int, float, bool, str, list[str], np.ndarray)

MAX_STRINGS = 1 << 20
"""In all arrays together: 1.3 times those of the largest vocabulary (262,144 tokens, 514,906 merges)."""

_NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
_STRING, _ARRAY = 8, 9
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "an array of texts",
    np.ndarray: "an array of numbers",
}


@contextmanager
def refusing(name: str) -> Iterator[None]:
    """Whatever a foreign file makes fail ends in one line, wherever it fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = one_line(error)[:200]
        raise UserError(f"{name} is truncated or damaged ({reason}): download or convert it again") from error


@dataclass(frozen=True)
class GGUFTensor:
    """shape: as in PyTorch, the file's dimensions reversed. data: bytes [..., bytes of a row]."""

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


class Metadata:
    """The values by key, asked for by type, so that what is wrong is refused by its key's name."""

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name
        self.values = values

    def get(self, key: str, kind: type[T]) -> T | None:
        """None where the file lacks the key. A whole number does for a float, true and false for no number."""
        value = self.values.get(key)
        if kind is float and type(value) is int:
            value = float(value)
        if value is None or type(value) is kind or (kind is np.ndarray and isinstance(value, kind)):
            return value
        raise self.refusal(key, f"must be {_NAMES.get(kind, 'an array of texts')}")

    def need(self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise UserError(f"{self.name}: the metadata lacks {key}")
        return value

    def refusal(self, key: str, what: str) -> UserError:
        value = self.values.get(key)
        shown = f"an array of {len(value)}" if isinstance(value, list | np.ndarray) else repr(value)[:80]
        return UserError(f"{self.name}: {key} in the metadata {what}, not {shown}: download or convert it again")


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensors by name. Anything wrong raises, of whatever kind: call it in `refusing`."""
    with path.open("rb") as file:
        require(file.read(4) == b"GGUF", f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header = _Header(data)
    version = header.number(4)
    require(
        version in (2, 3),
        f"{path} is a GGUF file of version {version}, or of a big-endian machine: only versions 2 and 3 in "
        "little-endian order are supported. Convert the model again",
    )
    num_tensors, num_values = header.number(10), header.number(10)
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = header.text()
        _once(key in metadata, "key", key)
        metadata[key] = header.value(key)
    infos: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(num_tensors):
        name = header.text()
        _once(name in infos, "tensor", name)
        infos[name] = (header.numbers(10, header.number(4)).tolist(), header.number(4), header.number(10))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is no power of two: {alignment!r:.80}")
    start = _aligned(header.at, alignment)
    tensors: dict[str, GGUFTensor] = {}
    expected = 0
    for name, (dimensions, number, offset) in infos.items():
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if not 1 <= len(dimensions) <= 4 or min(dimensions) < 1 or dimensions[0] % block:
            raise ValueError(f"tensor {name} of type {kind.name} has dimensions {dimensions}")
        count = prod(dimensions) // block * size
        if offset != expected or start + offset + count > len(data):
            raise ValueError(f"tensor {name} does not lie where it must, or reaches beyond the end of the file")
        expected = _aligned(offset + count, alignment)
        shape = tuple(reversed(dimensions))
        raw = np.frombuffer(data, np.uint8, count, start + offset)
        tensors[name] = GGUFTensor(kind, shape, raw.reshape(*shape[:-1], -1))
    return metadata, tensors


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _once(seen: bool, what: str, name: str) -> None:
    if seen:
        raise ValueError(f"{what} {name[:80]!r} is there twice")


class _Header:
    """Reads from the start of a file's bytes; `at` is the offset of the next byte."""

    _LENGTH = Struct("<Q")

    def __init__(self, data: mmap.mmap) -> None:
        self.at = 4
        self._data = data
        self._strings_left = MAX_STRINGS

    def numbers(self, kind: int, count: int) -> np.ndarray:
        if kind not in _NUMBERS:
            raise ValueError(f"a value of unknown type {kind}, or an array of arrays")
        dtype = np.dtype("<" + _NUMBERS[kind])
        self._require(count * dtype.itemsize)
        result = np.frombuffer(self._data, dtype, count, self.at)
        self.at += result.nbytes
        return result

    def number(self, kind: int) -> Any:
        return self.numbers(kind, 1)[0].item()

    def text(self) -> str:
        (length,) = self._LENGTH.unpack_from(self._data, self.at)
        start = self.at + 8
        self.at = start + length
        self._require(0)
        return self._data[start : self.at].decode()

    def value(self, key: str) -> Any:
        """A number, true or false, text, an array of numbers (not copied) or a list of texts."""
        kind = self.number(4)
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(kind)
        kind, count = self.number(4), self.number(10)
        if kind != _STRING:
            return self.numbers(kind, count)
        self._strings_left -= count
        if self._strings_left < 0:
            raise ValueError(f"{key[:80]} says that it has {count} texts")
        self._require(count * 8)
        return [self.text() for _ in range(count)]

    def _require(self, count: int) -> None:
        if count > len(self._data) - self.at:
            raise ValueError("it ends within its header, or says that it has more than it has")
