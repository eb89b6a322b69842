"""The presets of a race: each has prompts that show one claim, and is short enough for an audience."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import require, unknown

MOST_PROMPTS = 16
MOST_CHARACTERS = 8000  # of an audience's own prompts: what the page can show, and the context can hold


@dataclass(frozen=True)
class Ask:
    """One prompt of a race.

    title: what a viewer sees; the prompt itself may be long.
    n: number of samples, drawn at random; a single one is greedy.
    after: seconds after the start that it arrives.
    after_tokens: instead, when the first prompt's answer has this many tokens, so that every stage is decoding.
    """

    title: str
    prompt: str
    max_tokens: int
    system: str = ""
    n: int = 1
    after: float = 0.0
    after_tokens: int | None = None

    def messages(self) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Preset:
    """claim: one sentence; watch: the figure that shows it (a key of `figures.FIGURES`).

    limits: options of every engine; kv_tokens: room of the KV memory. needs: the first stage that shows it.
    """

    key: str
    title: str
    claim: str
    watch: str
    asks: tuple[Ask, ...]
    limits: dict[str, Any]
    needs: int = 0


def _read() -> Iterator[Preset]:
    with (Path(__file__).parent / "presets.toml").open("rb") as file:
        written = tomllib.load(file)
    for preset in written["preset"]:
        asks = preset.pop("asks")
        for ask in asks:  # long texts are written once, and quoted
            ask |= {part: ask[part].format(**written["texts"]) for part in ("prompt", "system") if part in ask}
        yield Preset(**preset, asks=tuple(Ask(**ask) for ask in asks))


*PRESETS, OWN = _read()


def presets_for(stages: Sequence[int]) -> list[Preset]:
    """The presets that show something with these stages."""
    return [preset for preset in PRESETS if any(stage >= preset.needs for stage in stages)]


def find(key: str, stages: Sequence[int], prompts: Sequence[str] = ()) -> Preset:
    """A preset by its key; `own` is made of `prompts`. `UserError` for an unknown key, or prompts over the limits."""
    if key == OWN.key:
        return own(prompts)
    known = {preset.key: preset for preset in PRESETS}
    if key not in known:
        raise unknown("preset", key, [*known, OWN.key])
    needs = known[key].needs
    require(max(stages) >= needs, f"{key} needs m{needs}: make stage{needs - 1} stage{needs} race PRESET={key}")
    return known[key]


def own(prompts: Sequence[str]) -> Preset:
    texts = [text.strip() for text in prompts if text.strip()]
    require(bool(texts), "no prompt: write one a line, or give --prompt in a terminal, once for each")
    require(len(texts) <= MOST_PROMPTS, f"{len(texts)} prompts: {MOST_PROMPTS} is the most that a race takes")
    longest = max(map(len, texts))
    require(longest <= MOST_CHARACTERS, f"a prompt is over {MOST_CHARACTERS:,} characters: shorten it")
    return replace(OWN, asks=tuple(Ask(text[:60], text, 96) for text in texts))
