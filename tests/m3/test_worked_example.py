"""The interview question: two requests, 512 and 128 tokens, where a slot would hold 2,048. With real requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from common import Engine
from common.models.sources.random_weights import PRESETS
from common.watch.kv_memory import KVUsage
from tests.engine_checks import PAGED, TOKEN_BYTES, exactly, prompts_of

Build = Callable[..., Engine]


@pytest.fixture(autouse=True)
def long_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny-llama-long", replace(PRESETS["tiny-llama"], max_position_embeddings=2048))


def usages(engine: Engine, steps: int) -> list[KVUsage]:
    for prompt in prompts_of([512, 128]):
        engine.add_request(prompt, exactly(100))
    found: list[KVUsage] = []
    for _ in range(steps):
        engine.step()
        found.append(engine.scheduler.cache.usage())
    return found


def test_slots_are_15_6_percent_used(build: Build) -> None:
    usage = usages(build("m2", model="random:tiny-llama-long", max_num_seqs=2), 1)[0]
    assert (usage.stored, usage.reserved) == (640, 4096)
    assert f"{usage.stored / usage.reserved:.1%}" == "15.6%"


@pytest.mark.parametrize("stage", PAGED)
def test_blocks_are_100_percent_used(build: Build, stage: str) -> None:
    """32 and 8 blocks of 16. A step later each has begun a new one: less than a block each is ever unused."""
    first, second, *others = usages(build(stage, model="random:tiny-llama-long", max_num_seqs=2, block_size=16), 40)
    assert (first.stored, first.reserved) == (640, 640)
    assert (second.stored, second.reserved) == (642, 640 + 2 * 16)
    assert all(0 <= usage.reserved - usage.stored < 2 * 16 for usage in others)
    assert (others[14].stored, others[14].reserved) == (672, 672)


def test_the_same_budget_runs_two_or_dozens(build: Build) -> None:
    """4,096 token slots, requests of 128 tokens: two of m2's slots, or 256 blocks, 8 for each and one to grow into."""
    running: dict[str, int] = {}
    for stage in ("m2", *PAGED):
        options = {"kv_cache_memory": 4096 * TOKEN_BYTES, "max_num_seqs": 64, "max_num_batched_tokens": 4096}
        engine = build(stage, model="random:tiny-llama-long", **options)
        for prompt in prompts_of([128] * 40):
            engine.add_request(prompt, exactly(2))
        engine.step()
        engine.step()
        running[stage] = engine.metrics()["peak_running"]  # type: ignore[assignment]
    assert running == {"m2": 2} | dict.fromkeys(PAGED, 28)
