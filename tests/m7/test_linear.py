"""Linear layers over 4-bit weights on the CPU, against the product with the weight that the numbers stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from common.execution.cpu.bf16_linear import OneDnnLinear
from common.models.linear import Linear
from common.models.quantized_weight import concatenate
from stages.m7_gptq.fast import cpu_int4
from stages.m7_gptq.fast.cpu_int4 import DEQUANTIZE_TOKENS, CpuInt4Linear
from stages.m7_gptq.fast.group_order import Permuted, in_group_order
from stages.m7_gptq.linear import QuantizedLinear, SideBySide, quantized_linear
from tests.m7.weights import GROUPS, QWEN3, SMOLLM2, check, fast_linear, make_input, make_weight

CPU = torch.device("cpu")
BF16 = torch.bfloat16
ROWS = (1, 2, 7, 16, DEQUANTIZE_TOKENS - 1, DEQUANTIZE_TOKENS, 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_the_definition_multiplies_by_the_dequantised_weight(group: int, dtype: torch.dtype) -> None:
    for act_order in (False, True):
        weight = make_weight(192, 64, group, act_order=act_order, bias=True)
        check(QuantizedLinear(weight), weight, make_input(3, 192, dtype))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act-order"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SMOLLM2)
def test_each_group_takes_its_own_scale_and_zero_point(
    shape: str, group: int, act_order: bool, symmetric: bool
) -> None:
    """576 inputs are 4.5 groups of 128: the last one is shorter."""
    inputs, outputs = SMOLLM2[shape]
    weight = make_weight(inputs, outputs, group, symmetric=symmetric, act_order=act_order)
    layer = fast_linear(weight, BF16, CPU)
    assert isinstance(layer, Permuted if act_order and weight.groups > 1 else CpuInt4Linear)
    for tokens in (1, 64):
        check(layer, weight, make_input(tokens, inputs, BF16))


@pytest.mark.parametrize("tokens", ROWS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_every_number_of_tokens_gives_the_right_product(tokens: int, bias: bool) -> None:
    """Must not be right for one token and wrong for many."""
    weight = make_weight(576, 960, 64, bias=bias)
    check(fast_linear(weight, BF16, CPU), weight, make_input(tokens, 576, BF16))


@pytest.mark.parametrize("shape", QWEN3)
def test_the_larger_models_shapes(shape: str) -> None:
    inputs, outputs = QWEN3[shape]
    weight = make_weight(inputs, outputs, 128)
    for tokens in (1, DEQUANTIZE_TOKENS):
        check(fast_linear(weight, BF16, CPU), weight, make_input(tokens, inputs, BF16))


def test_a_processor_of_unknown_layout_gives_the_right_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiled function PyTorch's kernel serves every number of tokens. Must not read garbage."""
    monkeypatch.setattr(cpu_int4, "_dequantizer", lambda: None)
    weight = make_weight(576, 576, 64)
    check(CpuInt4Linear(weight), weight, make_input(64, 576, BF16))


def test_written_out_weight_agrees_with_the_one_that_decodes() -> None:
    """A long prompt and the tokens after it must see the same model."""
    weight = make_weight(256, 128, 32)
    layer = CpuInt4Linear(weight)
    identity = torch.eye(256, dtype=BF16)
    one_by_one = torch.cat([layer(row[None]) for row in identity])
    assert (layer(identity).float() - one_by_one.float()).abs().max() <= 2**-9 * one_by_one.abs().max().float()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 4), (torch.float16, 4), (BF16, 8)])
def test_weight_without_a_kernel_is_dequantised(dtype: torch.dtype, bits: int) -> None:
    weight = make_weight(192, 64, 64, bits=bits, act_order=True, bias=True)
    layer = fast_linear(weight, dtype, CPU)
    check(layer, weight, make_input(5, 192, dtype))
    assert layer.weights_bytes() == (192 + 1) * 64 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_without_fast_layers_the_definition_multiplies(dtype: torch.dtype) -> None:
    weight = make_weight(192, 64, 64, act_order=True, bias=True)
    layer = quantized_linear(weight, CPU)
    assert isinstance(layer, QuantizedLinear) and layer.weights_bytes() < 192 * 64
    check(layer, weight, make_input(5, 192, dtype))


def test_float32_is_exact() -> None:
    weight = make_weight(576, 64, 32, act_order=True)
    x = make_input(3, 576, torch.float32)
    assert torch.equal(fast_linear(weight, torch.float32, CPU)(x), QuantizedLinear(weight)(x))


def test_a_shape_that_no_kernel_takes_is_multiplied_in_full() -> None:
    for weight in (make_weight(48, 64, 16), make_weight(64, 72, 32)):
        layer = fast_linear(weight, BF16, CPU)
        assert isinstance(layer, Linear | OneDnnLinear)  # whichever this processor multiplies faster with
        check(layer, weight, make_input(2, weight.in_features, BF16))


def test_groups_of_different_sizes() -> None:
    weight = make_weight(128, 64, 64)
    uneven = replace(weight, g_idx=(torch.arange(128) >= 48).int())
    assert in_group_order(uneven)[0].g_idx is not None
    check(fast_linear(uneven, BF16, CPU), uneven, make_input(2, 128, BF16))


def test_g_idx_that_says_nothing_costs_no_permutation() -> None:
    weight = make_weight(192, 64, 64)
    ordered, order = in_group_order(replace(weight, g_idx=(torch.arange(192) // 64).int()))
    assert order is None
    assert ordered.g_idx is None


def test_bytes_of_a_quantised_layer() -> None:
    inputs, outputs = 576, 960
    layer = fast_linear(make_weight(inputs, outputs, 64), BF16, CPU)
    assert layer.weights_bytes() == inputs * outputs // 2 + inputs // 64 * outputs * 4
    permuted = fast_linear(make_weight(inputs, outputs, 64, act_order=True), BF16, CPU)
    assert permuted.weights_bytes() == layer.weights_bytes() + inputs * 8


def test_joined_layers_keep_their_order() -> None:
    parts = [make_weight(192, outputs, 64, bias=True, seed=outputs) for outputs in (64, 128, 192)]
    joined = concatenate(parts)
    assert joined is not None
    x = make_input(2, 192, torch.float32)
    expected = torch.cat([QuantizedLinear(part)(x) for part in parts], dim=1)
    torch.testing.assert_close(QuantizedLinear(joined)(x), expected)
    torch.testing.assert_close(SideBySide([QuantizedLinear(part) for part in parts])(x), expected)


@pytest.mark.parametrize(
    "other", [{"group": 32}, {"bits": 8}, {"act_order": True}, {"bias": True}], ids=lambda kind: next(iter(kind))
)
def test_layers_that_do_not_fit_are_not_joined(other: dict[str, int]) -> None:
    weight = make_weight(192, 64, 64)
    options: dict[str, int] = {"group": 64} | other
    assert concatenate([weight, make_weight(192, 64, **options)]) is None  # pyright: ignore[reportArgumentType]


def test_selected_outputs_come_in_the_order_asked_for() -> None:
    weight = make_weight(64, 64, 32, bias=True)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    x = make_input(2, 64, torch.float32)
    torch.testing.assert_close(QuantizedLinear(weight.outputs(order))(x), QuantizedLinear(weight)(x)[:, order])
