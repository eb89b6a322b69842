"""m1: m0 with a KV cache. A step computes only what is new."""

from common.config import EngineConfig
from common.engine import Engine
from common.memory import kv_bytes_per_token, rows_in_budget
from common.models import load_for
from common.runner import Runner
from stages.m0_baseline.batch import pad_batch
from stages.m0_baseline.scheduler import StaticScheduler
from stages.m1_kv_cache.attention import RowAttention
from stages.m1_kv_cache.kv_cache import RowCache


def build(config: EngineConfig) -> Engine:
    loaded = load_for(config)
    model, length = loaded.model, loaded.max_model_len
    rows = rows_in_budget(config, model, length * kv_bytes_per_token(model.config, model.dtype))
    scheduler = StaticScheduler(RowCache(rows, length), config.max_num_seqs)
    runner = Runner(model, RowAttention(model, rows, length), pad_batch)
    return Engine("m1", config, scheduler, runner, loaded.tokenizer, length)
