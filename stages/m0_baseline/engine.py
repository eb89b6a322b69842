"""m0: static batches, everything recomputed for each new token."""

from common.config import EngineConfig
from common.engine import Engine
from common.models import load_for
from common.runner import Runner
from stages.m0_baseline.attention import FullAttention
from stages.m0_baseline.batch import pad_batch
from stages.m0_baseline.kv_cache import NoCache
from stages.m0_baseline.scheduler import StaticScheduler


def build(config: EngineConfig) -> Engine:
    loaded = load_for(config)
    scheduler = StaticScheduler(NoCache(), config.max_num_seqs)
    runner = Runner(loaded.model, FullAttention(), pad_batch)
    return Engine("m0", config, scheduler, runner, loaded.tokenizer, loaded.max_model_len)
