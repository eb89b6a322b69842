"""A stage that plays: its events tell what the engine did."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import stages
from common import Engine, SamplingParams
from common.arena.player import Player, prepare_command
from common.arena.presets import Ask
from common.arena.run import Run
from common.config import EngineConfig
from common.errors import UserError
from common.kv_cache import PrefixCache
from tests.arena.watching import TWO, Viewer
from tests.integrity import check_integrity
from tests.test_cli import byte_tokenizer


def played(engine: Engine, asks: tuple[Ask, ...], stop: threading.Event | None = None) -> Viewer:
    viewer = Viewer()
    run = Run(engine, asks, "race1", viewer, stop or threading.Event())
    run.prepared(1)
    run.play()
    return viewer


@pytest.mark.parametrize("stage", stages.names())
def test_events_add_up_to_what_the_engine_generates(stage: str, build: Callable[..., Engine]) -> None:
    engine = build(stage, max_num_seqs=4, max_model_len=128)
    engine.tokenizer = byte_tokenizer()
    viewer = played(engine, TWO.asks)
    expected = engine.generate(
        [ask.messages() for ask in TWO.asks], [SamplingParams(max_tokens=ask.max_tokens) for ask in TWO.asks]
    )
    assert viewer.texts == [output.text for output in expected]
    assert viewer.tokens == [len(output.token_ids) for output in expected]
    assert viewer.reasons == [output.finish_reason for output in expected]
    assert viewer.names[:3] == ["prepared", "started", "arrived"]
    assert viewer.names[-1] == "ended"
    times = [step["t"] for step in viewer.steps]
    assert times == sorted(times)
    assert all(step["begin"] <= step["t"] <= viewer.end["t"] for step in viewer.steps)
    assert viewer.end["figures"]["done"] == viewer.end["figures"]["total"] == 2
    assert viewer.end["figures"]["tokens"] == sum(viewer.tokens)
    assert engine.trace is None


def test_a_prompt_that_follows_tokens_comes_when_they_are_there(build: Callable[..., Engine]) -> None:
    viewer = played(build("m3", max_num_seqs=4, max_model_len=128), TWO.asks)
    second = viewer.names.index("arrived", 3)
    assert viewer.names[:second].count("step") == 3


@pytest.mark.parametrize("stage", ["m1", "m3"])
def test_samples_are_answers_of_their_own_and_share_blocks_from_m3_on(stage: str, build: Callable[..., Engine]) -> None:
    engine = build(stage, max_num_seqs=4, max_model_len=128)
    viewer = played(engine, (Ask("three of them", "a prompt of more than sixteen tokens", 6, n=3),))
    assert viewer.tokens == [6, 6, 6]
    assert len(set(viewer.texts)) > 1
    assert (viewer.shared > 0) == (stage == "m3")
    assert not viewer.regions


def test_what_m6_keeps_for_later_is_not_seen(build: Callable[..., Engine]) -> None:
    """Blocks of an answer that has ended, until others need them; of this race alone."""
    engine = build("m6", max_num_seqs=4, max_model_len=128)
    played(engine, (Ask("before", "a prompt of some other race, also of more than sixteen tokens", 6),))
    cache = engine.scheduler.cache
    assert isinstance(cache, PrefixCache)
    viewer = played(engine, (Ask("one", "a prompt of more than sixteen tokens, as it happens", 6),))
    assert viewer.regions, "nothing is kept"
    assert all(not owners and length == stored for length, stored, owners in viewer.regions.values())
    assert sorted(viewer.regions) == sorted(region.start for region in cache.kept_regions())


def test_stop_ends_the_run_and_gives_everything_back(build: Callable[..., Engine]) -> None:
    engine, stop = build("m3", max_num_seqs=4, max_model_len=128), threading.Event()
    viewer = Viewer()

    def tell(event: dict[str, Any]) -> None:
        viewer(event)
        if viewer.names.count("step") == 2:
            stop.set()

    run = Run(engine, TWO.asks, "race1", tell, stop)
    run.prepared(1)
    run.play()
    assert viewer.end["stopped"]
    assert viewer.names.count("step") == 2
    assert not viewer.regions
    assert not engine.has_unfinished
    check_integrity(engine.scheduler.cache)


def test_an_engine_serves_two_races_of_the_same_limits_and_a_new_one_others() -> None:
    built: list[Engine] = []

    def build(config: EngineConfig) -> Engine:
        built.append(stages.build("m3", model=config.model, max_num_seqs=config.max_num_seqs, device="cpu"))
        return built[-1]

    told: list[dict[str, Any]] = []
    player = Player(build, 3, EngineConfig("random:tiny-llama", device="cpu"), told.append)
    limits = {"kv_tokens": 512, "max_num_seqs": 4, "max_model_len": 128}
    for most in (4, 4, 2):
        command = prepare_command(TWO.asks, limits | {"max_num_seqs": most}, 1)
        player.prepare(command)
        player.play()
    assert len(built) == 2
    assert [event["event"] for event in told].count("ended") == 3
    built[-1].close()


def test_a_prompt_that_is_too_long_is_refused_before_the_race_and_the_next_one_runs() -> None:
    """124 + 4 tokens fit and could be warmed up with; 124 + 5 do not."""
    told: list[dict[str, Any]] = []
    player = Player(
        lambda config: stages.build("m3", model=config.model, max_model_len=128, device="cpu"),
        3, EngineConfig("random:tiny-llama", device="cpu"), told.append,
    )  # fmt: skip
    limits = {"kv_tokens": 512, "max_num_seqs": 4, "max_model_len": 128}
    fits, too_long = Ask("short", "short", 5), Ask("long", "x" * 124, 5)
    with pytest.raises(UserError, match="the prompt has 124 tokens"):
        player.prepare(prepare_command((fits, too_long), limits, 1))
    assert {event["event"] for event in told} == {"loading"}
    player.prepare(prepare_command((fits,), limits, 1))
    warming = [(event["done"], event["total"]) for event in told if event.get("text") == "warming up"]
    assert warming[0] == (0, 4), "the bar is there before the first token"
    player.play()
    assert told[-1]["figures"]["done"] == told[-1]["figures"]["total"] == 1
    player.drop()


def test_a_run_that_fails_leaves_nothing_in_the_engine(build: Callable[..., Engine]) -> None:
    engine = build("m3", max_num_seqs=4, max_model_len=128)

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Run(engine, TWO.asks, "race1", tell, threading.Event()).play()
    assert not engine.has_unfinished
    assert engine.trace is None
    check_integrity(engine.scheduler.cache)
    assert played(engine, TWO.asks).end["figures"]["done"] == 2


def test_no_two_races_have_a_salt_in_common(build: Callable[..., Engine]) -> None:
    engine = build("m3", max_num_seqs=4, max_model_len=128)
    salts: list[str] = []
    add = engine.add_request

    def salted(*given: Any, cache_salt: str, **options: Any) -> str:
        salts.append(cache_salt)
        return add(*given, **options)

    engine.add_request = salted
    asks = (replace(TWO.asks[0], max_tokens=2),)
    for name in ("race1", "race2"):
        Run(engine, asks, name, lambda event: None, threading.Event()).play()
    assert salts == ["race1", "race2"]
