"""Hermes, Qwen and many others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, anywhere in the answer."""

from common.serving.tools.parser import ToolParser

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes(ToolParser):
    before, after, between = f"{OPEN}\n", f"\n{CLOSE}", "\n"

    def _find(self, held: str, end: bool) -> tuple[int, int | None]:
        at = held.find(OPEN)
        if at >= 0:
            return at, at + len(OPEN)
        begun = next((n for n in range(len(OPEN) - 1, 0, -1) if held.endswith(OPEN[:n])), 0)
        return len(held) if end else len(held) - begun, None

    def _end(self, held: str, stop: int | None, wrong: int, end: bool) -> int | None:
        if stop is None:
            at = held.find(CLOSE, wrong)
            return at + len(CLOSE) if at >= 0 else len(held) if end else None
        rest = held[stop:].lstrip()
        if rest.startswith(CLOSE):
            return len(held) - len(rest) + len(CLOSE)
        if CLOSE.startswith(rest):
            return len(held) if end else None  # cut off
        return stop  # some models forget it
