"""llama.cpp through its C interface (llama-cpp-python), in one of its formats of weights: several sequences in one
batch, refilled as they end."""

import ctypes
import re
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np
import torch

from benchmarks.contestant import Contestant, OnTokens, Setting
from benchmarks.peers.gguf_model import gguf_of
from benchmarks.recipes import BenchRequest
from benchmarks.record import Run, Timeline
from common.errors import UserError, require


def instructions() -> str:
    """What matters of what this build of llama.cpp was compiled for."""
    info = llama_cpp.llama_print_system_info().decode()  # `CPU : AVX2 = 1 | F16C = 1 | ...`
    used = re.findall(r"(AVX2|AVX512_(?:VNNI|BF16)|AMX\w*|NEON|SVE\w*) = 1", info)
    return f"compiled for {', '.join(used) or 'any processor'}"


@dataclass
class Slot:
    """A request in a sequence of llama.cpp's cache. length: tokens in the cache."""

    index: int
    request: BenchRequest
    length: int = 0
    row: int = 0  # of its logits in the current batch
    tokens: list[int] = field(default_factory=list[int])
    times: list[float] = field(default_factory=list[float])


@llama_cpp.llama_log_callback
def _silent(level: int, text: bytes, data: Any) -> None:
    pass


class LlamaCpp(Contestant):
    def __init__(self, setting: Setting, kind: str) -> None:
        on_gpu = setting.device.type == "cuda"
        if on_gpu and not llama_cpp.llama_supports_gpu_offload():
            raise UserError("this llama-cpp-python was built for CPUs: reinstall it with CMAKE_ARGS=-DGGML_CUDA=on")
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        path, what = gguf_of(setting, kind)
        self.note: str | None = f"{what}; KV cache in float16; {instructions()}"
        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 999 if on_gpu else 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        require(bool(self._model), f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = setting.size.kv_budget_tokens
        params.n_seq_max = setting.size.max_num_seqs
        params.n_batch = params.n_ubatch = max(512, setting.size.max_model_len)
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        require(bool(self._context), f"llama.cpp cannot make a context of {params.n_ctx} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch_limit = int(params.n_batch)
        self._batch = llama_cpp.llama_batch_init(self._batch_limit, 0, 1)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self._rows = setting.size.max_num_seqs

    def run(self, requests: Sequence[BenchRequest], on_tokens: OnTokens) -> Run:
        start = time.perf_counter()
        waiting = deque(enumerate(requests))
        running: dict[int, Slot] = {}  # by sequence id
        ended: dict[int, Slot] = {}  # by request number
        peak = 0
        while waiting or running:
            now = time.perf_counter() - start
            self._admit(waiting, running, now)
            if not running:
                time.sleep(max(0.0, waiting[0][1].arrival - now))
                continue
            peak = max(peak, len(running))
            self._step(running)
            on_tokens(len(running))
            for sequence, slot in list(running.items()):
                if len(slot.tokens) == slot.request.max_tokens:
                    llama_cpp.llama_memory_seq_rm(self._memory, sequence, -1, -1)
                    ended[slot.index] = running.pop(sequence)
        slots = [ended[i] for i in range(len(requests))]
        self.outputs = [slot.tokens for slot in slots]  # of the last run
        timelines = [Timeline(start + slot.request.arrival, slot.times) for slot in slots]
        return Run(start, timelines, {"peak_running": peak, "padding_share": 0.0})

    def _admit(self, waiting: deque[tuple[int, BenchRequest]], running: dict[int, Slot], now: float) -> None:
        """Fill free sequences, as long as their prompts fit into the batch with the decodes."""
        room = self._batch_limit - len(running)
        free = [sequence for sequence in range(self._rows) if sequence not in running]
        while free and waiting and waiting[0][1].arrival <= now and len(waiting[0][1].prompt) <= room:
            index, request = waiting.popleft()
            room -= len(request.prompt)
            running[free.pop(0)] = Slot(index, request)

    def _step(self, running: dict[int, Slot]) -> None:
        """One `llama_decode`: whole prompts of new requests and one token of the others; then the likeliest tokens."""
        count = 0
        batch = self._batch
        for sequence, slot in running.items():
            for token in slot.tokens[-1:] or slot.request.prompt:
                batch.token[count], batch.pos[count], batch.logits[count] = token, slot.length, 0
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, sequence
                slot.length += 1
                count += 1
            slot.row = count - 1
            batch.logits[slot.row] = 1
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        for slot in running.values():
            logits = llama_cpp.llama_get_logits_ith(self._context, slot.row)
            slot.tokens.append(int(np.argmax(np.ctypeslib.as_array(logits, shape=(self.vocab_size,)))))
        now = time.perf_counter()  # after all of them
        for slot in running.values():
            slot.times.append(now)

    def close(self) -> None:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
