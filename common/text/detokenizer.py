"""Token ids to text, a token at a time, in whole characters."""

from collections.abc import Sequence

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """Text of one request's output, decoded only as far as it is read.

    A byte-level token may hold part of a UTF-8 character: such a token adds no text until the character is whole.
    For the same `count`, `text` always returns the same. A stop string is cut off, and while one might still be
    completed, its possible beginning is held back. One that is complete before token `min_tokens` does not count.
    """

    def __init__(
        self, tokenizer: FastTokenizer, num_prompt_tokens: int, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._num_prompt_tokens = num_prompt_tokens
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._stream = DecodeStream(skip_special_tokens=True)
        self._text = ""
        self._ends: list[int] = []  # length of the text after each output token
        self._stop_at: int | None = None  # where in the text the stop string begins
        self._stop_count = 0  # the output token that completed it

    def finds_stop(self, token_ids: Sequence[int]) -> bool:
        """Does the output contain a stop string? Decodes what is new in `token_ids` (prompt and output)."""
        self._catch_up(token_ids)
        return self._stop_at is not None

    def text(self, token_ids: Sequence[int], count: int, finished: bool) -> str:
        """Text of the first `count` output tokens; `finished`: no more will come, so nothing is held back."""
        self._catch_up(token_ids)
        if count == 0:
            return ""
        if self._stop_at is not None and count >= self._stop_count:
            return self._text[: self._stop_at]
        text = self._text[: self._ends[count - 1]]
        if not finished:
            return text[: len(text) - self._possible_stop(text)]
        if count == len(self._ends):  # half a character at the very end becomes a replacement character, as in decode
            output = list(token_ids[self._num_prompt_tokens :][:count])
            whole = self._tokenizer.decode(output, skip_special_tokens=True)
            if whole.startswith(text):
                return whole
        return text

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids[self._num_prompt_tokens + len(self._ends) :]:
            before = len(self._text)
            self._text += self._stream.step(self._tokenizer, token_id) or ""
            self._ends.append(len(self._text))
            if self._stop_at is None and len(self._ends) >= self._min_tokens:
                self._find_stop(before)

    def _find_stop(self, before: int) -> None:
        """Look for the earliest stop string that ends in the text added after `before`."""
        for stop in self._stop:
            at = self._text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0 and (self._stop_at is None or at < self._stop_at):
                self._stop_at, self._stop_count = at, len(self._ends)

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        lengths = (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        return max(lengths, default=0)
