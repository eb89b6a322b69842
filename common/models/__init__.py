"""One decoder for Llama, Qwen2 and Qwen3, and the ways to load it."""

from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.models.load import load_for, load_model, load_tokenizer
from common.models.sources.random_weights import PRESETS

__all__ = ["PRESETS", "Decoder", "ModelConfig", "load_for", "load_model", "load_tokenizer"]
