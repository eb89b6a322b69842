"""Numbers into words and back, and the trap of the two versions of zero points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.models.quantized_weight import Format, QuantizedWeight, pack, pack_zeros, unpack, unpack_zeros

FORMS: tuple[Format, ...] = ("gptq", "gptq_v2")


@given(bits=st.sampled_from([4, 8]), words=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_pack_and_unpack_are_inverse(bits: int, words: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (words * 32 // bits, width), generator=generator, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)


def test_the_first_number_is_in_the_lowest_bits() -> None:
    codes = torch.tensor([[1], [2], [3], [4], [5], [6], [7], [8]], dtype=torch.uint8)
    assert int(pack(codes, 4)) & 0xFFFFFFFF == 0x87654321
    assert int(pack(codes[:4], 8)) == 0x04030201


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_survive_even_where_a_zero_borrows(bits: int, form: Format) -> None:
    zeros = torch.randint(0, 2**bits, (3, 32), dtype=torch.uint8)
    zeros[:, ::3] = 0
    assert torch.equal(unpack_zeros(pack_zeros(zeros, bits, form), bits, form), zeros)


def test_version_1_stores_one_less() -> None:
    eights = torch.full((1, 8), 8, dtype=torch.uint8)
    assert int(pack_zeros(eights, 4, "gptq")) == 0x77777777
    assert int(pack_zeros(eights, 4, "gptq_v2")) & 0xFFFFFFFF == 0x88888888


def test_dequantize_is_the_formula() -> None:
    codes = torch.randint(0, 16, (16, 8), dtype=torch.uint8)
    scales, zeros = torch.rand(2, 8).half(), torch.randint(0, 16, (2, 8), dtype=torch.uint8)
    g_idx = torch.tensor([1, 0] * 8, dtype=torch.int32)
    for index in (g_idx, None):
        weight = QuantizedWeight(pack(codes, 4), scales, zeros, index, 4, 8)
        result = weight.dequantize()
        assert result.shape == (8, 16) == (weight.out_features, weight.in_features)
        for i in range(16):
            g = i // 8 if index is None else int(index[i])
            expected = (codes[i].float() - zeros[g].float()) * scales[g].float()
            assert torch.equal(result[:, i], expected)


def test_bytes_are_those_of_a_checkpoint() -> None:
    """Zero points count packed, g_idx and bias where there are any."""
    codes = torch.zeros(64, 16, dtype=torch.uint8)
    weight = QuantizedWeight(pack(codes, 4), torch.ones(2, 16).half(), torch.full((2, 16), 8).byte(), None, 4, 32)
    assert weight.weights_bytes() == 64 * 16 // 2 + 2 * 16 * 2 + 2 * 16 // 2
    index = torch.arange(64, dtype=torch.int32) // 32
    other = replace(weight, g_idx=index, bias=torch.zeros(16).half())
    assert other.weights_bytes() == weight.weights_bytes() + 64 * 4 + 16 * 2
