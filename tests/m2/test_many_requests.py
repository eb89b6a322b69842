"""Hundreds of random requests with random aborts through every engine (in `make test-all` thousands): all are accounted
for, and nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from common import Engine, RequestOutput, SamplingParams
from tests.depth import by_depth
from tests.engine_checks import BOOKKEEPING, CONTINUOUS, PAGED, TOKEN_BYTES, assert_empty, check

Build = Callable[..., Engine]
COUNT = by_depth(400, 2000)


SWAP = [(stage, 24 * TOKEN_BYTES) for stage in BOOKKEEPING if stage in PAGED]


@pytest.mark.parametrize(("stage", "swap_space"), [("m0", 0), ("m1", 0), *((s, 0) for s in BOOKKEEPING), *SWAP])
def test_no_request_is_lost_among_many(build: Build, stage: str, swap_space: int) -> None:
    paged = {"block_size": 4, "kv_cache_memory": 96 * TOKEN_BYTES, "swap_space": swap_space}
    engine = build(stage, max_num_seqs=24, max_model_len=40, **(paged if stage in PAGED else {}))
    random = Random(1)
    alive: list[str] = []
    final: dict[str, RequestOutput] = {}
    wanted: dict[str, int] = {}
    while len(wanted) < COUNT or engine.has_unfinished:
        for _ in range(min(random.choice([0, 0, 1, 3, 12]), COUNT - len(wanted))):
            params = SamplingParams(
                max_tokens=random.choice([1, 2, 6, 20]), n=random.choice([1] * 9 + [3]), temperature=1.0
            )
            prompt = [random.randrange(512) for _ in range(random.choice([1, 3, 4, 5, 8, 17]))]
            alive.append(engine.add_request(prompt, params))
            wanted[alive[-1]] = params.max_tokens
        for output in engine.step():
            assert output.request_id in wanted and output.request_id not in final, "an output after the end"
            if output.finished:
                final[output.request_id] = output
                alive.remove(output.request_id)
        if stage in CONTINUOUS:
            check(engine)
        if alive and random.random() < 0.3:
            engine.abort(random.choice(alive))
    assert_empty(engine)
    assert final.keys() == wanted.keys()
    metrics = engine.metrics()
    aborted = sum(output.finish_reason == "abort" for output in final.values())
    assert (metrics["finished"], metrics["aborted"]) == (COUNT, aborted) and COUNT / 20 < aborted < COUNT / 2
    for id, output in final.items():
        assert output.finish_reason in ("length", "abort")
        for sample in output.outputs:  # an abort may find some samples of a prompt at their ends and others not
            whole = len(sample.token_ids) == wanted[id]
            assert whole if sample.finish_reason == "length" else len(sample.token_ids) <= wanted[id]
    if stage in PAGED:
        assert metrics["preemptions"] > 10 and bool(metrics["swaps"]) == bool(swap_space)  # type: ignore[operator]
