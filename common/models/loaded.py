"""The part of building an engine that all stages share: the model, its tokenizer, and how long a request may be."""

from __future__ import annotations

from dataclasses import dataclass

from common.config import EngineConfig
from common.errors import require
from common.execution.choose import choose_ops
from common.models.decoder import Decoder
from common.models.load import load_model, load_tokenizer
from common.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Loaded:
    model: Decoder
    tokenizer: Tokenizer | None
    max_model_len: int


def load_for(config: EngineConfig, fused: bool = False) -> Loaded:
    """Load what `config.model` names; `UserError` if `max_model_len` is more than the model can do.

    fused: take fused kernels where they run.
    """
    place, dtype = config.torch_device, config.torch_dtype
    model = load_model(config.model, dtype=dtype, device=place, seed=config.seed, progress=None)
    return prepare(model, load_tokenizer(config.model), config, fused)


def prepare(model: Decoder, tokenizer: Tokenizer | None, config: EngineConfig, fused: bool) -> Loaded:
    """A model that is loaded already, with its kernels chosen and its limit checked."""
    model.ops = choose_ops(model.device, fused)
    limit = model.config.max_position_embeddings
    length = config.max_model_len or limit
    require(length <= limit, f"max_model_len={length} is over the model's limit of {limit} positions: lower it")
    return Loaded(model, tokenizer, length)
