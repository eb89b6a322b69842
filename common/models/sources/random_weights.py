"""Models of exact shapes with random weights: for benchmarks and tests that need no download."""

from dataclasses import replace

import torch

from common.errors import unknown
from common.models.config import ModelConfig
from common.models.rope import Llama3Scaling
from common.models.weights import Shape

PREFIX = "random:"

_QWEN3 = ModelConfig(
    name="qwen3", architecture="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_layers=28,
    num_heads=16, num_kv_heads=8, head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6, max_position_embeddings=40960,
    qk_norm=True, tie_word_embeddings=True,
)  # fmt: skip
_LLAMA3 = ModelConfig(
    name="llama3", architecture="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
    num_heads=32, num_kv_heads=8, head_dim=64, rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=131072,
    rope_scaling=Llama3Scaling(32.0, 1.0, 4.0, 8192), tie_word_embeddings=True,
)  # fmt: skip
_TINY = ModelConfig(
    name="tiny", architecture="llama", vocab_size=512, hidden_size=64, intermediate_size=128, num_layers=2,
    num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=512,
)  # fmt: skip

PRESETS: dict[str, ModelConfig] = {
    "qwen3-0.6b": _QWEN3,
    "qwen3-4b": replace(_QWEN3, hidden_size=2560, intermediate_size=9728, num_layers=36, num_heads=32),
    "llama3-1b": _LLAMA3,
    "tiny-llama": _TINY,
    "tiny-qwen2": replace(_TINY, architecture="qwen2", qkv_bias=True, tie_word_embeddings=True),
    "tiny-qwen3": replace(_TINY, architecture="qwen3", qk_norm=True, tie_word_embeddings=True),
}
"""Shapes of the published models, and three tiny ones, one for each architecture."""


class RandomSource:
    """Weights drawn on the device itself, in float32: the same for the same seed and kind of device, in any dtype."""

    def __init__(self, name: str, device: torch.device, seed: int) -> None:
        preset = name.removeprefix(PREFIX)
        if preset not in PRESETS:
            raise unknown("random model", name, (PREFIX + p for p in PRESETS))
        self.config = replace(PRESETS[preset], name=name)
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=torch.float32, device=self._device)
        if "norm" in name:
            return tensor.normal_(1.0, 0.1, generator=self._generator)
        return tensor.normal_(0.0, self._deviation(name, shape), generator=self._generator)

    def _deviation(self, name: str, shape: Shape) -> float:
        """1 / sqrt(inputs) keeps activations at their size, as training does. Two layers of that hardly change the
        embedding, and greedy output repeats one token: the tiny models' projections are three times as wide."""
        deviation = (shape[-1] if len(shape) == 2 else self.config.hidden_size) ** -0.5
        return 3 * deviation if self.config.num_layers == 2 and "proj.weight" in name else deviation

    def tokenizer(self) -> None:
        return None
