"""The output head in 8 bits. Compiled and on a GPU: tests/gpu/test_head.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from common import Engine
from common.execution.choose import choose_linear
from common.models.linear import Linear
from stages.m7_gptq.fast.choose import Int4Layers
from stages.m7_gptq.fast.cpu_codes import CpuInt8Head, takes_head
from stages.m7_gptq.fast.int8_head import Int8Head, takes
from stages.m7_gptq.fast.kernels import simd_codes
from stages.m7_gptq.head import HeadWeight, QuantizedHead, eight_bit_head, round_rows
from tests.conftest import TINY
from tests.depth import DEEP
from tests.helpers import all_logits, rounded
from tests.m7.head_checks import check_head, check_norm, make_head

HALF = torch.float16
BF16 = torch.bfloat16
needs_vnni = pytest.mark.skipif(
    not takes_head(torch.zeros(32, 32, dtype=BF16)), reason="this processor has no VNNI, or numba is missing"
)


def test_rounding_is_to_the_nearest_of_the_rows_own_numbers() -> None:
    weight = torch.randn(70, 48, generator=torch.Generator().manual_seed(0))
    head = round_rows(weight)
    error = (head.dequantize(torch.float32) - weight).abs()
    assert (error <= head.scales[:, None] / 2 * 1.0001).all()
    assert (head.codes.abs().amax(1) == 127).all(), "a row's largest number is its largest code"
    assert head.nbytes() == 70 * 48 + 4 * 70


def test_rows_in_several_parts_are_rounded_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another part must not be lost."""
    weight = torch.randn(70, 48).bfloat16()
    whole = round_rows(weight)
    monkeypatch.setattr("stages.m7_gptq.head.PART", 32)
    parts = round_rows(weight)
    assert torch.equal(parts.codes, whole.codes) and torch.equal(parts.scales, whole.scales)
    assert torch.equal(parts.dequantize(BF16), (whole.codes * whole.scales[:, None]).bfloat16())


def test_a_row_of_zeros_stays_zeros() -> None:
    """Must not become NaN."""
    weight = torch.zeros(3, 8)
    weight[1] = 1.0
    assert torch.equal(round_rows(weight).dequantize(torch.float32), weight)


def test_a_head_that_no_kernel_takes_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for head in (choose_linear(torch.randn(64, 40).bfloat16()), Linear(torch.randn(64, 32).half())):
        assert eight_bit_head(head, Int4Layers(BF16, torch.device("cpu"))) is head
    monkeypatch.setattr(simd_codes, "features", lambda: {"avx2"})  # where 8 bits times 8 bits overflow
    head = choose_linear(torch.randn(64, 64).bfloat16())
    assert eight_bit_head(head, Int4Layers(BF16, torch.device("cpu"))) is head


@needs_vnni
@pytest.mark.parametrize("shape", [(64, 32), (320, 576)], ids=str)
def test_a_cpu_multiplies_in_8_bits(shape: tuple[int, int]) -> None:
    weight = make_head(*shape, BF16)
    layer = CpuInt8Head(weight)
    assert layer.weights_bytes() == shape[0] * (shape[1] + 4)
    for tokens in (1, 2, 4, 9):
        check_head(layer, weight, tokens, BF16)
    plain = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for head in (choose_linear(plain), Linear(plain)):
        made, x = eight_bit_head(head, Int4Layers(BF16, torch.device("cpu"))), torch.eye(shape[1], dtype=BF16)
        assert isinstance(made, CpuInt8Head)
        torch.testing.assert_close(
            made(x).T.float(), round_rows(plain).dequantize(torch.float32), rtol=2**-8, atol=1e-6
        )


@needs_vnni
def test_codes_of_all_sizes_times_the_largest_activations_do_not_overflow() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8)[:, None].repeat(1, 64)[:224]
    head = CpuInt8Head(HeadWeight(codes, torch.ones(224)))
    for sign in (1.0, -1.0):
        got = head(torch.full((1, 64), 127 * sign, dtype=BF16))
        torch.testing.assert_close(got[0].float(), codes[:, 0].float() * 64 * 127 * sign, rtol=2**-8, atol=0)


def test_without_fast_layers_the_definition_multiplies() -> None:
    for plain in (torch.randn(64, 32), torch.randn(64, 32).bfloat16()):
        head = eight_bit_head(choose_linear(plain))
        assert isinstance(head, QuantizedHead) and torch.equal(head.weight.codes, round_rows(plain).codes)


def test_float32_multiplies_by_the_rounded_head() -> None:
    weight = torch.randn(64, 32)
    head = eight_bit_head(Linear(weight), Int4Layers(torch.float32, torch.device("cpu")))
    assert isinstance(head, Linear)
    assert torch.equal(head.weight, round_rows(weight).dequantize(torch.float32))
    assert not torch.equal(head.weight, weight)


