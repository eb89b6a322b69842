"""Planned a step ahead on a GPU: the same tokens, stops and aborts included, and the host never waits in between."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import Engine, SamplingParams
from common.watch.trace import StepTrace
from tests.engine_checks import CONTINUOUS, TOKEN_BYTES, assert_empty, exactly, prompts_of, serve, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

Build = Callable[..., Engine]
GPU = {"device": "cuda", "kv_cache_memory": 8 * 512 * TOKEN_BYTES, "max_num_seqs": 8}
PROMPTS = prompts_of((7, 1, 30, 2, 5, 16, 1, 40, 3, 11))


def sampled(engine: Engine, params: list[SamplingParams], aborts: dict[int, list[int]]) -> list[list[int]]:
    return tokens(serve(engine, PROMPTS, params, aborts))


@pytest.mark.parametrize("stage", CONTINUOUS)
def test_overlap_changes_no_token(build: Build, stage: str) -> None:
    free = build(stage, overlap=False, **GPU).generate(PROMPTS, exactly(40))
    params = [exactly(5 + 3 * i, stop_token_ids=[free[i].token_ids[20]]) for i in range(len(PROMPTS))]
    params[3] = exactly(20, temperature=1.0, seed=4, top_k=50)
    params[5] = exactly(20, repetition_penalty=1.2)
    aborts = {3: [1], 6: [7]}
    expected = sampled(build(stage, overlap=False, **GPU), params, aborts)
    got = sampled(build(stage, overlap=True, **GPU), params, aborts)
    assert [a for i, a in enumerate(got) if i not in (1, 7)] == [a for i, a in enumerate(expected) if i not in (1, 7)]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01}, {"logprobs": 3}], ids=str)
@pytest.mark.parametrize("stage", CONTINUOUS[-2:])
def test_the_host_never_waits_while_it_submits_a_step(build: Build, stage: str, options: dict[str, float]) -> None:
    """While decodes are submitted, PyTorch raises at every call that would wait for the device."""
    engine = build(stage, overlap=True, **GPU)
    for prompt in PROMPTS[:8]:
        engine.add_request(prompt, exactly(30, **options))
    for _ in range(4):
        engine.step()
    submit = engine.runner.submit

    def without_waiting(plan: object) -> None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            submit(plan)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine.runner.submit = without_waiting  # type: ignore[method-assign]
    while engine.has_unfinished:
        engine.step()
    assert_empty(engine)


def test_the_trace_knows_the_gpus_idle_time(build: Build) -> None:
    engine = build(CONTINUOUS[-1], overlap=True, **GPU)
    trace = engine.trace = StepTrace()
    engine.generate(PROMPTS, exactly(20))
    assert all((step.device_busy or 0) > 0 and (step.device_idle or 0) >= 0 for step in trace.steps)
    assert trace.idle_share is not None and 0 <= trace.idle_share < 1
