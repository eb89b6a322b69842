"""Compiling structures with llguidance. Run as a program, it tries one under hard limits: most of what a compiler does
has no limit of its own, and a thread cannot be stopped."""

from __future__ import annotations

import functools
import importlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 20_000, "max_items_in_row": 20_000,
    "max_lexer_states": 50_000, "max_grammar_size": 100_000, "precompute_large_lexemes": False, "verbose_errors": False,
}  # fmt: skip
"""Of llguidance, for each mask and for the size of what is compiled."""
SECONDS, BYTES = 1.0, 400 << 20  # of the trial: time of a processor, and address space
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,8}"  # between JSON's parts: without a bound a small model writes nothing else


def compile_matcher(vocabulary: Any, kind: str, text: str) -> Any:
    """A matcher of `kind` (`schema`, `regex` or `grammar`) at its beginning. Raises `Exception` of many types.

    Not forcing: text without a choice would come in the tokenizer's own tokens, and a text that spells a control token
    as that token, which is no text."""
    llguidance: Any = importlib.import_module("llguidance")
    new = llguidance.LLMatcher
    read: dict[str, Any] = {
        "schema": functools.partial(new.grammar_from_json_schema, overrides={"whitespace_pattern": WHITESPACE}),
        "regex": new.grammar_from_regex,
        "grammar": lambda text: new.grammar_from_lark(
            importlib.import_module("llguidance.gbnf_to_lark").any_to_lark(text)
        ),
    }
    source: str = read[kind](text)
    if not text.lstrip().startswith("%llguidance"):
        made: Any = json.loads(source)["grammars"][0] if kind != "grammar" else {"lark_grammar": source}
        lark = made.get("lark_grammar") or f"start: %json {json.dumps(made['json_schema'])}"
        source = f'%llguidance {{"no_forcing": true}}\n{lark}'
    matcher = new(vocabulary, source, limits=llguidance.LLParserLimits(**LIMITS), log_level=0)
    first = matcher.deep_copy()
    first.compute_bitmask()  # some structures turn out to be impossible only here
    if first.is_error():
        raise ValueError(first.get_error().removesuffix("<non-verbose/>"))
    return matcher


def trial(kind: str, text: str) -> int:
    """Compile it in a process of its own; returns how many bytes it holds. Raises `ValueError`."""
    answer = _tried(kind, text)
    if isinstance(answer, str):
        answer = re.sub(r"\n\s+\d+ \|.*", "", answer, flags=re.DOTALL)  # without the lines around the place
        raise ValueError(answer.replace("NoExtensionBias", "a rule that refers to nothing but itself"))
    return answer


@functools.lru_cache(256)
def _tried(kind: str, text: str) -> int | str:
    """Bytes, or what is wrong: a refused one is not tried again."""
    given = json.dumps([sys.path, kind, text]).encode()
    hard = "it takes too long or too much memory to follow: make it smaller"
    try:
        ended = subprocess.run([sys.executable, __file__], input=given, capture_output=True, timeout=20 * SECONDS)
    except subprocess.TimeoutExpired:  # a busy machine's fault perhaps: the next one may try again
        raise ValueError(hard) from None
    if not ended.stdout and ended.returncode not in (-27, -6):  # SIGPROF and SIGABRT: the limits
        raise ValueError(hard)
    return json.loads(ended.stdout or json.dumps(hard))


def _limit() -> None:
    """Hold this process to the limits, where the system has them; elsewhere only the parent's clock does."""
    try:
        resource: Any = importlib.import_module("resource")
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
