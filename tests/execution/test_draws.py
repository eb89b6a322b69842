"""How graphs draw tokens: rows of tensors against requests, and kernels against PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from common import SamplingParams
from common.execution.draws import KINDS, POSITION, Draws, Kind, RequestDraws, draw, draw_biased, uniforms
from common.execution.gpu.fused import FusedOps
from common.request import Request, SampledToken
from common.sampler import sample, uniform
from tests.depth import DEEP, by_depth

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "repetition_penalty": 1.7, "presence_penalty": 1.0},
    {"min_tokens": 9},
    {"temperature": 0.9, "frequency_penalty": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-46},
    {"repetition_penalty": 1.3},
    {"logit_bias": {0: 6.5, 17: 100, 99: -100}},
    {"temperature": 1.0, "logit_bias": {5: 7.25}, "repetition_penalty": 1.2, "min_tokens": 9, "top_p": 0.9},
]


def requests_of(options: list[dict[str, Any]], vocab: int) -> list[Request]:
    """Each has a prompt, and an output whose next token is being drawn."""
    result: list[Request] = []
    for n, one in enumerate(options):
        params = SamplingParams(max_tokens=64, **one)
        request = Request(f"r{n}", [1, 2, vocab - 1], params, frozenset([4, 9, vocab + 5]), 2**63 - 1 - n, 0.0)
        for token in (3, 3, 8):
            request.num_tokens += 1
            request.append(SampledToken(token), 0.0)
        request.num_tokens += 1
        result.append(request)
    return result


def draws_of(requests: list[Request], positions: list[int], vocab: int, dtype: torch.dtype) -> tuple[Draws, Kind]:
    rows = RequestDraws(len(requests), vocab, DEVICE)
    for slot, request in enumerate(requests):
        rows.enter(slot, request)
    count = len(requests)
    rows.keys[:count, POSITION] = positions
    settings, keys = (torch.from_numpy(x[:count]).to(DEVICE) for x in (rows.settings, rows.keys))
    tokens = torch.full((count + 1,), -1, device=DEVICE)
    kind = Kind(np.bitwise_or.reduce(rows.kinds))
    raw = torch.zeros(count, vocab, dtype=dtype, device=DEVICE)
    return Draws(settings, keys, rows.marks, tokens, raw, rows.biased, rows.bias), kind


def logits_of(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * 3).to(dtype).to(DEVICE)


def ways() -> list[Any]:
    return [draw, FusedOps(DEVICE).draw]


@pytest.mark.parametrize("way", ways(), ids=["PyTorch", "kernels"])
@pytest.mark.parametrize(
    ("vocab", "dtype"), [(100, torch.float32), (2105, torch.float16)] + [(2105, torch.float32)] * DEEP, ids=str
)
def test_rows_draw_what_their_requests_would(way: Any, vocab: int, dtype: torch.dtype) -> None:
    """All options beside each other. float16 has many equal logits."""
    requests = requests_of(OPTIONS, vocab)
    for seed in range(by_depth(1, 12)):
        logits = logits_of(len(requests), vocab, dtype, seed)
        positions = [6 + seed] * len(requests)
        draws, kind = draws_of(requests, positions, vocab, dtype)
        draw_biased(way, logits.clone(), draws, kind)
        assert draws.tokens[:-1].tolist() == sample(logits, requests, positions).token_ids.tolist()


def test_every_kind_of_step_draws_what_its_requests_would() -> None:
    """Steps without rows of some options, for which kernels leave things out."""
    vocab, seen = 300, set[Kind]()
    groups = [[0], [1, 0], [1, 3, 4, 0], [2, 3, 1], [6, 10, 0], [5, 1, 0], [5, 3, 0], [7, 1]]
    for group in groups:
        requests = requests_of([OPTIONS[number] for number in group], vocab)
        logits = logits_of(len(requests), vocab, torch.float16, len(group))
        for way in ways():
            draws, kind = draws_of(requests, [6] * len(requests), vocab, logits.dtype)
            seen.add(kind)
            draw_biased(way, logits.clone(), draws, kind)
            assert draws.tokens[:-1].tolist() == sample(logits, requests, [6] * len(requests)).token_ids.tolist()
    assert seen == set(KINDS)


@pytest.mark.parametrize("way", ways(), ids=["PyTorch", "kernels"])
def test_log_probabilities_are_those_without_the_bias(way: Any) -> None:
    requests = requests_of([{"logprobs": 2, "logit_bias": {7: 100, 3: -5.0}}, {"logprobs": 0}], 50)
    logits = logits_of(2, 50, torch.float32)
    draws, kind = draws_of(requests, [6, 6], 50, logits.dtype)
    draw_biased(way, logits.clone(), draws, kind)
    assert draws.tokens[0] == 7
    assert torch.equal(draws.raw, logits)


def test_a_slot_forgets_the_bias_of_the_request_before() -> None:
    biased, plain = requests_of([{"logit_bias": {7: 100}}, {"presence_penalty": 1.0}], 50)
    rows = RequestDraws(1, 50, DEVICE)
    for request in (biased, plain):
        rows.enter(0, request)
    assert rows.bias[0].count_nonzero() == 0


@pytest.mark.parametrize("way", ways(), ids=["PyTorch", "kernels"])
def test_of_equal_logits_at_the_edge_the_first_are_kept(way: Any) -> None:
    """Exactly top_k tokens, and as many as reach top_p."""
    vocab = 2100
    dtype = torch.float16
    cases = [({"top_k": 5}, 5), ({"top_p": 0.01}, 21), ({"top_k": 100, "top_p": 0.5}, 50), ({"top_k": 2099}, 2099)]
    requests = requests_of([{"temperature": 1.0, **options} for options, _ in cases], vocab)
    logits = torch.full((len(cases), vocab), -0.0, dtype=dtype, device=DEVICE)
    logits[:, ::2] = 0.0
    seen: list[set[int]] = [set() for _ in cases]
    for position in range(by_depth(1, 40)):
        draws, kind = draws_of(requests, [position] * len(cases), vocab, logits.dtype)
        way(logits, draws, kind)
        assert draws.tokens[:-1].tolist() == sample(logits, requests, [position] * len(cases)).token_ids.tolist()
        for tokens, token in zip(seen, draws.tokens.tolist(), strict=False):
            tokens.add(token)
    assert all(max(tokens) < most for tokens, (_, most) in zip(seen, cases, strict=True))


@pytest.mark.parametrize("way", ways(), ids=["PyTorch", "kernels"])
def test_drawn_tokens_are_counted_on_the_device(way: Any) -> None:
    """The host never sees them, and each penalises the next one."""
    vocab = 50
    requests = requests_of([{"frequency_penalty": 2.0}, {"temperature": 1.0, "repetition_penalty": 2.0}], vocab)
    logits = logits_of(2, vocab, torch.float32)
    draws, kind = draws_of(requests, [6, 6], vocab, logits.dtype)
    for position in range(6, 12):
        draws.keys[:, POSITION] = position
        expected = sample(logits, requests, [position] * 2).token_ids.tolist()
        way(logits, draws, kind)
        assert draws.tokens[:-1].tolist() == expected
        for request, token in zip(requests, expected, strict=True):
            request.append(SampledToken(token), 0.0)
            request.num_tokens += 1


@pytest.mark.parametrize("way", ways(), ids=["PyTorch", "kernels"])
def test_only_rows_that_want_log_probabilities_keep_their_logits(way: Any) -> None:
    requests = requests_of([{"logprobs": 2, "presence_penalty": 2.0}, {"min_tokens": 9}], 50)
    logits = logits_of(2, 50, torch.float32)
    draws, kind = draws_of(requests, [6, 6], 50, logits.dtype)
    way(logits, draws, kind)
    assert torch.equal(draws.raw[0], logits[0])
    assert way is draw or not draws.raw[1].any()


def test_noise_on_the_device_is_that_of_the_host() -> None:
    pairs = [(seed, position) for seed in (0, 1, 2**31, 2**63 - 1, 2**64 - 1) for position in (0, 1, 77, 40_000)]
    seeds = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed, _ in pairs])
    positions = torch.tensor([position for _, position in pairs])
    assert uniforms(seeds, positions).tolist() == [uniform(*pair) for pair in pairs]
