"""Compiling structures with llguidance. Run as a program, it tries one under hard limits: most of what a compiler does
has no limit of its own, and a thread cannot be stopped."""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 20_000, "max_items_in_row": 2_000,
    "max_lexer_states": 50_000, "max_grammar_size": 100_000, "precompute_large_lexemes": False, "verbose_errors": False,
}  # fmt: skip
"""Of llguidance, for each mask and for the size of what is compiled."""
SECONDS, BYTES = 1.0, 400 << 20  # of the trial: time of a processor, and address space
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"  # between JSON's parts: without a bound a small model writes nothing else


def compile_matcher(vocabulary: Any, kind: str, text: str) -> Any:
    """A matcher of `kind` (`schema`, `regex` or `grammar`) at its beginning. Raises `Exception` of many types."""
    llguidance: Any = importlib.import_module("llguidance")
    new = llguidance.LLMatcher
    read: dict[str, Any] = {
        "schema": functools.partial(new.grammar_from_json_schema, overrides={"whitespace_pattern": WHITESPACE}),
        "regex": new.grammar_from_regex,
        "grammar": lambda text: new.grammar_from_lark(
            importlib.import_module("llguidance.gbnf_to_lark").any_to_lark(text)
        ),
    }
    matcher = new(vocabulary, read[kind](text), limits=llguidance.LLParserLimits(**LIMITS), log_level=0)
    first = matcher.deep_copy()
    first.compute_bitmask()  # some structures turn out to be impossible only here
    if first.is_error():
        raise ValueError(first.get_error().removesuffix("<non-verbose/>"))
    return matcher


@functools.lru_cache(64)
def trial(kind: str, text: str) -> int:
    """Compile it in a process of its own; returns how many bytes it holds. Raises `ValueError`."""
    given = json.dumps([sys.path, kind, text]).encode()
    try:
        ended = subprocess.run([sys.executable, __file__], input=given, capture_output=True, timeout=20 * SECONDS)
        answer = json.loads(ended.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise ValueError("it takes too long or too much memory to follow: make it smaller") from None
    if isinstance(answer, str):
        raise ValueError(answer.replace("NoExtensionBias", "a rule that refers to nothing but itself"))
    return answer


def _limit() -> None:
    """Hold this process to the limits, where the system has them; elsewhere only the parent's clock does."""
    try:
        resource, signal = importlib.import_module("resource"), importlib.import_module("signal")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (ImportError, AttributeError, ValueError, OSError):
        pass


def _resident() -> int:
    """Memory of this process, in bytes; 0 where that is not known."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except (OSError, ValueError, IndexError):
        return 0


def _main() -> None:
    sys.path[:], kind, text = json.load(sys.stdin)
    vocabulary = importlib.import_module("llguidance").LLTokenizer("byte")
    _limit()
    before = _resident()
    try:
        matcher, answer = compile_matcher(vocabulary, kind, text), _resident() - before
        del matcher
    except Exception as error:
        answer = str(error) or repr(error)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
