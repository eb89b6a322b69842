"""Small models with odd shapes, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, 3 queries a KV head": ("Llama", {}),
    "llama, 1 query a KV head, tied": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama, 8 queries a KV head, wide heads": (
        "Llama",
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 20},
    ),
    "llama, stretched rope": ("Llama", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 3}),
    "qwen3, head_dim unlike hidden/heads": ("Qwen3", {"head_dim": 16}),
    "qwen3, tied, 8 queries a KV head": (
        "Qwen3",
        {"head_dim": 10, "num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
}


def make(case: str, **changes: Any) -> Any:
    """A transformers model in float32 whose every weight is random, biases and norms too."""
    family, options = CASES[case]
    config = getattr(transformers, f"{family}Config")(**(BASE | options | changes))
    torch.manual_seed(7)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0.0, 0.5)
    return model


def save(case: str, folder: Path, **options: Any) -> Any:
    model = make(case)
    model.save_pretrained(folder, **options)
    return model


@torch.inference_mode()
def logits(model: Any, token_ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """The project's bound: 1e-4 of the largest logit, plus 1e-4."""
    assert ours.shape == theirs.shape
    worst = (ours - theirs).abs().max().item()
    assert worst <= 1e-4 * theirs.abs().max().item() + 1e-4, f"worst difference {worst}"
