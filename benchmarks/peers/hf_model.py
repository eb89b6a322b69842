"""Our weights, number for number what the stages run: as tensors by name, and in transformers' model classes."""

import os
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.contestant import Setting
from common.models.load import open_source
from common.models.sources.quantized_folder import QuantizedFolder
from common.models.weights import ModelSource, Shape, build_decoder

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def our_tensors(setting: Setting) -> tuple[ModelSource, dict[str, torch.Tensor]]:
    """The model as it is opened, and its weights in the setting's dtype."""
    source = open_source(setting.model, setting.device, seed=int(setting.options.get("seed", 0)))
    tensors: dict[str, torch.Tensor] = {}

    def read(name: str, shape: Shape, part: object = None) -> torch.Tensor:
        tensor = source.read(name, shape)
        tensors[name] = tensor.to(setting.dtype)
        return tensor

    # Our own loader fixes the order of reading, which random weights depend on.
    recorder = SimpleNamespace(config=source.config, read=read, tokenizer=source.tokenizer)
    build_decoder(recorder, setting.dtype, setting.device, progress=False)
    return source, tensors


def load_hf_model(setting: Setting) -> tuple[Any, str | None]:
    """A causal language model of transformers without end-of-sequence tokens, and the note for its row."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    source, tensors = our_tensors(setting)
    values, _ = source.config.to_hf()
    values["pad_token_id"], values["eos_token_id"] = 0, None
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=setting.dtype, attn_implementation="sdpa")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = {"lm_head.weight"} if source.config.tie_word_embeddings else set[str]()
    if set(missing) - tied or unexpected:
        raise RuntimeError(f"transformers names its weights otherwise: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.to(setting.device).eval(), source.note if isinstance(source, QuantizedFolder) else None
