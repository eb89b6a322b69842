"""The one exception that means "the caller can fix this", and the checks that raise it."""

import dataclasses
import difflib
import functools
import math
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from types import UnionType
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command line prints it without a traceback and exits with status 2; the server answers 400.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """Line ends, control characters and the like, which foreign names and files may hold, as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def unknown(kind: str, name: object, allowed: Iterable[object]) -> UserError:
    """A `UserError` for a name that does not exist: it lists the valid names and suggests the closest."""
    names = [str(a) for a in allowed]
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UserError(f"unknown {kind} {str(name)!r}.{hint} Choose from: {', '.join(names)}")


def refuse_unknown_options(cls: T) -> T:
    """Class decorator for dataclasses: an unknown keyword raises a `UserError` that names the allowed ones. Numbers and
    arrays of NumPy and PyTorch become Python's."""
    allowed = [f.name for f in dataclasses.fields(cls) if f.init]
    original: Callable[..., None] = cls.__init__

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in allowed:
                raise unknown(f"{cls.__name__} option", name, allowed)
        original(self, *map(plain, args), **{name: plain(value) for name, value in options.items()})

    cls.__init__ = checked
    return cls


def require(condition: bool, message: str) -> None:
    """Raise `UserError(message)` unless the condition holds."""
    if not condition:
        raise UserError(message)


def plain(value: Any) -> Any:
    """A number or an array of NumPy or PyTorch as Python has it, all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextmanager
def refusing(name: str) -> Generator[None]:
    """Whatever a foreign file makes fail ends in one line."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{name} cannot be read: {one_line(error)}. Copy or download it again") from error
    except BaseException as error:
        kind = type(error).__name__
        if not isinstance(error, Exception) and kind != "PanicException":  # what a library in Rust raises
            raise
        if isinstance(error, MemoryError) or "OutOfMemory" in kind:
            raise UserError(f"{name} needs more memory than there is: take a smaller model or dtype") from error
        reason = f"{kind}: {one_line(error)[:200]}"
        raise UserError(f"{name} is truncated or damaged ({reason}): download or convert it again") from error


def require_number(
    name: str, value: Any, kind: type | UnionType, low: float, high: float = math.inf, above: bool = False
) -> None:
    """`UserError` unless the value is a finite number of that kind in low ... high, low itself left out if `above`."""
    number = isinstance(value, kind) and not isinstance(value, bool)
    most = high if kind is int else min(high, sys.float_info.max)
    valid = number and low <= value <= most and value != math.inf and not (above and value == low)
    limits = f"{'above' if above else 'of at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
    require(valid, f"{name} must be a {'whole number' if kind is int else 'number'} {limits}, not {repr(value)[:80]}")


def require_real(name: str, value: Any) -> None:
    """`UserError` unless a model can compute with it: a number above 0 that float32 has, in full precision."""
    require_number(name, value, int | float, 0, above=True)
    require(2.0**-126 <= value < 2.0**127, f"{name} {repr(value)[:80]} is too small or too large for float32")
