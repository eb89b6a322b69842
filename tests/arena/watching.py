"""What a viewer knows after some events: the tests hold it against the engine."""

from __future__ import annotations

from typing import Any

from common.arena.presets import Ask, Preset

TWO = Preset(
    "two", "Two", "Two prompts.", "speed",
    (Ask("one", "The first prompt, of some length", 12), Ask("two", "Another", 5, after_tokens=3)),
    {"kv_tokens": 512, "max_num_seqs": 4, "max_model_len": 128},
)  # fmt: skip


class Viewer:
    """Adds up the events of one side."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.reasons: list[str | None] = []
        self.regions: dict[int, list[Any]] = {}
        self.shared = 0
        self.steps: list[dict[str, Any]] = []
        self.end: dict[str, Any] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        self.names.append(event["event"])
        if event["event"] == "prepared":
            count = len(event["answers"])
            self.texts, self.tokens, self.reasons = [""] * count, [0] * count, [None] * count
        for answer, text, tokens, reason in event.get("gained", ()):
            assert self.reasons[answer] is None, "an answer goes on after its end"
            self.texts[answer] += text
            self.tokens[answer] += tokens
            self.reasons[answer] = reason
        for start in event.get("kv", {}).get("free", ()):
            del self.regions[start]
        for start, *what in event.get("kv", {}).get("set", ()):
            self.regions[start] = what
        self.shared = max(self.shared, sum(len(owners) > 1 for _, _, owners in self.regions.values()))
        if event["event"] == "step":
            self.steps.append(event)
            held = sum(length for length, _, owners in self.regions.values() if owners)
            assert held == event["reserved"], "the map and the cache's own count differ"
        if event["event"] == "ended":
            self.end = event


def contrast(front: str, back: str) -> float:
    """Ratio of the luminances of two CSS colours, by WCAG 2.2's formula."""

    def luminance(colour: str) -> float:
        parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(front), luminance(back)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)
