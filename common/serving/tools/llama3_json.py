"""Llama 3.1 and later: the answer is `{"name": ..., "parameters": {...}}`, or several of them with `;` between."""

import re

from common.serving.tools.parser import ToolParser

TAG = "<|python_tag|>"  # optional, and in most tokenizers a special token, which is no text


class Llama3Json(ToolParser):
    key, between = "parameters", "; "

    def _find(self, held: str, end: bool) -> tuple[int, int | None]:
        if self.plain:
            return len(held), None
        between = re.match(rf"\s*{';?' if self.calls else ''}\s*({re.escape(TAG)})?\s*", held)
        rest = held[between.end() :] if between else held
        if rest.startswith("{"):
            return 0, len(held) - len(rest)
        return (0 if TAG.startswith(rest) and not end else len(held)), None

    def _end(self, held: str, stop: int | None, wrong: int, end: bool) -> int | None:
        return stop if stop is not None or not end else len(held)
