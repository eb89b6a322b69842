"""Linear layers over 4-bit weights on the CPU, against the product with the weight that the numbers stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.execution.cpu.fused_cpu import CompiledOps
from common.models.linear import Linear, PackedLinear
from common.models.quantized_weight import concatenate, pack
from stages.m7_gptq.fast import cpu_codes
from stages.m7_gptq.fast.cpu_codes import CpuInt4Linear
from stages.m7_gptq.fast.group_order import Permuted, in_group_order
from stages.m7_gptq.fast.torch_int4 import TorchInt4Linear
from stages.m7_gptq.linear import QuantizedLinear, SideBySide, quantized_linear
from tests.execution.cases import Inputs
from tests.m7.weights import GROUPS, QWEN3, SMOLLM2, check, check_fused, fast_linear, make_input, make_weight

CPU = torch.device("cpu")
BF16 = torch.bfloat16
ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 13, 64)  # every product of a few rows, and what is left of many


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
    for tokens in (1, 7):
        check(fast_linear(weight, BF16, CPU), weight, make_input(tokens, inputs, BF16))


@pytest.mark.parametrize("group", GROUPS)
def test_without_kernels_of_ours_pytorchs_multiplies(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_codes, "_has_numba", lambda: False)
    weight = make_weight(576, 576, group, bias=True)
    layer = fast_linear(weight, BF16, CPU)
    assert isinstance(layer, TorchInt4Linear)
    for tokens in (1, 64):
        check(layer, weight, make_input(tokens, 576, BF16))


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_norm_gate_and_residual_are_done_on_the_way(tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledOps, "norm", lambda *_: pytest.fail("RMSNorm had a call of its own"))
    weight = make_weight(576, 192, 64, bias=bias)
    check_fused(CompiledOps(), fast_linear(weight, BF16, CPU), weight, Inputs(BF16), tokens)


def test_a_token_does_not_depend_on_how_many_share_its_step() -> None:
    layer = fast_linear(make_weight(256, 128, 32), BF16, CPU)
    x = make_input(23, 256, BF16)
    assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x]))


def test_activations_are_rounded_in_groups() -> None:
    """One large number must not cost the others of the row their bits: only those of its group."""
    weight = make_weight(256, 64, 32)
    x = make_input(1, 256, BF16).contiguous()
    x[0, 40] = 1000.0
    exact = x.double() @ weight.dequantize().double().T
    layer = fast_linear(weight, BF16, CPU)
    groups = x.double().view(8, 32)
    step = groups.abs().amax(1, keepdim=True) / 127
    rounded = ((groups / step).round() * step).view(1, 256) @ weight.dequantize().double().T
    assert (layer(x).double() - rounded).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("zero", [0, 15, 16])
def test_every_code_and_zero_point(zero: int) -> None:
    """Each of the 16 codes at each place of a line, picked out by one token; 16: as a checkpoint's version 1 has it."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(2 * 32 // 16)[:, None].expand(64, 64).contiguous()
    zeros = torch.full((1, 64), zero, dtype=torch.uint8)
    weight = replace(make_weight(64, 64, 64), qweight=pack(codes, 4), zeros=zeros)
    got = fast_linear(weight, BF16, CPU)(torch.eye(64, dtype=BF16))
    torch.testing.assert_close(got.float(), weight.dequantize().T, rtol=2**-8, atol=0)


def test_rows_of_zeros_stay_zeros() -> None:
    assert not fast_linear(make_weight(64, 64, 64), BF16, CPU)(torch.zeros(3, 64, dtype=BF16)).any()


@pytest.mark.parametrize("processor", ["haswell", "alderlake"])
def test_other_processors_compute_the_same(processor: str) -> None:
    """AVX2 and VNNI of 256 bits, which this processor has too, compiled for in a process of its own."""
    features = {"haswell": "+avx2,+fma,+f16c", "alderlake": "+avx2,+fma,+f16c,+avxvnni"}[processor]
    if processor == "alderlake" and "avxvnni" not in (Path("/proc/cpuinfo").read_text() if CPUINFO.exists() else ""):
        pytest.skip("this processor has no VNNI of 256 bits without AVX-512")
    environment = os.environ | {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
    done = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESSOR], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["2", "False" if processor == "haswell" else "True"]


OTHER_PROCESSOR = """
import torch
from stages.m4_flash_attention.fast.backends import cpu
from tests.m4.cases import make_case
from tests.m7.weights import check, fast_linear, make_input, make_weight
from common.execution.cpu.simd_products import rows_at_once
from stages.m7_gptq.fast.cpu_codes import CpuInt4Linear, takes_head
weight = make_weight(192, 64, 64, bias=True)
layer = fast_linear(weight, torch.bfloat16, torch.device("cpu"))
assert type(layer) is CpuInt4Linear
for tokens in (1, 2, 5):
    check(layer, weight, make_input(tokens, 192, torch.bfloat16))
make_case([(1, 20), (40, 90)], dtype=torch.bfloat16).check(cpu.create(make_case([(1, 20)], dtype=torch.bfloat16).shape))
print(rows_at_once(), takes_head(torch.zeros(64, 64, dtype=torch.bfloat16)))
"""


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
    for weight in (make_weight(48, 64, 16), make_weight(64, 72, 32, seed=3)):
        layer = fast_linear(weight, BF16, CPU)
        assert isinstance(layer, Linear | PackedLinear)  # whichever this processor multiplies faster with
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
    assert layer.weights_bytes() == inputs * outputs // 2 + inputs // 64 * outputs * 3
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
