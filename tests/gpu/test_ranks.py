"""Tensor parallelism on a GPU: with one rank the collectives are NCCL's, inside of the CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from common import Engine, EngineConfig, SamplingParams
from tests.conftest import TINY
from tests.engine_checks import exactly, prompts_of, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

PROMPTS = prompts_of([5, 30, 70, 200])
PARAMS = [
    exactly(30),
    SamplingParams(max_tokens=30, temperature=0.8, top_k=30, seed=2, ignore_eos=True),
    exactly(9),
    exactly(17),
]
OPTIONS: dict[str, Any] = {"device": "cuda", "max_num_seqs": 4, "max_num_batched_tokens": 128}
OPTIONS["kv_cache_memory"] = 1 << 22


@pytest.mark.parametrize("model", TINY)
def test_one_rank_over_nccl_in_graphs(build: Callable[..., Engine], model: str) -> None:
    from torch.distributed import TCPStore

    from common.execution.parallel.ranks import Ranks
    from common.execution.parallel.split import Split
    from common.models.load import open_source
    from stages.m6_prefix_caching.engine import build as build_m6

    alone = build("m6", model=model, **OPTIONS)
    config = EngineConfig(model=model, **OPTIONS)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    config.ranks = Ranks(Split(open_source(model).config, 0, 1), store, config.torch_device)
    with build_m6(config) as split:
        assert split.runner.graphs is not None
        for params in (PARAMS, [exactly(30)] * 4):
            assert tokens(split.generate(PROMPTS, params)) == tokens(alone.generate(PROMPTS, params))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("stage", ["m3", "m6", "m7"])
def test_two_gpus_give_the_tokens_of_one(build: Callable[..., Engine], stage: str) -> None:
    alone, split = (
        build(stage, model=TINY[0], **OPTIONS),
        build(stage, model=TINY[0], tensor_parallel_size=2, **OPTIONS),
    )
    for params in (PARAMS, [exactly(30)] * 4):
        assert tokens(split.generate(PROMPTS, params)) == tokens(alone.generate(PROMPTS, params))
