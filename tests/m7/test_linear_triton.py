"""The Triton kernels under the interpreter (in float16: NumPy has no bfloat16), against the exact product. Compiled and
on a GPU: tests/gpu/test_int4.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from common.execution.gpu.fused import FusedOps
from common.models.layers import RMSNorm
from common.models.quantized_weight import QuantizedWeight
from stages.m7_gptq.fast.kernels import triton_int4_dequantize, triton_int4_gemv, triton_int4_tiles
from stages.m7_gptq.fast.kernels.triton_int4_dequantize import dequantize
from stages.m7_gptq.fast.kernels.triton_int4_gemv import gemv
from stages.m7_gptq.fast.kernels.triton_int4_layout import lay_out, takes
from stages.m7_gptq.fast.kernels.triton_int4_tiles import _even_parts, tiles
from stages.m7_gptq.fast.triton_int4 import TritonInt4Linear
from tests.depth import DEEP, by_depth
from tests.execution.cases import Inputs
from tests.m7.weights import GROUPS, check, check_fused, make_input, make_weight

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same kernels compiled")

CPU = torch.device("cpu")
HALF = torch.float16
SHAPES = {"whole blocks": (256, 32, 128), "half a block at the end": (192, 32, 128), "one block": (64, 32, 128)}
"""Inputs, and the outputs of each kernel: two programs."""
if DEEP:
    SHAPES |= {
        "three whole blocks": (384, 64, 64),
        "four blocks and a half": (576, 64, 64),
        "one block, other numbers of programs": (64, 64, 64),
    }


def run_two_programs(monkeypatch: pytest.MonkeyPatch, warps: int) -> None:
    """The interpreter runs one after another. For 32 outputs they have one tile each, for 64 two."""
    monkeypatch.setattr(triton_int4_gemv, "gemv_config", lambda inputs, outputs: (outputs // 2, warps))


def configure(monkeypatch: pytest.MonkeyPatch, config: tuple[int, int], parts: int = 1) -> None:
    """config: rows of a program and warps, of the matrix-vector kernel; parts: of the inputs, of the tiles."""
    monkeypatch.setattr(triton_int4_gemv, "gemv_config", lambda *_: config)
    monkeypatch.setattr(triton_int4_tiles, "num_parts", lambda *_: parts)


class Layer:
    """One kernel as a layer."""

    def __init__(self, kernel: str, weight: QuantizedWeight) -> None:
        self.kernel: Callable[..., torch.Tensor] = {"gemv": gemv, "tiles": tiles}[kernel]
        self.options = {"launch": {"PDL": False}} if kernel == "gemv" else {}
        self.weight = lay_out(weight, HALF, CPU)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.kernel(x, self.weight, **self.options)

    def weights_bytes(self) -> int:
        return self.weight.nbytes()


@pytest.mark.parametrize("kernel", ["gemv", "tiles"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_group_takes_its_own_scale_and_zero_point(
    shape: str, group: int, symmetric: bool, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several programs and, of the matrix-vector kernel, in as many parts as there are blocks."""
    inputs, gemv_outputs, tiles_outputs = SHAPES[shape]
    outputs = gemv_outputs if kernel == "gemv" else tiles_outputs
    weight = make_weight(inputs, outputs, group, symmetric=symmetric, bias=True)
    configure(monkeypatch, (16, 1))
    check(Layer(kernel, weight), weight, make_input(2, inputs, HALF))


