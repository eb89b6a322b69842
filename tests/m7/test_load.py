"""From 4-bit weights to a model: the same tokens as the model with the dequantised weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.models.decoder import Decoder
from common.models.linear import Linear, Projection
from common.models.quantized_weight import QuantizedWeight, pack
from common.models.sources.random_weights import RandomSource
from common.models.weights import Shape, build_decoder, tensor_shapes
from stages.m7_gptq.checkpoint.baselines import rounding_reader
from stages.m7_gptq.fast.choose import Int4Layers
from stages.m7_gptq.fast.cpu_codes import CpuInt4Linear
from stages.m7_gptq.fast.group_order import Permuted
from stages.m7_gptq.linear import ReadQuantized, SideBySide
from stages.m7_gptq.load import build_quantized_decoder
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY
from tests.helpers import all_logits, greedy
from tests.m7.weights import make_weight

CPU = torch.device("cpu")
PROMPT = [5, 99, 7, 300, 12, 45, 6]


class Checkpoint:
    """A tiny model whose projections are 4-bit weights, and the same weights dequantised."""

    def __init__(self, name: str, *, act_order: bool = False, alone: tuple[str, ...] = ()) -> None:
        self.config = RandomSource(name, CPU, 0).config
        self._source = RandomSource(name, CPU, 0)
        self._alone = alone
        shapes = tensor_shapes(self.config)
        self._full = {key: self._source.read(key, shape) for key, shape in shapes.items()}
        self.quantized: dict[str, QuantizedWeight] = {}
        for key, shape in shapes.items():
            layer = key.removesuffix(".weight")
            if not key.endswith("proj.weight") or layer.endswith(alone or ("none",)):
                continue
            seed = 1 if "mlp.down" in key or "o_proj" in key else 0  # layers of the same input share their order
            weight = make_weight(shape[1], shape[0], 32, act_order=act_order, seed=seed)
            generator = torch.Generator().manual_seed(len(self.quantized))
            codes = torch.randint(0, 16, (shape[1], shape[0]), generator=generator, dtype=torch.uint8)
            self.quantized[layer] = replace(weight, qweight=pack(codes, 4), bias=self._full.get(f"{layer}.bias"))

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        """The dequantised model, as a source."""
        weight = self.quantized.get(name.removesuffix(".weight"))
        tensor = self._full[name] if weight is None or not name.endswith(".weight") else weight.dequantize()
        assert tensor.shape == shape
        return tensor

    def tokenizer(self) -> None:
        return None

    def read_quantized(self, names: list[str], bias: bool) -> list[QuantizedWeight | None]:
        return [self.quantized.get(name) for name in names]

    def build(self, dtype: torch.dtype) -> tuple[Decoder, Decoder]:
        read: ReadQuantized = self.read_quantized
        with torch.inference_mode():
            full = build_decoder(self, dtype, CPU, False)
            return build_quantized_decoder(self, read, dtype, CPU, False, Int4Layers(dtype, CPU)), full


def layers_of(model: Decoder) -> list[Projection]:
    first = model.layers[0]
    return [first.qkv_proj, first.o_proj, first.gate_up_proj, first.down_proj]


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("name", TINY)
def test_float32_equals_the_dequantised_model(name: str, act_order: bool) -> None:
    model, full = Checkpoint(name, act_order=act_order).build(torch.float32)
    assert torch.equal(all_logits(model, PROMPT), all_logits(full, PROMPT))
    assert greedy(model, PROMPT, 8) == greedy(full, PROMPT, 8)


@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("name", TINY)
def test_bfloat16_stays_near_the_dequantised_model(name: str, act_order: bool) -> None:
    """Must not be another model: gate and up not sorted as down's inputs are, or q, k, v joined wrongly."""
    checkpoint = Checkpoint(name, act_order=act_order)
    model, _ = checkpoint.build(torch.bfloat16)
    with torch.inference_mode():
        full = build_decoder(checkpoint, torch.float32, CPU, False)
    expected, got = all_logits(full, PROMPT), all_logits(model, PROMPT).float()
    error = (got - expected).norm() / expected.norm()
    assert error < 0.05, f"off by {error:.2f} of the logits"
    kinds = [Permuted, Permuted, Permuted, CpuInt4Linear] if act_order else [CpuInt4Linear] * 4
    assert [type(layer) for layer in layers_of(model)] == kinds
    assert model.weights_bytes() < full.weights_bytes() / 2


def test_layers_left_in_full_precision() -> None:
    """v alone among q, k, v; the whole of o."""
    checkpoint = Checkpoint(TINY[1], alone=("v_proj", "o_proj"))
    model, full = checkpoint.build(torch.float32)
    assert isinstance(model.layers[0].qkv_proj, SideBySide)
    assert isinstance(model.layers[0].o_proj, Linear)
    torch.testing.assert_close(all_logits(model, PROMPT), all_logits(full, PROMPT))


@pytest.mark.parametrize("name", TINY)
def test_rounding_at_load_starts_from_the_same_weights(name: str) -> None:
    """8 bits are so close to the weights that another order of reading them would show."""
    with torch.inference_mode():
        full = build_decoder(RandomSource(name, CPU, 3), torch.float32, CPU, False)
        settings = Settings(bits=8, group_size=32, symmetric=False, search=False)
        source = RandomSource(name, CPU, 3)
        rounded = build_quantized_decoder(source, rounding_reader(source, settings), torch.float32, CPU, False)
    expected = all_logits(full, PROMPT)
    assert (all_logits(rounded, PROMPT) - expected).norm() / expected.norm() < 0.05
