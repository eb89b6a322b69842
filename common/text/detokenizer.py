"""Token ids to text, a token at a time, in whole characters."""

from bisect import bisect_left
from collections.abc import Sequence
from os.path import commonprefix

from tokenizers import Tokenizer as FastTokenizer

BROKEN = "\ufffd"  # what `decode` writes for the bytes of a part of a character


class Detokenizer:
    """Text of one request's output, decoded only as far as it is read.

    It is what the output adds to the prompt's text: a first token may begin with a space that it would lose alone, or
    end a character that the prompt began. A byte-level token may hold part of a UTF-8 character: such a token adds no
    text until the character is whole. For the same `count`, `read` always returns the same. A stop string is cut off,
    and while one might still be completed, its possible beginning is held back. One that is complete before token
    `min_tokens` does not count.
    """

    def __init__(
        self, tokenizer: FastTokenizer, num_prompt_tokens: int, stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._tokenizer, self._num_prompt_tokens = tokenizer, num_prompt_tokens
        self._stop, self._min_tokens = tuple(stop), min_tokens
        # The window begins with a whole character, and its settled tokens end with one. They have something visible,
        # unless there is nothing in front of them: so what is decoded behind them keeps its spaces, and is complete.
        self._window: list[int] | None = None
        self._num_settled = 0  # of these, the ones whose text is in `_text` or the prompt, and that text
        self._settled = ""
        self._shown = ""  # the prompt's text for the part of a character at its end
        self._text = ""
        self._ends: list[int] = []  # length of the text after each output token
        self._tails: dict[int, str] = {}  # by token count, where the text would end with part of a character
        self._stop_at: int | None = None  # where in the text the stop string begins
        self._stop_count = 0  # the output token that completed it

    def finds_stop(self, token_ids: Sequence[int]) -> bool:
        """Does the output contain a stop string? Decodes what is new in `token_ids` (prompt and output)."""
        self._catch_up(token_ids)
        return self._stop_at is not None

    def text(self, token_ids: Sequence[int], count: int, finished: bool) -> str:
        return self.read(token_ids, count, finished)[0]

    def read(self, token_ids: Sequence[int], count: int, finished: bool) -> tuple[str, int]:
        """Text of the first `count` output tokens, and how many of them it is of: up to the one where it ends.
        `finished`: no more will come, so nothing is held back."""
        self._catch_up(token_ids)
        if count == 0:
            return "", 0
        if self._stop_at is not None and count >= self._stop_count:
            text = self._text[: self._stop_at]
        else:
            text = self._text[: self._ends[count - 1]]
            if finished:
                return text + self._tails.get(count, ""), count
            text = text[: len(text) - self._possible_stop(text)]
        return text, bisect_left(self._ends, len(text)) + 1 if text else 0

    def offsets(self, token_ids: Sequence[int], count: int, most: int) -> list[int]:
        """Where the text of each of the first `count` output tokens begins, in characters; none behind `most`."""
        self._catch_up(token_ids)
        return [min(end, most) for end in [0, *self._ends][:count]]

    def _catch_up(self, token_ids: Sequence[int]) -> None:
        if self._window is None:
            self._window = self._end_of(token_ids)
            size = len(self._window)
            whole = (
                n for n in range(size, max(0, size - 8), -1) if not self._decode(self._window[:n]).endswith(BROKEN)
            )
            self._settle(next(whole, max(0, size - 8)))
            self._shown = self._unsettled(self._window)
        for token_id in token_ids[self._num_prompt_tokens + len(self._ends) :]:
            before = len(self._text)
            self._window.append(token_id)
            text = self._unsettled(self._window)
            new = text[len(commonprefix([text, self._shown])) :]  # noqa: RUF071
            if new and not new.endswith(BROKEN):
                self._text += new
                if new.strip():
                    self._window = self._window[self._num_settled :]
                self._settle(len(self._window))
                self._shown = ""
            self._ends.append(len(self._text))
            if new.endswith(BROKEN):
                self._tails[len(self._ends)] = new
            if self._stop_at is None and len(self._ends) >= self._min_tokens:
                self._find_stop(before)

    def _settle(self, count: int) -> None:
        self._num_settled, self._settled = count, self._decode((self._window or [])[:count])

    def _unsettled(self, window: list[int]) -> str:
        """Text behind the settled one. With byte fallback, a bad byte takes back the bytes in front of it: not here."""
        text = self._decode(window)
        new = text.removeprefix(self._settled)
        return new if text.startswith(self._settled) else self._decode(window[self._num_settled :])

    def _end_of(self, token_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt, from a whole character on; all, if it has none."""
        end, size = self._num_prompt_tokens, 4
        while size < end and not self._decode(token_ids[end - size : end]).strip(f"{BROKEN} "):
            size *= 4
        return list(token_ids[max(0, end - size) : end])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

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
