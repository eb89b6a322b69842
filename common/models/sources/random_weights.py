"""Models of exact shapes with random weights: for benchmarks and tests that need no download."""

import tomllib
from dataclasses import replace
from pathlib import Path

import torch

from common.errors import unknown
from common.models.config import ModelConfig
from common.models.weights import Part, Shape

PREFIX = "random:"

_CONFIGS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PRESETS = {name: ModelConfig.from_hf(name, config) for name, config in _CONFIGS.items()}


class RandomSource:
    """Weights drawn on the device itself, in float32: the same for the same seed and kind of device, in any dtype."""

    def __init__(self, name: str, device: torch.device, seed: int) -> None:
        preset = name.removeprefix(PREFIX)
        if preset not in PRESETS:
            raise unknown("random model", name, (PREFIX + p for p in PRESETS))
        self.config = replace(PRESETS[preset], name=name)
        self._device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def read(self, name: str, shape: Shape, part: Part = ()) -> torch.Tensor:
        """All of it is drawn for a part, too: the numbers behind it are then the same."""
        tensor = torch.empty(shape, dtype=torch.float32, device=self._device)
        if "norm" in name:
            return tensor.normal_(1.0, 0.1, generator=self._generator)
        return tensor.normal_(0.0, self._deviation(name, shape), generator=self._generator)[part]

    def _deviation(self, name: str, shape: Shape) -> float:
        """1 / sqrt(inputs) keeps activations at their size, as training does. Two layers of that hardly change the
        embedding, and greedy output repeats one token: the tiny models' projections are three times as wide."""
        deviation = (shape[-1] if len(shape) == 2 else self.config.hidden_size) ** -0.5
        return 3 * deviation if self.config.num_layers == 2 and "proj.weight" in name else deviation

    def tokenizer(self) -> None:
        return None
