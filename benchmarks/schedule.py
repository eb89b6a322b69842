"""A long prompt that arrives while two others decode: the schedule of a real run, step by step."""

import statistics
from collections.abc import Mapping
from pathlib import Path

import stages
from benchmarks.environment import environment, short_hardware
from benchmarks.plots.picture import save_picture
from benchmarks.plots.schedule import schedule_figure
from benchmarks.recipes import Draw
from common import Engine, SamplingParams
from common.config import parse_device, stage_options
from common.models.load import open_source
from common.watch.trace import StepTrace

SHORT, LONG, CHUNK = 16, 1000, 256
"""Tokens of the prompts, and of the chunks that the long one comes in: half of both, a quarter, ... for a model that is
too short for them."""
STEPS_BEFORE, STEPS_AFTER = 3, 3
"""Decode steps that are drawn before the long prompt arrives, and after its first token."""
OUTPUTS = STEPS_BEFORE + STEPS_AFTER + LONG // CHUNK + 3  # more tokens than a request makes before the run ends


def record_schedule(stage: str, model: str, device: str, dtype: str, long: int = LONG) -> StepTrace:
    """Two requests decode; after some steps the long prompt comes."""
    place = parse_device(device)
    limit, halvings = open_source(model, place).config.max_position_embeddings, 0
    while (long >> halvings) + OUTPUTS > limit:
        halvings += 1
    long, chunk = long >> halvings, CHUNK >> halvings
    wanted = {"max_num_seqs": 3, "max_model_len": long + OUTPUTS, "prefill_chunk_size": chunk}
    options = stage_options(stages.number(stage), wanted)
    with stages.build(stage, model=model, device=place, dtype=dtype, **options) as engine:
        draw = Draw(engine.runner.model.config.vocab_size)
        _run(engine, draw, long)  # once without looking: the first steps of a process are slow
        engine.trace = StepTrace()
        _run(engine, draw, long)
        return engine.trace


def _run(engine: Engine, draw: Draw, length: int) -> None:
    endless = SamplingParams(max_tokens=OUTPUTS, ignore_eos=True)
    short = [engine.add_request(draw.tokens(SHORT), endless) for _ in range(2)]
    for _ in range(1 + STEPS_BEFORE):
        engine.step()
    long = engine.add_request(draw.tokens(length), SamplingParams(max_tokens=1 + STEPS_AFTER, ignore_eos=True))
    while not any(output.request_id == long and output.finished for output in engine.step()):
        pass
    for one in short:
        engine.abort(one)
    engine.step()


def schedule(stages_to_draw: list[str], model: str, device: str, dtype: str, path: Path) -> Path:
    """One panel a stage, on one scale of time. m4 and m7 take the same steps as the stage before them, so the finding
    is what a step takes; m7's idea shows in decode steps, which a long prompt would make too narrow to see."""
    last = stages_to_draw[-1]
    long = 4 * SHORT if last == "m7" else LONG
    traces = {stage: record_schedule(stage, model, device, dtype, long) for stage in stages_to_draw}
    finding = "" if last == "m5" else _step_times(traces, "decode" if last == "m7" else "prefill")
    where = f"{model} · {dtype} · {short_hardware(environment(), str(parse_device(device)))}"
    return save_picture(path, lambda: schedule_figure(traces, finding, where))


def _step_times(traces: Mapping[str, StepTrace], kind: str) -> str:
    """Of steps that do only that, after the first; the median."""
    times: dict[str, float] = {}
    for stage, trace in traces.items():
        alone = [step.duration for step in list(trace.steps)[1:] if {c.kind for c in step.chunks} == {kind}]
        times[stage] = statistics.median(alone)
    what = "A step that makes a token for each" if kind == "decode" else "The step of the long prompt"
    return f"{what} takes, in one run: " + ", ".join(f"{1e3 * time:.0f} ms in {stage}" for stage, time in times.items())
