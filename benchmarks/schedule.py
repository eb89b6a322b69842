"""A long prompt that arrives while two others decode: the schedule of a real run, step by step."""

from __future__ import annotations

from pathlib import Path

import stages
from benchmarks.plots.schedule import draw_schedule
from benchmarks.recipes import Draw
from common import Engine, SamplingParams
from common.config import stage_options
from common.trace import StepTrace

SHORT, LONG, CHUNK = 16, 1000, 256
"""Tokens of the prompts, and of the chunks that the long one comes in."""
STEPS_BEFORE, STEPS_AFTER = 3, 3
"""So many decode steps are drawn before the long prompt arrives, and after its first token."""


def record_schedule(stage: str, model: str, device: str, dtype: str) -> StepTrace:
    """Two requests decode; after some steps the long prompt comes."""
    wanted = {"max_num_seqs": 3, "max_model_len": 2 * LONG, "prefill_chunk_size": CHUNK}
    options = stage_options(stages.number(stage), wanted)
    with stages.build(stage, model=model, device=device, dtype=dtype, **options) as engine:
        draw = Draw(engine.runner.model.config.vocab_size)
        _run(engine, draw)  # once without looking: the first steps of a process are slow
        engine.trace = StepTrace()
        _run(engine, draw)
        return engine.trace


def _run(engine: Engine, draw: Draw) -> None:
    endless = SamplingParams(max_tokens=STEPS_BEFORE + STEPS_AFTER + LONG // CHUNK + 3, ignore_eos=True)
    short = [engine.add_request(draw.tokens(SHORT), endless) for _ in range(2)]
    for _ in range(1 + STEPS_BEFORE):
        engine.step()
    long = engine.add_request(draw.tokens(LONG), SamplingParams(max_tokens=1 + STEPS_AFTER, ignore_eos=True))
    while not any(output.request_id == long and output.finished for output in engine.step()):
        pass
    for one in short:
        engine.abort(one)
    engine.step()


def schedule(stages_to_draw: list[str], model: str, device: str, dtype: str, path: Path) -> Path:
    """One panel a stage, on one scale of time."""
    traces = {stage: record_schedule(stage, model, device, dtype) for stage in stages_to_draw}
    return draw_schedule(traces, path)
