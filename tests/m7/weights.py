"""Random 4-bit weights of every kind, and how far a layer may be from the exact product."""

from __future__ import annotations

import torch

from common.models.linear import Linear, Projection
from common.models.ops import Ops
from common.models.quantized_weight import QuantizedWeight, pack
from stages.m7_gptq.fast.choose import Int4Layers
from stages.m7_gptq.linear import quantized_linear
from tests.execution.cases import Inputs

SMOLLM2 = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576)}
QWEN3 = {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)}
"""Inputs and outputs of the projections of SmolLM2-135M and Qwen3-0.6B."""
GROUPS = (32, 64, 128, -1)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest error, as a share of the largest result: x, weight, scale and result are each rounded to the format."""


def make_weight(
    inputs: int,
    outputs: int,
    group: int = 64,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    bias: bool = False,
    bits: int = 4,
    seed: int = 0,
) -> QuantizedWeight:
    """group -1: one group for all inputs. Act-order deals the inputs to groups at random, the last group the rest."""
    generator = torch.Generator().manual_seed(seed)
    size = inputs if group == -1 else group
    groups = -(-inputs // size)
    deal = torch.randperm(inputs, generator=generator)  # first: the same for layers of other outputs
    codes = torch.randint(0, 2**bits, (inputs, outputs), generator=generator, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (groups, outputs), generator=generator, dtype=torch.uint8)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    return QuantizedWeight(
        qweight=pack(codes, bits),
        scales=(torch.rand(groups, outputs, generator=generator) * 0.02 + 0.005).half(),
        zeros=zeros,
        g_idx=(deal // size).int() if act_order else None,
        bits=bits,
        group_size=size,
        bias=torch.randn(outputs, generator=generator).half() if bias else None,
    )


def fast_linear(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> Projection:
    """The layer that an engine would get: fast where a kernel takes the weight."""
    return quantized_linear(weight, device, Int4Layers(dtype, device))


def make_input(tokens: int, inputs: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """[T, in], its rows apart in memory, as the parts of a fused projection's result are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, inputs + 16, generator=generator).to(dtype)[:, :inputs]


def check(layer: Projection, weight: QuantizedWeight, x: torch.Tensor) -> None:
    """The layer's result against the exact one, in float64, over the weight that the numbers stand for."""
    expected = x.cpu().double() @ weight.dequantize().double().T
    if weight.bias is not None:
        expected += weight.bias.double()
    got = layer(x)
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    error = ((got.cpu().double() - expected).abs().max() / expected.abs().max()).item()
    assert error < TOLERANCE[x.dtype], f"off by {error:.1e} of the largest result"


def check_fused(ops: Ops, layer: Projection, weight: QuantizedWeight, make: Inputs, rows: int) -> None:
    """All three products with what is fused to them, against plain operations on the exact weight in float32."""
    exact = Linear(weight.dequantize().to(make.device), None if weight.bias is None else weight.bias.to(make.device))
    x, norm = make.tensor(rows, weight.in_features, scale=3), make.norm(weight.in_features)
    residual = make.tensor(rows, weight.out_features)

    def product(x: torch.Tensor) -> torch.Tensor:
        full = x.float() @ exact.weight.T
        return (full if exact.bias is None else full + exact.bias.float()).to(x.dtype)

    normed = product(Ops().norm(x, norm))
    pairs = {
        "norm_linear": (ops.norm_linear(x, norm, layer), normed),
        "norm_swiglu": (ops.norm_swiglu(x, norm, layer), Ops().swiglu(normed)),
        "residual_linear": (ops.residual_linear(residual.clone(), layer, x), residual + product(x)),
    }
    for name, (got, expected) in pairs.items():
        assert got.shape == expected.shape
        error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
        assert error < 2 * TOLERANCE[x.dtype], f"{name}: off by {error:.1e} of the largest result"
