"""transformers' continuous batching (`ContinuousBatchingManager`), with our KV byte budget and row limit."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.contestant import Contestant, OnTokens, Setting
from benchmarks.peers.hf_model import load_hf_model
from benchmarks.recipes import BenchRequest
from benchmarks.record import Run, Timeline
from common.errors import UserError

NO_EOS = -1
PAGE_SIZE = {"cpu": 16, "cuda": 256}
"""256 is its default, made for flash-attention on GPUs; on a CPU such pages would hold a few requests only."""
POLL = 0.05  # seconds


class ContinuousTransformers(Contestant):
    def __init__(self, setting: Setting) -> None:
        try:
            from transformers import ContinuousBatchingConfig
        except ImportError:
            raise UserError("continuous batching is missing: run `pip install 'transformers>=5.17'`") from None
        model, self.note = load_hf_model(setting)
        self.vocab_size: int = model.config.vocab_size
        page, size = PAGE_SIZE[setting.device.type], setting.size
        config = ContinuousBatchingConfig(
            page_size=page, num_blocks=-(-size.kv_budget_tokens // page), max_requests_per_batch=size.max_num_seqs
        )
        self._manager: Any = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=NO_EOS, max_new_tokens=16),
            continuous_batching_config=config,
        )
        if setting.device.type == "cuda":
            with torch.no_grad():
                self._manager.warmup()
        self._manager.start()

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        start = time.perf_counter()
        ids: list[str] = []
        results: dict[str, Any] = {}
        while len(results) < len(requests):
            now = time.perf_counter() - start
            while len(ids) < len(requests) and requests[len(ids)].arrival <= now:
                request = requests[len(ids)]
                options = {"max_new_tokens": request.max_tokens, "eos_token_id": NO_EOS, "record_timestamps": True}
                ids.append(self._manager.add_request(list(request.prompt), **options))
            pause = min(POLL, requests[len(ids)].arrival - now) if len(ids) < len(requests) else POLL
            result = self._manager.get_result(timeout=max(pause, 1e-3))
            if result is not None and result.is_finished():
                if result.error:
                    raise RuntimeError(result.error)
                results[result.request_id] = result
                on_tokens(len(result.generated_tokens))
            elif result is None and not self._manager.is_running():
                raise RuntimeError("transformers' generation thread ended before all requests had")
        self.outputs = [list(results[i].generated_tokens) for i in ids]  # of the last run
        times = [list(results[i].timestamps) for i in ids]
        return Run(start, [Timeline(start + r.arrival, t) for r, t in zip(requests, times, strict=True)])

    def close(self) -> None:
        self._manager.stop(block=True, timeout=5)
