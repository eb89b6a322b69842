"""The scenario behind the tree of `make stage6 trace`: prompts with common beginnings, and what the cache kept."""

from collections.abc import Mapping
from typing import Any

import stages
from benchmarks.recipes import BLOCK, Draw
from common import Engine, SamplingParams
from common.kv_cache import PrefixCache
from common.watch.kv_memory import PrefixNode

SYSTEM, EXAMPLES, QUESTION, ANSWER = 96, (64, 48), (10, 30), 12
"""Tokens of the system prompt, of the few-shot examples of two tasks, of a question, and of an answer."""
QUESTIONS, FOLLOW_UPS = (5, 3), 2  # questions on each task, and further ones in the chat of the first


def record_prefixes(
    stage: str, model: str, device: str, dtype: str, options: Mapping[str, Any] | None = None
) -> tuple[list[PrefixNode], float]:
    """Run the scenario; returns what is cached at its end, and the hit rate."""
    own = {"max_num_seqs": 4, "max_model_len": 512, "block_size": BLOCK, "prefix_index": "radix", **(options or {})}
    with stages.build(stage, model=model, device=device, dtype=dtype, **own) as engine:
        draw = Draw(engine.runner.model.config.vocab_size)
        system = draw.tokens(SYSTEM)
        for length, questions in zip(EXAMPLES, QUESTIONS, strict=True):
            task = system + draw.tokens(length)
            chat = _ask(engine, task + draw.tokens(draw.length(QUESTION)))
            for _ in range(FOLLOW_UPS):
                chat = _ask(engine, chat + draw.tokens(draw.length(QUESTION)))
            for _ in range(questions - 1):
                _ask(engine, task + draw.tokens(draw.length(QUESTION)))
        cache = engine.scheduler.cache
        assert isinstance(cache, PrefixCache)
        return cache.prefix_tree(), cache.prefix_stats().hit_rate or 0.0


def _ask(engine: Engine, prompt: list[int]) -> list[int]:
    """Prompt and answer together."""
    [output] = engine.generate([prompt], SamplingParams(max_tokens=ANSWER, ignore_eos=True))
    return prompt + output.token_ids
