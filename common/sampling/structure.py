"""Structured output: which tokens may come next, so that the whole answer fits a JSON schema, a regular expression or a
grammar. By the library llguidance, which is imported when the first such request comes."""

from __future__ import annotations

import functools
import importlib
import json
import re
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from common.errors import UserError, one_line
from common.sampling.grammar import compile_matcher, trial
from common.sampling.json_schema import Names, ambiguous, documents, prepared
from common.sampling_params import SamplingParams
from common.text.tokenizer import Tokenizer

KEPT_BYTES, LEAST = 256 << 20, 1 << 20  # of compiled structures that no request holds; each counts as a MB at least

_pool = ThreadPoolExecutor(2, "structure")


class Escapes:
    """A vocabulary's tokens with a backslash, as masks: left out in a name; and left out elsewhere, as they begin one.
    texts: of all tokens."""

    def __init__(self, texts: list[str]) -> None:
        self.texts, words = texts, -(-len(texts) // 32)
        self.in_names = _bits([token for token, text in enumerate(texts) if "\\" in text], words)
        self.elsewhere = _bits([token for token, text in enumerate(texts) if re.search(r'".*\\', text)], words)


class Compiled:
    """What one text allows: a matcher at its beginning, of which each answer has a copy.

    size: bytes, at most. escapes: where an object's names must come without them.
    """

    def __init__(self, matcher: Any, size: int, escapes: Escapes | None = None) -> None:
        self.matcher, self.size, self.escapes = matcher, max(size, LEAST), escapes


class Structures:
    """What one engine's requests ask for, compiled; safe to use from several threads.

    vocab_size: the model's, of its logits. ends: all tokens that may end an answer.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, ends: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._ends = sorted(token for token in set(ends) if token < vocab_size)
        self._held = WeakValueDictionary[tuple[str, str], Compiled]()  # by anybody
        self._recent: dict[tuple[str, str], Compiled] = {}  # the last ones, the oldest first
        self._lock = threading.Lock()

    def compiled(self, params: SamplingParams, known: bool = False) -> Compiled | None:
        """What these ask for, if anything; `known`: only if it is held already. Raises `UserError` for what no answer
        could fit, or takes too long to follow."""
        asked = params.structure
        with self._lock:
            found = None if asked is None else self._held.get(asked)
        if asked is None or known:
            return found
        found = found or self._compile(*asked)
        with self._lock:
            self._held[asked] = found
            self._recent.pop(asked, None)
            self._recent[asked] = found
            while sum(one.size for one in self._recent.values()) > KEPT_BYTES:
                del self._recent[next(iter(self._recent))]
        return found

    def begin(self, params: SamplingParams, ends: Iterable[int]) -> Structure | None:
        """For one request, whose answer ends at these tokens; None if it asks for no structure."""
        compiled = self.compiled(params)
        if compiled is None:
            return None
        return Structure(compiled, self._vocab_size, self._ends, ends, params)

    @functools.cached_property
    def _escapes(self) -> Escapes:
        """Texts are right as far as JSON's own characters go."""
        names = [""] * self._vocab_size
        for name, token in self._tokenizer.backend.get_vocab(with_added_tokens=True).items() if self._tokenizer else ():
            if token < self._vocab_size:
                names[token] = chr(int(name[3:5], 16)) if re.fullmatch("<0x[0-9A-F]{2}>", name) else name
        return Escapes(names)

    @functools.cached_property
    def vocabulary(self) -> Any:
        if self._tokenizer is None:
            raise UserError("structured output needs a tokenizer, and this model has none")
        try:
            llguidance: Any = importlib.import_module("llguidance")
        except ImportError:
            message = "structured output needs llguidance, which is not installed: pip install '.[structured]'"
            raise UserError(message) from None
        try:
            text = self._tokenizer.backend.to_str()
            return llguidance.LLTokenizer(text, n_vocab=self._vocab_size, eos_token=self._ends or None)
        except Exception as error:  # whatever the library says of a kind of tokenizer that it cannot read
            raise UserError(f"no structured output with this model's tokenizer: {one_line(error)}") from None

    def _compile(self, kind: str, text: str) -> Compiled:
        vocabulary = self.vocabulary
        try:
            text = prepared(text) if kind == "schema" else text
            size = trial(kind, text)
            found = [json.loads(text)] if kind == "schema" else documents(text) if kind == "grammar" else ()
            return Compiled(
                compile_matcher(vocabulary, kind, text), size, self._escapes if any(map(ambiguous, found)) else None
            )
        except Exception as error:  # the library's reader of GBNF raises `Exception` itself
            raise UserError(f"{kind}: {one_line(error)}") from None


class Structure:
    """How far one answer has come. Its tokens come one by one, and the mask of the next one is made on another thread
    meanwhile."""

    def __init__(
        self, compiled: Compiled, vocab_size: int, all_ends: Iterable[int], ends: Iterable[int], params: SamplingParams
    ) -> None:
        self._matcher, self._words = compiled.matcher.deep_copy(), -(-vocab_size // 32)
        self._escapes, self._names = compiled.escapes, Names()
        self._ends = frozenset(end for end in ends if end < vocab_size)
        self._all_ends = _bits({*all_ends, *self._ends}, self._words)
        self._chosen = self._ends & set(params.stop_token_ids) if params.ignore_eos else self._ends
        self._tokens_due = params.min_tokens
        self.complete = False  # nothing may follow
        self.failed: str | None = None  # why it cannot be followed any further
        self._next: Future[np.ndarray] = _pool.submit(self._make_mask)

    def mask(self) -> np.ndarray:
        """Which tokens may come next: a bit each, [ceil(vocab / 32)] int32. Waits until it is made."""
        return self._next.result()

    def advance(self, token_id: int) -> None:
        """Take the next token of the answer; `mask()` has been read."""
        self._tokens_due -= 1
        self._next.result()
        if token_id in self._ends:
            self.complete = True
            return
        if not self._matcher.consume_token(token_id) or self._matcher.is_error():
            self.failed = self._matcher.get_error() or "a token that does not fit"
            return
        if self._escapes is not None:
            self._names.feed(self._escapes.texts[token_id])
        self.complete = self._matcher.is_stopped()
        if not self.complete:
            self._next = _pool.submit(self._make_mask)

    def _make_mask(self) -> np.ndarray:
        """An end is allowed where the answer fits, from `min_tokens` on; and where nothing else is, in any case."""
        words = np.zeros(self._words, dtype=np.int32)
        self._matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if self._matcher.is_error():  # `advance` will say so; until then any token does
            return np.full_like(words, -1)
        fitting = words
        words = fitting & ~self._all_ends
        if not words.any() and not self._matcher.is_accepting():  # a stop token is all that fits: it cuts the answer
            words = fitting
        if self._escapes is not None:
            plain = words & ~(self._escapes.in_names if self._names.inside else self._escapes.elsewhere)
            words = plain if plain.any() else words
        if self._matcher.is_accepting():
            if not words.any():
                words |= _bits(self._ends, self._words)
            elif self._tokens_due <= 0:
                words |= _bits(self._chosen, self._words)
        return words


def _bits(tokens: Iterable[int], words: int) -> np.ndarray:
    """A mask of these."""
    result = np.zeros(32 * words, dtype=np.uint8)
    result[list(tokens)] = 1
    return np.packbits(result, bitorder="little").view(np.int32)


def allowed(words: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Masks [K, ceil(vocab / 32)] int32 as bool [K, vocab]."""
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    return bits.flatten(1)[:, :vocab_size] != 0
