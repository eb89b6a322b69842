"""Log-probabilities of prompts: those of one plain pass, however the engine cuts, repeats or finds the prompt."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common import Engine, SamplingParams, UserError
from common.plan import Chunk, StepPlan
from common.request import Request
from common.sampling.prompt_scores import ROWS, score_prompts
from tests.engine_checks import CHUNKED, CONTINUOUS, PAGED, SHARING, TOKEN_BYTES, exactly, prompts_of, serve, tokens
from tests.fake_graphs import FakeRecorder, fake_graphs
from tests.helpers import all_logits

__all__ = ["fake_graphs"]

Build = Callable[..., Engine]
ALL = ("m0", "m1", *CONTINUOUS)
PROMPTS = prompts_of((1, 2, 15, 16, 17, 33, ROWS + 1, 2 * ROWS + 5))
SMALL: dict[str, Any] = {"block_size": 4, "kv_cache_memory": 60 * TOKEN_BYTES, "max_num_batched_tokens": 16}


def assert_plain(engine: Engine, prompt: Sequence[int], k: int, found: list[dict[int, float] | None] | None) -> None:
    assert found is not None and len(found) == len(prompt) and found[0] is None
    expected = all_logits(engine.runner.model, prompt)[:-1].float().log_softmax(-1)
    for row, token_id, values in zip(expected, prompt[1:], found[1:], strict=True):
        top = row.topk(k).indices.tolist()
        assert values is not None and set(values) == {*top, token_id}
        assert values == pytest.approx({i: row[i].item() for i in values}, abs=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stage", ALL)
def test_they_are_those_of_one_plain_pass(build: Build, stage: str, overlap: bool) -> None:
    options = {"max_num_batched_tokens": 40, "overlap": overlap} if stage in CONTINUOUS else {}
    engine = build(stage, max_num_seqs=3, **options)
    params = [exactly(3 * (number % 3), prompt_logprobs=number % 4) for number in range(len(PROMPTS))]
    for output, prompt, p in zip(engine.generate(PROMPTS, params), PROMPTS, params, strict=True):
        assert_plain(engine, prompt, p.prompt_logprobs or 0, output.prompt_logprobs)
        assert (len(output.token_ids), output.finish_reason) == (p.max_tokens, "length")
    metrics = engine.metrics()
    assert (metrics["running"], metrics["kv_reserved_bytes"]) == (0, 0)
    assert metrics["output_tokens"] == sum(p.max_tokens for p in params)


@pytest.mark.parametrize("stage", ALL)
def test_who_does_not_ask_gets_the_same_tokens(build: Build, stage: str) -> None:
    asked = [exactly(6, prompt_logprobs=2 if number % 2 else None) for number in range(len(PROMPTS))]
    outputs = build(stage).generate(PROMPTS, asked)
    assert tokens(outputs) == tokens(build(stage).generate(PROMPTS, exactly(6)))
    assert [output.prompt_logprobs is None for output in outputs] == [p.prompt_logprobs is None for p in asked]


@pytest.mark.parametrize("swap_space", [0, 60 * TOKEN_BYTES])
@pytest.mark.parametrize("stage", PAGED)
def test_preempted_requests_have_them_once(build: Build, stage: str, swap_space: int) -> None:
    prompts = prompts_of((9, 14, 11, 16, 13))
    params = [exactly(18, prompt_logprobs=1, n=1 + number % 2) for number in range(5)]
    engine = build(stage, swap_space=swap_space, **SMALL)
    outputs = serve(engine, prompts, params)
    assert engine.metrics()["preemptions"] > 0
    for output, prompt in zip(outputs, prompts, strict=True):
        assert_plain(engine, prompt, 1, output.prompt_logprobs)


@pytest.mark.parametrize("stage", SHARING)
def test_a_hit_leaves_out_no_position(build: Build, stage: str) -> None:
    engine = build(stage, block_size=4)
    prompt = PROMPTS[5]
    for p in (exactly(2), exactly(2, prompt_logprobs=1), exactly(0, prompt_logprobs=0, n=2)):
        (output,) = engine.generate([prompt], p)
        assert output.num_cached_tokens == 0
        if p.prompt_logprobs is not None:
            assert_plain(engine, prompt, p.prompt_logprobs, output.prompt_logprobs)
    (output,) = engine.generate([prompt], exactly(2))
    assert output.num_cached_tokens == 32, "what was computed for them is in the cache"


@pytest.mark.parametrize("stage", CHUNKED)
def test_steps_with_them_are_in_no_graph(fake_graphs: type[FakeRecorder], build: Build, stage: str) -> None:
    engine = build(stage, overlap=True, max_num_batched_tokens=16)
    params = [exactly(6, prompt_logprobs=2 if number % 2 else None) for number in range(len(PROMPTS))]
    outputs = engine.generate(PROMPTS, params)
    assert tokens(outputs) == tokens(build(stage, cuda_graphs=False).generate(PROMPTS, exactly(6)))
    for output, prompt, p in zip(outputs, PROMPTS, params, strict=True):
        if p.prompt_logprobs is not None:
            assert_plain(engine, prompt, 2, output.prompt_logprobs)


def test_no_more_logits_than_of_a_few_rows_are_held(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build("m6", max_num_batched_tokens=512)
    model, rows = engine.runner.model, list[int]()
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    (prompt,) = prompts_of([400])
    engine.generate([prompt], exactly(0, prompt_logprobs=0))
    assert sum(rows) == 400 and max(rows) == ROWS


@pytest.mark.parametrize("stage", ALL)
def test_several_samples_of_a_prompt_score_it_once(build: Build, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(stage)
    model, rows = engine.runner.model, list[int]()
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: (rows.append(len(hidden)), logits(hidden))[1])
    (output,) = engine.generate([PROMPTS[5]], exactly(2, prompt_logprobs=1, n=3))
    assert sum(rows) == len(PROMPTS[5]) - 1 + 3 * 2
    assert_plain(engine, PROMPTS[5], 1, output.prompt_logprobs)


def test_without_them_a_token_is_generated(build: Build) -> None:
    with pytest.raises(UserError, match=r"max_tokens must be .*1"):
        SamplingParams(max_tokens=0)
    with pytest.raises(UserError, match="min_tokens must be at most max_tokens"):
        SamplingParams(max_tokens=0, min_tokens=1, prompt_logprobs=0)
    for wrong in (-1, 21, True, 1.5):
        with pytest.raises(UserError, match="prompt_logprobs"):
            SamplingParams(prompt_logprobs=wrong)  # type: ignore
    with pytest.raises(UserError, match="max_model_len"):
        build("m1", max_model_len=16).generate([PROMPTS[3]], exactly(0, prompt_logprobs=0))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read as Linux tells it")
def test_the_memory_of_logits_is_used_again() -> None:
    """And not kept from use by small results that lie between them."""
    vocab, length = 50_000, 20 * ROWS
    request = Request("long", [7] * length, exactly(0, prompt_logprobs=1), frozenset(), seed=0, arrival_time=0.0)
    plan = StepPlan([Chunk(request, 0, length)])
    hidden = torch.rand(length, 1)
    model: Any = SimpleNamespace(
        logits=lambda rows: rows.expand(-1, vocab).clone(), config=SimpleNamespace(vocab_size=vocab)
    )
    batch: Any = SimpleNamespace(sequences=lambda: [(0, length, length)])
    score_prompts(model, plan, batch, hidden)
    before = resident()
    found = [score_prompts(model, plan, batch, hidden) for _ in range(2)]
    assert resident() - before < 10 * ROWS * vocab * 4, "logits of a few parts, and not of all"
    assert len(found[0][0].output.token_ids) == length - 1


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
