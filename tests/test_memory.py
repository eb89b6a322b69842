"""The KV cache's default size: a share of what is really free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common import EngineConfig, UserError
from common.memory import KV_MEMORY_SHARE, kv_budget, rows_in_budget
from common.models import load_model
from common.watch.peak_memory import _container_free, free_memory

CPU = torch.device("cpu")


def test_a_container_limit_counts(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert _container_free(tmp_path) == 700


@pytest.mark.parametrize("limit", ["max\n", None])
def test_no_limit_is_no_limit(tmp_path: Path, limit: str | None) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
    assert _container_free(tmp_path) > 2**60


def test_the_default_is_the_stated_share() -> None:
    budget = kv_budget(EngineConfig(device="cpu"), load_model("random:tiny-llama"))
    assert budget == pytest.approx(free_memory(CPU) * KV_MEMORY_SHARE, rel=0.2)


def test_rows_never_exceed_max_num_seqs_and_at_least_one_must_fit() -> None:
    config = EngineConfig(device="cpu", kv_cache_memory=1000, max_num_seqs=4)
    model = load_model("random:tiny-llama")
    assert rows_in_budget(config, model, 100) == 4
    assert rows_in_budget(config, model, 300) == 3
    with pytest.raises(UserError, match="lower max_model_len or raise kv_cache_memory"):
        rows_in_budget(config, model, 1001)