@pytest.mark.parametrize("model", TINY)
def test_16_bits_keep_the_head_and_8_bits_round_it(build: Callable[..., Engine], model: str) -> None:
    plain = {"model": model, "fused_kernels": False}  # for the same bits
    left, eight = (build("m7", head_bits=bits, **plain).runner.model for bits in (16, 8))
    assert isinstance(left.head, Linear) and isinstance(eight.head, Linear)
    assert left.config.tie_word_embeddings == (left.head.weight is left.embedding)
    assert torch.equal(eight.embedding, left.embedding), "the lookup is not in 8 bits"
    assert torch.equal(eight.head.weight, round_rows(left.head.weight).dequantize(torch.float32))
    assert torch.equal(all_logits(eight, [5, 6, 7]), all_logits(rounded(model), [5, 6, 7]))


class TestKernels:
    """Under the interpreter, where matrix products do not know bfloat16."""

    pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the same kernels compiled")

    @pytest.fixture(autouse=True)
    def needs_triton(self) -> None:
        pytest.importorskip("triton")

    @pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
    @pytest.mark.parametrize("shape", [(21, 576), (64, 64), (37, 100)] + [(101, 576)] * DEEP, ids=str)
    def test_few_tokens(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        from stages.m7_gptq.fast.kernels import triton_int8

        head = make_head(*shape, dtype)
        words = triton_int8.lay_out(head.codes)
        for tokens in (1, 2, 3, 4):
            check_head(lambda x: triton_int8.gemv(x, words, head.scales, {"PDL": False}), head, tokens, dtype)

    @pytest.mark.parametrize("shape", [(101, 576), (64, 64), (37, 100)], ids=str)
    def test_each_number_of_tokens_takes_its_kernel(self, shape: tuple[int, int]) -> None:
        head = make_head(*shape, HALF)
        layer = Int8Head(head)
        for tokens in (1, 2, 3, 5, 17, 130):
            check_head(layer, head, tokens, HALF)
        assert layer.weights_bytes() == QuantizedHead(head).weights_bytes() == shape[0] * (shape[1] + 4)

    @pytest.mark.parametrize("dtype", [HALF, BF16], ids=str)
    @pytest.mark.parametrize("tokens", [1, 2, 3, 4])
    @pytest.mark.parametrize("rows", [21] + [101] * DEEP)  # two programs, and seven; the last is not full
    def test_norm_is_done_once(
        self, rows: int, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from common.execution.gpu import triton_elementwise
        from common.execution.gpu.fused import FusedOps
        from stages.m7_gptq.fast.kernels import triton_int8

        monkeypatch.setattr(triton_int8, "GEMV_TOKENS", 4)
        monkeypatch.setattr(triton_elementwise, "norm", lambda *_: pytest.fail("RMSNorm had a launch of its own"))
        head = make_head(rows, 576, dtype)
        check_norm(FusedOps(torch.device("cpu")), Int8Head(head), head, tokens, dtype)

    def test_the_result_is_added_to_what_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from stages.m7_gptq.fast.kernels import triton_int8

        monkeypatch.setattr(triton_int8, "GEMV_TOKENS", 2)
        head, x = make_head(37, 64, HALF), torch.randn(2, 64).half()
        layer, there = Int8Head(head), torch.randn(2, 37).half()
        few = layer.small_batch_kernel(2, gated=False)
        assert few is not None
        expected = there + layer(x)
        torch.testing.assert_close(few(x, launch={"PDL": False}, add_to=there), expected, atol=1e-2, rtol=1e-2)
        assert layer.small_batch_kernel(2, gated=True) is None
        assert layer.small_batch_kernel(3, gated=False) is None

    def test_every_code_becomes_its_number(self) -> None:
        """All 255 of them, each in all four bytes of a word, by one token that picks it out."""
        from stages.m7_gptq.fast.kernels import triton_int8

        codes = torch.arange(-127, 128, dtype=torch.int8)[:, None].expand(255, 4).contiguous()
        head = HeadWeight(codes, torch.ones(255))
        words = triton_int8.lay_out(head.codes)
        for byte in range(4):
            x = torch.zeros(1, 4, dtype=HALF)
            x[0, byte] = 1.0
            assert torch.equal(triton_int8.gemv(x, words, head.scales, {"PDL": False})[0], codes[:, 0].half())
            assert torch.equal(triton_int8.tiles(x, words, head.scales)[0], codes[:, 0].half())


def test_weights_on_a_cpu_are_not_taken_by_the_kernels() -> None:
    assert not takes(torch.zeros(8, 8, dtype=HALF))