@pytest.mark.parametrize("config", [(16, 8), (32, 16), (32, 4)])
def test_gemv_is_right_where_its_last_part_is_not_full(
    config: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, config)
    weight = make_weight(1536, 64, 128)
    check(Layer("gemv", weight), weight, make_input(1, 1536, HALF))


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "few", "warps"),
    [(by_depth(256, 512), 32, 2, 2), (320, 64, 1, 2), (64, 32, 2, 2)]
    + [(384, 64, 2, 1), (576, 64, 2, 1), (64, 64, 2, 1)] * DEEP,
    ids=["whole blocks", "half a block at the end", "one block"]
    + ["three parts of a warp", "five parts of a warp", "one part of a warp"] * DEEP,
)
def test_norm_silu_and_residual_are_each_done_once(
    inputs: int, outputs: int, few: int, warps: int, group: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two warps have whole parts (one, and two in the deep run), two of which the last is not full, or one that is not
    full. One warp, in the deep run, has a part for each block."""
    run_two_programs(monkeypatch, warps)
    weight = make_weight(inputs, outputs, group, symmetric=symmetric, bias=not symmetric)
    for tokens in range(1, triton_int4_gemv.GEMV_TOKENS + 1) if DEEP else [few]:
        check_fused(FusedOps(CPU), TritonInt4Linear(weight, HALF, CPU), weight, Inputs(HALF), tokens)


def test_few_tokens_cost_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels between the products have nothing to do then."""
    from common.execution.gpu import triton_elementwise

    run_two_programs(monkeypatch, warps=2)
    layer = TritonInt4Linear(make_weight(128, 64, 64), HALF, CPU)
    monkeypatch.setattr(triton_elementwise, "norm", lambda *_: pytest.fail("RMSNorm had a launch of its own"))
    monkeypatch.setattr(triton_elementwise, "swiglu", lambda *_: pytest.fail("SiLU had a launch of its own"))
    make = Inputs(HALF)
    x, norm = make.tensor(1, 128), make.norm(128)
    assert FusedOps(CPU).norm_linear(x, norm, layer).shape == (1, 64)
    assert FusedOps(CPU).norm_swiglu(x, norm, layer).shape == (1, 32)


@pytest.mark.parametrize("tokens", [1, 15, 17, 64])
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_each_part_of_the_inputs_is_counted_once(parts: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight(640, 64, 64, bias=True)
    assert _even_parts(5, parts) == parts
    configure(monkeypatch, (32, 4), parts)
    check(Layer("tiles", weight), weight, make_input(tokens, 640, HALF))


def test_no_part_is_without_blocks() -> None:
    for blocks in range(1, 40):
        for wanted in range(12):
            parts = _even_parts(blocks, wanted)
            each = -(-blocks // parts)
            assert 1 <= parts <= max(1, wanted)
            assert (parts - 1) * each < blocks <= parts * each


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("inputs", [192] + [576] * DEEP)
def test_written_out_weight_is_the_weight(inputs: int, group: int) -> None:
    weight = make_weight(inputs, 64, group)
    assert torch.equal(dequantize(lay_out(weight, HALF, CPU), HALF), weight.dequantize(HALF))


def test_each_number_of_tokens_takes_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_int4_dequantize, "DEQUANTIZE_TOKENS", 20)
    monkeypatch.setattr(triton_int4_tiles, "num_parts", lambda *_: 2)
    weight = make_weight(256, 64, 64, bias=True)
    layer = TritonInt4Linear(weight, HALF, CPU)
    for tokens in (1, triton_int4_gemv.GEMV_TOKENS, triton_int4_gemv.GEMV_TOKENS + 1, 19, 20):
        check(layer, weight, make_input(tokens, 256, HALF))
    assert layer.weights_bytes() == 256 * 64 // 2 + 4 * 64 * (2 + 2) + 64 * 2


@pytest.mark.parametrize(("scale", "gain"), [(1e4, 60.0), (1e-3, 0.01), (1.0, 1.0)])
@pytest.mark.parametrize(("inputs", "warps"), [(320, 2)] + [(576, 1)] * DEEP)
def test_float16_holds_x_before_the_norm_has_scaled_it(
    inputs: int, warps: int, scale: float, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its range must not end before the norm has made x smaller."""
    run_two_programs(monkeypatch, warps)
    weight, make = make_weight(inputs, 64, 64), Inputs(HALF)
    x, norm = make.tensor(1, inputs, scale=scale), RMSNorm(make.tensor(inputs, scale=0.1) + gain, 1e-12)
    exact = norm.definition(x).double() @ weight.dequantize().double().T
    got = FusedOps(CPU).norm_linear(x, norm, TritonInt4Linear(weight, HALF, CPU)).double()
    assert ((got - exact).abs().max() / exact.abs().max()).item() < 2e-3


@pytest.mark.parametrize("group", [256, 512])
def test_groups_of_several_blocks_take_their_own_scale(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not take the first one's."""
    configure(monkeypatch, (32, 4))
    weight = make_weight(1024, 64, group, symmetric=False)
    check(Layer("gemv", weight), weight, make_input(1, 1024, HALF))
    check(Layer("tiles", weight), weight, make_input(17, 1024, HALF))


def test_more_inputs_than_registers_hold_take_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_int4_gemv, "MOST_INPUTS", 128)
    monkeypatch.setattr(triton_int4_tiles, "num_parts", lambda *_: 1)
    weight = make_weight(256, 64, 64)
    layer = TritonInt4Linear(weight, HALF, CPU)
    assert layer.small_batch_kernel(1, gated=False) is None
    check(layer, weight, make_input(1, 256, HALF))


def test_a_weight_that_the_kernels_do_not_take_is_refused() -> None:
    assert takes(make_weight(128, 64, 32))
    assert not takes(make_weight(128, 64, 32, bits=8))
    assert not takes(make_weight(128, 64, 16))
    assert not takes(make_weight(128, 72, 32))
