"""Who shares a step, and where K and V lie, changes no token: greedy output equals m0's, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest

import stages
from common import Engine, SamplingParams
from common.config import DEFAULT_MODEL
from common.models import load as module
from common.models.load import open_source, read_decoder
from tests.conftest import TINY
from tests.engine_checks import CONTINUOUS, PAGED, TOKEN_BYTES, exactly, prompts_of, serve, tokens
from tests.helpers import every_pair, rounded

Build = Callable[..., Engine]
PROMPTS = (7, 1, 30, 2, 5, 16, 1, 40, 3, 11)
OUTPUTS = (9, 20, 3, 1, 12, 16, 2, 8, 15, 5)
GROWING = (4, 1, 9, 7, 3, 8, 2, 12), (25, 30, 20, 22, 29, 24, 31, 33)
"""Prompts that fit together and outputs that do not."""
SMALL = {"block_size": 4, "kv_cache_memory": 48 * TOKEN_BYTES}
"""48 slots, little more than the longest request needs."""


@cache
def by_m0(model: str, prompts: Sequence[int], outputs: Sequence[int], quantized: bool = False) -> list[list[int]]:
    """quantized: on the weights that m7 rounds random ones to, dequantised."""
    with stages.build("m0", model=model, device="cpu", max_num_seqs=16) as engine:
        if quantized:
            engine.runner.model = rounded(model)
        return tokens(engine.generate(prompts_of(prompts), [exactly(n) for n in outputs]))


def same_as_m0(engine: Engine, prompts: Sequence[int] = PROMPTS, outputs: Sequence[int] = OUTPUTS) -> bool:
    served = serve(engine, prompts_of(prompts), [exactly(n) for n in outputs])
    return tokens(served) == by_m0(engine.config.model, tuple(prompts), tuple(outputs), engine.stage == "m7")


def test_every_engine_answers_as_m0_does_on_the_embedded_model(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other on the same decoder, which takes a second to load."""
    for load in (open_source, read_decoder):
        monkeypatch.setattr(module, load.__name__, cache(load))
    prompts = ["Once upon a time, in a land far away, there was", "The capital of France is", "1 2 3"]
    texts: dict[str, list[str]] = {}
    unquantised = [stage for stage in CONTINUOUS if stage != "m7"]  # tests/m7/test_m7.py has the same for m7
    for stage in ("m0", "m1", *unquantised):
        options = {"block_size": 2, "kv_cache_memory": 11 * 92160} if stage in PAGED else {}  # room for 22 tokens
        with build(stage, model=DEFAULT_MODEL, max_model_len=64, max_num_seqs=3, **options) as engine:
            texts[stage] = [o.text for o in engine.generate(prompts, SamplingParams(max_tokens=5))]
            assert stage not in PAGED or engine.metrics()["preemptions"]
    assert "Paris" in texts["m0"][1]
    assert all(text == texts["m0"] for text in texts.values())


@pytest.mark.parametrize(("stage", "model", "max_num_seqs"), every_pair(CONTINUOUS, TINY, (1, 3, 16)))
def test_tokens_do_not_depend_on_the_requests_that_share_the_step(
    build: Build, stage: str, model: str, max_num_seqs: int
) -> None:
    assert same_as_m0(build(stage, model=model, max_num_seqs=max_num_seqs, max_num_batched_tokens=32))


@pytest.mark.parametrize(("stage", "model", "swap_space"), every_pair(PAGED, TINY, (0, 10**6)))
def test_preemption_changes_no_token(build: Build, stage: str, model: str, swap_space: int) -> None:
    engine = build(stage, model=model, swap_space=swap_space, **SMALL)
    assert same_as_m0(engine, *GROWING)
    metrics = engine.metrics()
    assert isinstance(metrics["preemptions"], int) and metrics["preemptions"] > 3
    assert metrics["swaps"] == (metrics["preemptions"] if swap_space else 0)


@pytest.mark.parametrize("stage", PAGED)
def test_a_full_swap_space_changes_no_token(build: Build, stage: str) -> None:
    """Room for some of the preempted: the others are computed again."""
    engine = build(stage, swap_space=20 * TOKEN_BYTES, **SMALL)
    assert same_as_m0(engine, *GROWING)
    metrics = engine.metrics()
    assert 0 < metrics["swaps"] < metrics["preemptions"]  # type: ignore[operator]


@pytest.mark.parametrize("block_size", [1, 2, 16, 256])
@pytest.mark.parametrize("stage", PAGED)
def test_a_request_that_ends_on_a_block_boundary_gets_the_right_tokens(
    build: Build, stage: str, block_size: int
) -> None:
    """Prompts, and prompts with outputs, of B - 1, B and B + 1 tokens, all in one batch."""
    around = [length for length in (block_size - 1, block_size, block_size + 1) if length > 0]
    cases = [(length, 1) for length in around]
    cases += [(length, 3) for length in around]
    cases += [(length - 5, 5) for length in around if length > 5]
    prompts, outputs = zip(*cases, strict=True)
    assert same_as_m0(build(stage, block_size=block_size), prompts, outputs)


ABORTED = [(stage, {"max_num_seqs": 4}) for stage in CONTINUOUS]
ABORTED += [(stage, {"swap_space": swap_space, **SMALL}) for stage in PAGED for swap_space in (0, 10**6)]


@pytest.mark.parametrize(("stage", "options"), ABORTED)
def test_an_abort_changes_no_token_of_the_others(build: Build, stage: str, options: dict[str, int]) -> None:
    engine = build(stage, **options)
    prompts, lengths = GROWING
    aborts = {0: [7], 1: [0], 4: [5], 12: [2, 6]}
    outputs = serve(engine, prompts_of(prompts), [exactly(n) for n in lengths], aborts)
    assert engine.metrics()["aborted"] == 5
    expected_tokens = by_m0(TINY[0], *GROWING, quantized=stage == "m7")
    for index, (output, expected) in enumerate(zip(outputs, expected_tokens, strict=True)):
        if index in (0, 2, 5, 6, 7):
            assert output.finish_reason == "abort" and output.token_ids == expected[: len(output.token_ids)]
        else:
            assert output.token_ids == expected
