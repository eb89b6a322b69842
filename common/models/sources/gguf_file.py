"""A GGUF file (llama.cpp's format): configuration, tokenizer and weights, dequantised as they are read, in one.
In common, `gguf` is imported here and in gguf_reader.py, and nowhere else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, dequantize

from common.errors import UserError, refusing, require
from common.models.config import ARCHITECTURES, ModelConfig
from common.models.layers import inverse_frequencies
from common.models.rope import Llama3Scaling
from common.models.sources.gguf_keys import ModelKeys, end_tokens, token_id
from common.models.sources.gguf_reader import GGUFTensor, Metadata, read_header
from common.models.sources.gguf_tokenizer import build_tokenizer
from common.models.weights import EMBEDDING, HEAD, Part, Shape, check_tensors
from common.text.tokenizer import Tokenizer

_TOP_NAMES = {"token_embd.weight": EMBEDDING, "output_norm.weight": "model.norm.weight", "output.weight": HEAD}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"


class GGUFFile:
    """Reads the metadata and checks every tensor's name and shape; `read` dequantises one tensor to float32."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self._name = name or str(path)
        with refusing(self._name):
            values, tensors = read_header(path)
            self.metadata = Metadata(self._name, values)
            self._tensors = {_hf_name(name): tensor for name, tensor in tensors.items()}
            unknown = [name for name in self._tensors if name in tensors and name != ROPE_FACTORS]
            require(not unknown, f"{self._name}: tensor {' '.join(unknown)[:80]} is not supported: take another model")
            rope_factors = self._tensors.pop(ROPE_FACTORS, None)
            self.config = self._config()
            if rope_factors is not None:
                self.config = _with_llama3_scaling(self.config, self._dequantize(ROPE_FACTORS, rope_factors))
            check_tensors(self.config, {name: tensor.shape for name, tensor in self._tensors.items()})

    def read(self, name: str, shape: Shape, part: Part = ()) -> torch.Tensor:
        tensor, (*rows, columns) = self._tensors[name], (*part, *[slice(None)] * (len(shape) - len(part)))
        size, count = GGML_QUANT_SIZES[tensor.kind]  # numbers and bytes of a block
        first, end, _ = columns.indices(shape[-1])
        data = tensor.data[(*rows, slice(first // size * count, -(-end // size) * count))]
        result = self._dequantize(name, replace(tensor, data=data))[..., first % size :][..., : end - first]
        split = self.config.architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj")
        return _half_split(result, len(result) // self.config.head_dim) if split else result

    def tokenizer(self) -> Tokenizer | None:
        with refusing(self._name):
            return build_tokenizer(self.metadata, self.config)

    def _dequantize(self, name: str, tensor: GGUFTensor) -> torch.Tensor:
        try:
            with np.errstate(all="ignore"):  # damaged scales: infinity times zero
                return torch.from_numpy(dequantize(tensor.data, tensor.kind).astype(np.float32))
        except NotImplementedError:
            kind = tensor.kind.name
            raise UserError(f"{self._name}: tensors of type {kind} cannot be dequantised: take another file") from None

    def _config(self) -> ModelConfig:
        m, name = self.metadata, self._name
        architecture, supported = m.need("general.architecture", str), ARCHITECTURES.values()
        hint = f"is not supported. Supported: {', '.join(supported)}"
        require(architecture in supported, f"{name}: architecture {architecture[:80]!r} {hint}")
        parts = m.get("split.count", int) or 1
        require(parts <= 1, f"{name} is one of several parts: merge them first with llama-gguf-split")
        keys = ModelKeys(m, architecture)
        hidden, heads = keys.size("embedding_length"), keys.size("attention.head_count")
        head_dim = keys.size("attention.key_length", hidden // heads)
        for key in ("rope.dimension_count", "attention.value_length"):
            found = keys.size(key, head_dim)
            require(found == head_dim, f"{name}: {key} {found} unlike the head size {head_dim} is not supported")
        embedding = self._tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            raise UserError(f"{name} has no matrix token_embd.weight: it is not a whole model")
        vocab_size = embedding.shape[0]
        said = keys.size("vocab_size", vocab_size)
        require(said == vocab_size, f"{name}: vocab_size is {said}, but token_embd.weight has {vocab_size} rows")
        return ModelConfig(
            name=name, architecture=architecture, vocab_size=vocab_size, hidden_size=hidden,
            intermediate_size=keys.size("feed_forward_length"), num_layers=keys.size("block_count"),
            num_heads=heads, num_kv_heads=keys.size("attention.head_count_kv", heads), head_dim=head_dim,
            rms_norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("rope.freq_base", 10000.0), rope_scaling=keys.rope_scaling(),
            max_position_embeddings=keys.size("context_length"),
            qkv_bias=architecture == "qwen2", qk_norm=architecture == "qwen3",
            tie_word_embeddings=HEAD not in self._tensors,
            eos_token_ids=end_tokens(m, vocab_size), bos_token_id=token_id(m, "bos", vocab_size),
        )  # fmt: skip


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


def _with_llama3_scaling(config: ModelConfig, found: torch.Tensor) -> ModelConfig:
    """A GGUF file stores Llama 3's scaling as one divisor for each frequency: find the parameters they came from."""
    right = found.shape == (config.head_dim // 2,) and bool(found.isfinite().all()) and config.rope_scaling is None
    wanted = f"{config.head_dim // 2} divisors, and the only rope scaling"
    require(right, f"{config.name}: {ROPE_FACTORS} must be {wanted}")
    scaled = replace(config, rope_scaling=Llama3Scaling(float(found.max()), 1.0, 4.0, 8192))
    same = torch.allclose(inverse_frequencies(config) / inverse_frequencies(scaled), found, rtol=1e-3)
    require(same, f"{config.name}: its {ROPE_FACTORS} are not Llama 3's rope scaling, and no other is supported")
    return scaled
