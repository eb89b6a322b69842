"""The presets of a race: each has prompts that show one claim, and is short enough for an audience."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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


def _asks(max_tokens: Sequence[int], questions: Iterable[tuple[str, str]]) -> tuple[Ask, ...]:
    return tuple(Ask(*question, most) for question, most in zip(questions, max_tokens, strict=True))


QUESTIONS = {  # what a viewer sees, short enough for a column, and the prompt
    "A short story": "Tell a short story about a lighthouse.",
    "A colour": "Name a colour.",
    "Capital city": "What is the capital of France?",
    "Three fruits": "Name three fruits.",
    "How rain forms": "Explain how rain forms.",
    "2 + 2": "What is 2 + 2?",
    "A planet": "Name a planet.",
    "A greeting": "Say hello in French.",
    "A walk": "Describe a walk in the woods.",
    "An animal": "Name an animal.",
    "A weekday": "Which day follows Monday?",
    "A rhyme": "Give a word that rhymes with cat.",
}
STORY, RAIN, WALK = (list(QUESTIONS.items())[number] for number in (0, 4, 8))
_SENTENCE = "Visitor {number} wrote that the museum's {room} room was {word}, and that the light was good. "
_ROOMS, _WORDS = ("blue", "old", "glass", "map", "stone"), ("quiet", "crowded", "splendid", "too warm")
LONG_TEXT = "".join(
    _SENTENCE.format(number=n, room=_ROOMS[n % len(_ROOMS)], word=_WORDS[n % len(_WORDS)]) for n in range(1, 51)
)
RULES = "You are the guide of a small museum. Answer in one short sentence. These are the house rules. " + "".join(
    f"Rule {n}: in the {_ROOMS[n % len(_ROOMS)]} room, guests may {verb}, but never before {8 + n % 5} in the morning. "
    for n, verb in enumerate(
        ("sit down", "take pictures", "speak softly", "draw", "drink water", "ask questions") * 4, 1
    )
)
VISITORS = {
    **{"Drawing": "May I draw in the glass room?", "Sitting": "When may I sit down?", "Water": "Is there water?"},
    **{"Pictures": "May I take pictures?", "Speaking": "How loud may I speak?"},
    "Questions": "Where may I ask questions?",
}

# Of each: its key and title; the claim; the figure that shows it, the prompts, and the limits.
PRESETS = (
    Preset("many", "Many short requests",
           "Twelve questions, room for four: a static batch waits for its longest answer; from m2 on a finished answer "
           "makes room at once.",
           "speed", _asks((200, 8, 12, 16, 120, 12, 8, 8, 160, 8, 8, 8), QUESTIONS.items()),
           {"kv_tokens": 4 * 256, "max_num_seqs": 4, "max_model_len": 256}),
    Preset("long", "A long prompt arrives",
           "Three answers stream when a prompt of over a thousand tokens comes: before m5 they all wait until it is "
           "read; m5 reads it in pieces.",
           "gap", (*_asks((110, 110, 110), (STORY, RAIN, WALK)),
                   Ask("A long text to sum up", f"Sum up in one sentence: {LONG_TEXT}", 24, after_tokens=24)),
           {"kv_tokens": 4 * 1152, "max_num_seqs": 4, "max_model_len": 1152, "prefill_chunk_size": 128}),
    Preset("shared", "A shared system prompt",
           "Six questions, one after the other, all under the same long instructions: m6 has them in its cache.",
           "ttft", tuple(Ask(*q, 20, system=RULES, after=1.2 * number) for number, q in enumerate(VISITORS.items())),
           {"kv_tokens": 6 * 704, "max_num_seqs": 6, "max_model_len": 704}),
    Preset("memory", "Memory pressure",
           "Ten answers, memory for 768 tokens: whole rows of 256 hold three; blocks of 16 (from m3 on) go to the "
           "answers that need one; if none is free, one answer is preempted.",
           "together",
           _asks((120,) * 10, [(title, f"{q} Take your time.") for title, q in list(QUESTIONS.items())[:10]]),
           {"kv_tokens": 768, "max_num_seqs": 10, "max_model_len": 256}),
    Preset("samples", "Six samples of one prompt",
           "Six answers to the same question: from m3 on they share the blocks of the prompt and copy one only when "
           "they write into it.",
           "memory", (Ask(STORY[0], f"{RULES[:1100]} {STORY[1]}", 96, n=6),),
           {"kv_tokens": 6 * 512, "max_num_seqs": 6, "max_model_len": 512}),
    Preset("weights", "int4 against bf16",
           "One answer: every step reads all weights. m7's linear layers are in 4 bits, so it reads fewer bytes.",
           "speed", _asks((160,), (STORY,)), {"kv_tokens": 512, "max_num_seqs": 1, "max_model_len": 512}, needs=7),
)  # fmt: skip
OWN = Preset("own", "Your own prompts", "One prompt a line; each answer has up to 96 tokens.", "speed", (),
             {"kv_tokens": 4 * 2048, "max_num_seqs": 8, "max_model_len": 2048})  # fmt: skip


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
