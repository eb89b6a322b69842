"""The fast builder of batches, held to the definitions in m2 and m3."""

from __future__ import annotations

from dataclasses import fields
from random import Random

import pytest
import torch

from common.batch import RaggedBatch
from common.execution.step_inputs import StepBuilder
from common.plan import Chunk, StepPlan
from common.request import Request
from common.sampling_params import SamplingParams
from stages.m2_continuous_batching.batch import ragged_batch
from stages.m3_paged_kv.batch import PagedBatches
from tests.depth import by_depth

CPU = torch.device("cpu")


def request(number: int, tokens: int, random: Random) -> Request:
    prompt = [random.randrange(500) for _ in range(tokens)]
    return Request(f"r{number}", prompt, SamplingParams(), frozenset(), seed=0, arrival_time=0.0)


def plan(random: Random, block_size: int, requests: int) -> StepPlan:
    """Decodes first, then prompts; some wait for their last token, some are forked, some do not sample."""
    chunks: list[Chunk] = []
    for number in random.sample(range(8), requests):
        decode = random.random() < 0.5
        start = random.randint(0, 20)
        length = 1 if decode else random.randint(1, 12)
        missing = random.random() < 0.3
        owner = request(number, start + length - missing or 1, random)
        missing = start + length > len(owner.token_ids)
        blocks = -(-(start + length) // block_size) + random.randint(0, 1)
        table = [random.randrange(100) for _ in range(blocks)]
        forks = [request(90 + i, 3, random) for i in range(random.choice([0, 0, 2]))]
        samples = missing or random.random() < 0.8
        chunks.append(Chunk(owner, start, length, table, samples=samples, forks=forks if samples else []))
    return StepPlan(sorted(chunks, key=lambda chunk: chunk.length > 1))


def assert_equal(batch: RaggedBatch, expected: RaggedBatch, but: tuple[str, ...] = ()) -> None:
    for field in fields(RaggedBatch):
        one, other = getattr(batch, field.name), getattr(expected, field.name)
        if field.name in but:
            continue
        if isinstance(one, torch.Tensor):
            assert one.tolist() == other.tolist(), field.name
            assert one.dtype == other.dtype, field.name
        else:
            assert one == other, field.name


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_batches_built_fast_are_those_of_m3(block_size: int) -> None:
    """Also with rows that were used by others before: tables are compared as far as they mean something."""
    random = Random(block_size)
    fast, definition = StepBuilder(block_size, 20), PagedBatches(block_size)
    for _ in range(by_depth(30, 300)):
        step = plan(random, block_size, random.randint(1, 6))
        one, other = fast(step, CPU), definition(step, CPU)
        assert_equal(one, other, but=("block_tables",))
        for chunk, row, expected in zip(step.chunks, one.block_tables, other.block_tables, strict=True):
            used = len(chunk.block_table)
            assert row[:used].tolist() == expected[:used].tolist() == list(chunk.block_table)


def test_m3s_batch_is_m2s_with_a_place_for_every_token() -> None:
    random = Random(0)
    for _ in range(20):
        step = plan(random, 64, random.randint(1, 6))
        for chunk in step.chunks:
            chunk.forks, chunk.block_table = [], chunk.block_table[:1]
        ragged, paged = ragged_batch(step, CPU), PagedBatches(64)(step, CPU)
        for name in ("input_ids", "positions", "query_start_loc", "seq_lens", "logit_indices", "block_tables"):
            assert getattr(ragged, name).tolist() == getattr(paged, name).tolist(), name
        assert (ragged.max_query_len, ragged.max_seq_len, ragged.num_decodes) == (
            paged.max_query_len,
            paged.max_seq_len,
            paged.num_decodes,
        )
        assert ragged.slot_mapping.numel() == 0
