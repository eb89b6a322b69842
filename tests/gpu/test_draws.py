"""Drawn tokens on a GPU, at the vocabulary of a real model."""

from __future__ import annotations

import pytest
import torch

from common.execution.draws import uniforms
from common.execution.gpu.fused import FusedOps
from common.models.ops import argmax
from common.sampling.adjust import filter_logits
from tests.execution.test_draws import draws_of, requests_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

VOCAB = 151_936
OPTIONS = [
    {"temperature": 0.7, "top_p": 0.95},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 3000},
    {"temperature": 1.5, "min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.999, "min_p": 0.0001},
    {},
]


@pytest.mark.parametrize("scale", [0.3, 4.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("marked", [{}, {"logprobs": 0}], ids=["", "with log-probabilities"])
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_filtered_rows_draw_what_the_definition_keeps(
    rows: int, marked: dict[str, int], dtype: torch.dtype, scale: float
) -> None:
    """The noise falls into the interval of the token that was drawn, up to float32's rounding of sums."""
    options = [OPTIONS[row % len(OPTIONS)] | marked for row in range(rows)]
    requests = requests_of(options, VOCAB)
    generator = torch.Generator("cuda").manual_seed(rows)
    for position in range(10):
        logits = (torch.randn(rows, VOCAB, device="cuda", generator=generator) * scale).to(dtype)
        draws, kind = draws_of(requests, [position] * rows, VOCAB, dtype)
        FusedOps(logits.device).draw(logits, draws, kind)
        tokens = draws.tokens[:rows, None]
        temperature, *limits = draws.settings[:, :4, None].unbind(1)
        kept = filter_logits(logits, temperature, *limits)
        probs = (kept.double() / torch.where(temperature > 0, temperature, 1.0)).softmax(-1)
        noise, behind = uniforms(draws.keys[:, 0], draws.keys[:, 1]), probs.cumsum(-1).gather(1, tokens)[:, 0]
        before = behind - probs.gather(1, tokens)[:, 0]
        inside = (before - 3e-5 < noise) & (noise < behind + 3e-5)
        assert torch.where(temperature[:, 0] > 0, inside, tokens[:, 0] == argmax(logits)).all()
