"""m1 against m0 and transformers, and its memory against its formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common import Engine, SamplingParams, UserError
from tests.conftest import TINY
from tests.integrity import check_integrity
from tests.models import reference

Build = Callable[..., Engine]
RAGGED = [[5, 6, 7, 8, 9, 10, 11], [400], [17, 3], [100, 200, 300, 400, 500], [9], [8, 8, 8]]
LENGTHS = [4, 30, 1, 12, 7, 2]
ROW = 512 * 2 * 2 * 2 * 16 * 4
"""Bytes of a row of the tiny models in float32: slots, K and V, layers, KV heads, head dimension, bytes of a number."""


def greedy_tokens(engine: Engine) -> list[list[int]]:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in LENGTHS]
    return [output.token_ids for output in engine.generate(RAGGED, params)]


@pytest.mark.parametrize("max_num_seqs", [1, 4, 16])
@pytest.mark.parametrize("model", TINY)
def test_greedy_tokens_equal_those_of_m0(build: Build, model: str, max_num_seqs: int) -> None:
    m0 = greedy_tokens(build("m0", model=model, max_num_seqs=max_num_seqs))
    assert greedy_tokens(build("m1", model=model, max_num_seqs=max_num_seqs)) == m0


@pytest.mark.parametrize("case", ["llama, stretched rope", "qwen2", "qwen3, tied, 8 queries a KV head"])
def test_logits_over_a_generation_equal_those_of_transformers(build: Build, tmp_path: Path, case: str) -> None:
    """Ragged rows, prefill and decode: at every step the logits that transformers has for the whole sequence."""
    theirs = reference.save(case, tmp_path)
    engine = build("m1", model=str(tmp_path), max_num_seqs=3)
    steps: list[torch.Tensor] = []
    compute = engine.runner.model.logits

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        steps.append(compute(hidden))
        return steps[-1]

    engine.runner.model.logits = keep  # type: ignore[method-assign]
    prompts = [list(range(3, 40)), [50], [60, 61, 62]]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=10, ignore_eos=True))
    ours = torch.stack(steps, dim=1)  # [rows, steps, vocab]
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        whole = reference.logits(theirs, prompt + output.token_ids)
        reference.assert_close(ours[row], whole[len(prompt) - 1 : -1])


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_memory_formula_is_the_memory_allocated(build: Build, dtype: str) -> None:
    engine = build("m1", dtype=dtype, max_num_seqs=3, max_model_len=100)
    size = 4 if dtype == "float32" else 2
    formula = 3 * 100 * 2 * 2 * 2 * 16 * size  # rows, slots, K and V, layers, KV heads, head dimension, bytes
    attention = engine.runner.attention
    tensors = [value for value in vars(attention).values() if isinstance(value, torch.Tensor)]
    assert sum(t.untyped_storage().nbytes() for t in tensors) == formula
    assert attention.kv_bytes() == engine.metrics()["kv_pool_bytes"] == formula


def test_kv_cache_memory_is_kept_to_the_byte(build: Build) -> None:
    assert build("m1", kv_cache_memory=3 * ROW).metrics()["kv_pool_bytes"] == 3 * ROW
    assert build("m1", kv_cache_memory=3 * ROW - 1).metrics()["kv_pool_bytes"] == 2 * ROW
    assert build("m1", kv_cache_memory=99 * ROW, max_num_seqs=4).metrics()["kv_pool_bytes"] == 4 * ROW


def test_memory_for_not_even_one_request_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match=r"lower max_model_len or raise kv_cache_memory"):
        build("m1", kv_cache_memory=ROW - 1)


def test_fewer_rows_than_max_num_seqs_only_makes_smaller_batches(build: Build) -> None:
    small = build("m1", kv_cache_memory=2 * ROW, max_num_seqs=8)
    assert greedy_tokens(small) == greedy_tokens(build("m1", max_num_seqs=8))
    metrics = small.metrics()
    assert metrics["peak_running"] == 2 and metrics["kv_reserved_peak_bytes"] == 2 * ROW


def test_padding_share_is_counted_exactly(build: Build) -> None:
    """Prompts of 3 and 5 tokens that want 1 and 3: two rows of 5, then twice one token next to an idle row."""
    engine = build("m1", max_num_seqs=2)
    engine.generate([[1, 2, 3], [4, 5, 6, 7, 8]], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)])
    metrics = engine.metrics()
    assert (metrics["computed_tokens"], metrics["padded_tokens"]) == (3 + 5 + 1 + 1, 2 + 1 + 1)
    assert metrics["padding_share"] == pytest.approx(4 / 14)


def test_kv_use_is_counted_in_tokens_stored(build: Build) -> None:
    """A prompt of 4 and 3 new tokens: the last token's K and V are never needed, so 6 are stored at the end."""
    engine = build("m1", max_model_len=64)
    engine.add_request([1, 2, 3, 4], SamplingParams(max_tokens=3))
    token_bytes = ROW // 512
    used: list[object] = []
    while True:
        engine.step()
        if not engine.has_unfinished:
            break
        used.append(engine.metrics()["kv_used_bytes"])
    assert used == [4 * token_bytes, 5 * token_bytes]
    metrics = engine.metrics()
    assert metrics["kv_used_peak_bytes"] == 6 * token_bytes
    assert metrics["kv_reserved_peak_bytes"] == 64 * token_bytes
    assert isinstance(metrics["kv_utilization"], float) and 4 / 64 < metrics["kv_utilization"] < 6 / 64


