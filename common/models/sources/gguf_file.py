"""A GGUF file (llama.cpp's format): configuration, tokenizer and weights in one, often quantised.

The weights are dequantised as they are read. `gguf` is imported here and nowhere else.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gguf import GGUFReader, dequantize

from common.errors import UserError, require
from common.models.config import ARCHITECTURES, ModelConfig
from common.models.layers import inverse_frequencies
from common.models.rope import Llama3Scaling
from common.models.sources.gguf_tokenizer import build_tokenizer
from common.models.weights import Shape, check_tensors
from common.text.tokenizer import Tokenizer

_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """Reads the metadata and checks every tensor's name and shape; `read` dequantises one tensor to float32."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._name = name or str(path)
        with path.open("rb") as file:
            require(file.read(4) == b"GGUF", f"{path} is not a GGUF file: its first four bytes are not 'GGUF'")
        try:
            reader = GGUFReader(path)
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is truncated or damaged ({type(error).__name__}): download it again") from error
        self._tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
        rope_factors = self._tensors.pop(ROPE_FACTORS, None)
        self.config = self._config(None if rope_factors is None else np.asarray(rope_factors.data))
        check_tensors(self.config, {name: tuple(map(int, t.shape[::-1])) for name, t in self._tensors.items()})

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self._name}: tensors of type {kind} cannot be dequantised: take another file") from None
        result = torch.from_numpy(values.astype(np.float32)).reshape(shape)
        if self.config.architecture == "llama":
            if ".q_proj." in name:
                return _half_split(result, self.config.num_heads)
            if ".k_proj." in name:
                return _half_split(result, self.config.num_kv_heads)
        return result

    def tokenizer(self) -> Tokenizer | None:
        return build_tokenizer(self._name, self.metadata, self.config.eos_token_ids)

    def _config(self, rope_factors: np.ndarray | None) -> ModelConfig:
        m, name = self.metadata, self._name
        architecture = m.get("general.architecture")
        supported = ARCHITECTURES.values()
        require(
            architecture in supported,
            f"{name}: architecture {architecture!r} is not supported. Supported: {', '.join(supported)}",
        )
        require(m.get("split.count", 1) <= 1, f"{name} is one of several parts: merge them first with llama-gguf-split")

        def get(key: str, default: Any = None) -> Any:
            value = m.get(f"{architecture}.{key}", default)
            if value is None:
                raise UserError(f"{name}: the metadata lacks {architecture}.{key}")
            return value

        require(not get("expert_count", 0), f"{name}: mixture of experts (expert_count) is not supported")
        require(not get("attention.sliding_window", 0), f"{name}: sliding-window attention is not supported")
        scaling = get("rope.scaling.type", "none")
        require(scaling == "none", f"{name}: rope scaling {scaling!r} is not supported")
        hidden, heads = get("embedding_length"), get("attention.head_count")
        head_dim = get("attention.key_length", hidden // heads)
        for key in ("rope.dimension_count", "attention.value_length"):
            require(get(key, head_dim) == head_dim, f"{name}: {key} other than the head size is not supported")
        embedding = self._tensors.get("model.embed_tokens.weight")
        require(embedding is not None, f"{name} has no tensor token_embd.weight: it is not a whole model")
        config = ModelConfig(
            name=name,
            architecture=cast("str", architecture),
            vocab_size=int(embedding.shape[-1]),  # pyright: ignore[reportOptionalMemberAccess]
            hidden_size=hidden,
            intermediate_size=get("feed_forward_length"),
            num_layers=get("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            rms_norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=get("rope.freq_base", 10000.0),
            max_position_embeddings=get("context_length"),
            qkv_bias=architecture == "qwen2",
            qk_norm=architecture == "qwen3",
            tie_word_embeddings="lm_head.weight" not in self._tensors,
            eos_token_ids=_eos_token_ids(m),
            bos_token_id=m.get("tokenizer.ggml.bos_token_id"),
        )
        return config if rope_factors is None else _with_llama3_scaling(config, rope_factors)


def _hf_name(name: str) -> str:
    """`blk.0.attn_q.weight` to `model.layers.0.self_attn.q_proj.weight`; a name unknown here stays as it is."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    return name


def _half_split(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring dimensions of a Llama model and has its rows in that order (0, D/2, 1, ...);
    this puts them back to where dimension i pairs with i + D/2."""
    return weight.reshape(heads, -1, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _eos_token_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


def _with_llama3_scaling(config: ModelConfig, factors: np.ndarray) -> ModelConfig:
    """A GGUF file stores Llama 3's scaling as one divisor for each frequency: find the parameters they came from."""
    plain = inverse_frequencies(config)
    scaled = replace(config, rope_scaling=Llama3Scaling(float(factors.max()), 1.0, 4.0, 8192))
    expected = plain / inverse_frequencies(scaled)
    found = torch.from_numpy(np.array(factors, dtype=np.float32)).flatten()
    same = expected.shape == found.shape and torch.allclose(expected, found, rtol=1e-3)
    require(same, f"{config.name}: its {ROPE_FACTORS} are not Llama 3's rope scaling, and no other is supported")
    return scaled
