"""Random heads in 8 bits, and how far their kernels may be from the exact product."""

from __future__ import annotations

import torch

from common.models.ops import Ops
from stages.m7_gptq.fast.int8_head import Int8Head
from stages.m7_gptq.head import HeadWeight, QuantizedHead, round_rows
from tests.execution.cases import Inputs
from tests.m7.weights import TOLERANCE, make_input


def make_head(vocab: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> HeadWeight:
    """Rows of different sizes, one of them nothing but zeros, and one whose x adds up to something large."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=generator) * torch.rand(vocab, 1, generator=generator)
    weight[3] = 0.0
    weight[4] = weight[4].abs()
    return round_rows(weight.to(device, dtype))


def check_head(layer: object, head: HeadWeight, tokens: int, dtype: torch.dtype) -> None:
    """Against the exact product, in float64; x does not lie around 0."""
    x = (make_input(tokens, head.codes.shape[1], torch.float32) + 0.5).to(head.codes.device, dtype)
    expected = x.double() @ (head.codes.double() * head.scales.double()[:, None]).T
    got = layer(x)  # type: ignore[operator]
    assert got.shape == expected.shape and got.dtype == dtype
    assert (got[:, 3] == 0).all()
    error = ((got.double() - expected).abs().max() / expected.abs().max()).item()
    assert error < TOLERANCE[dtype], f"{tokens} tokens: off by {error:.1e} of the largest result"


def check_norm(ops: Ops, layer: Int8Head, head: HeadWeight, tokens: int, dtype: torch.dtype) -> None:
    """RMSNorm and head, against the definition behind a plain RMSNorm."""
    make = Inputs(dtype, str(head.codes.device))
    hidden = head.codes.shape[1]
    x, norm = make.tensor(tokens, hidden, scale=3), make.norm(hidden)
    got, expected = ops.norm_linear(x, norm, layer), QuantizedHead(head)(norm(x))
    assert got.shape == expected.shape and (got[:, 3] == 0).all()
    error = ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    assert error < 2 * TOLERANCE[dtype], f"{tokens} tokens: off by {error:.1e} of the largest result"