def test_rows_stay_whole_after_aborts(build: Build) -> None:
    """Aborts in the middle of batches, over and over; the others' tokens, and the next batches', are untouched."""
    engine = build("m1", max_num_seqs=3)
    expected = dict(zip(map(tuple, RAGGED), greedy_tokens(engine), strict=True))
    for steps in range(6):
        ids = [
            engine.add_request(prompt, SamplingParams(max_tokens=n)) for prompt, n in zip(RAGGED, LENGTHS, strict=True)
        ]
        outputs = [o for _ in range(steps) for o in engine.step()]
        engine.abort(ids[steps])
        check_integrity(engine.scheduler.cache)
        while engine.has_unfinished:
            outputs += engine.step()
        final = {o.request_id: o for o in outputs if o.finished}
        assert len(final) == 6
        for request_id, output in final.items():
            whole = expected[tuple(output.prompt_token_ids)]
            assert output.token_ids == whole[: len(output.token_ids)]
            if request_id != ids[steps]:
                assert output.token_ids == whole
        assert engine.metrics()["kv_reserved_bytes"] == 0


@pytest.mark.parametrize("stage", ["m0", "m1"])
def test_a_request_may_fill_max_model_len_exactly(build: Build, stage: str) -> None:
    """A neighbour that ends early rides along to the last slot; the tokens are those of a roomier engine."""
    prompts, params = [[7] * 20, [3]], [SamplingParams(max_tokens=12), SamplingParams(max_tokens=31)]
    tight = build(stage, max_model_len=32, max_num_seqs=2)
    roomy = build(stage, max_num_seqs=2)
    ours, theirs = ([o.token_ids for o in e.generate(prompts, params)] for e in (tight, roomy))
    assert ours == theirs and [len(ids) for ids in ours] == [12, 31]
    with pytest.raises(UserError, match="33, over max_model_len=32"):
        tight.generate([[7] * 20], SamplingParams(max_tokens=13))


def test_a_request_may_fill_the_models_own_limit(build: Build) -> None:
    prompt = [n % 512 for n in range(500)]
    (m0,), (m1,) = (build(stage).generate([prompt], SamplingParams(max_tokens=12)) for stage in ("m0", "m1"))
    assert m0.token_ids == m1.token_ids and len(m1.token_ids) == 12


def test_stale_rows_of_an_earlier_batch_are_never_read(build: Build) -> None:
    engine = build("m1", max_num_seqs=2)
    first = engine.generate([[1], [2, 3]], SamplingParams(max_tokens=5))
    engine.generate([list(range(300)), list(range(200))], SamplingParams(max_tokens=5))
    again = engine.generate([[1], [2, 3]], SamplingParams(max_tokens=5))
    assert [o.token_ids for o in again] == [o.token_ids for o in first]
