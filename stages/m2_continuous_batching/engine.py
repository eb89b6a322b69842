"""m2: requests join and leave at every iteration; no padding."""

from common.config import EngineConfig
from common.engine import Engine
from common.memory import kv_bytes_per_token, rows_in_budget
from common.models import load_for
from common.runner import Runner
from stages.m2_continuous_batching.attention import SlotAttention
from stages.m2_continuous_batching.batch import ragged_batch
from stages.m2_continuous_batching.kv_cache import SlotCache
from stages.m2_continuous_batching.scheduler import ContinuousScheduler


def build(config: EngineConfig) -> Engine:
    loaded = load_for(config)
    model, length = loaded.model, loaded.max_model_len
    slots = rows_in_budget(config, model, length * kv_bytes_per_token(model.config, model.dtype))
    scheduler = ContinuousScheduler(SlotCache(slots, length), config)
    runner = Runner(model, SlotAttention(model, slots, length), ragged_batch)
    return Engine("m2", config, scheduler, runner, loaded.tokenizer, length)
