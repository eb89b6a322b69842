"""Single tokens as text, for lists of log-probabilities."""

from functools import lru_cache

from common.text.tokenizer import Tokenizer

KEPT = 1 << 14  # tokens: a few MB


class TokenTexts:
    """Those of one server, which remembers the tokens of late: the library takes longer than all else of an entry.

    Any thread may ask.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.read = lru_cache(KEPT)(self._read)

    def __getitem__(self, token_id: int) -> str:
        return self.read(token_id)[0]

    def _read(self, token_id: int) -> tuple[str, list[int]]:
        """A token's text, and its bytes. One that is only part of a character becomes a replacement character."""
        if self._tokenizer is None:
            text, own = f"{token_id} ", None
        else:
            decode = self._tokenizer.backend.decode
            alone = decode([token_id], skip_special_tokens=False)  # may lack the space before it
            text = decode([token_id, token_id], skip_special_tokens=False).removeprefix(alone)
            own = self._tokenizer.token_bytes(token_id)
        return text, list(text.encode() if own is None else own)
