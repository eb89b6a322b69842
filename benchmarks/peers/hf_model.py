"""Our weights in transformers' model classes: what the peers run is, number for number, what the stages run."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.contestant import Setting
from common.models.load import QuantizedFolder, open_source
from common.models.weights import ModelSource, Shape, build_decoder
from common.text.tokenizer import Tokenizer

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class Recorder:
    """Hands a source's tensors to our own loader and keeps a copy of each. The detour fixes the order of reading,
    which random weights depend on."""

    def __init__(self, source: ModelSource, dtype: torch.dtype) -> None:
        self._source = source
        self._dtype = dtype
        self.config = source.config
        self.tensors: dict[str, torch.Tensor] = {}

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        tensor = self._source.read(name, shape)
        self.tensors[name] = tensor.to(self._dtype)
        return tensor

    def tokenizer(self) -> Tokenizer | None:
        return self._source.tokenizer()


def load_hf_model(setting: Setting) -> tuple[Any, str | None]:
    """A transformers model for causal language modelling, on the device, without end-of-sequence tokens; and what a
    reader of its figures must know."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source = open_source(setting.model, setting.device, seed=int(setting.options.get("seed", 0)))
    recorder = Recorder(source, setting.dtype)
    build_decoder(recorder, setting.dtype, setting.device, progress=False)
    values, _ = source.config.to_hf()
    values["pad_token_id"], values["eos_token_id"] = 0, None
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype, attn_implementation="sdpa")
    missing, unexpected = model.load_state_dict(recorder.tensors, strict=False)
    tied = {"lm_head.weight"} if source.config.tie_word_embeddings else set[str]()
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"transformers names its weights otherwise: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.to(setting.device).eval(), source.note if isinstance(source, QuantizedFolder) else None
