"""The sampler against distributions worked out by hand in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from common import SamplingParams
from common.request import Request, SampledToken
from common.sampler import mix, sample, uniform

DRAWS = 20_000
LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def request(
    output: Sequence[int] = (), seed: int = 1, eos: Sequence[int] = (), prompt: Sequence[int] = (0,), **options: Any
) -> Request:
    """A request that has generated `output` and whose next token is being sampled."""
    params = SamplingParams(**({"max_tokens": 64} | options))
    result = Request("r", list(prompt), params, frozenset(eos), seed, 0.0)
    for token_id in output:
        result.num_tokens += 1
        result.append(SampledToken(token_id), 0.0)
    result.num_tokens += 1
    return result


def frequencies(logits: Sequence[float], one: Request, draws: int = DRAWS) -> list[int]:
    rows = torch.tensor([logits]).expand(draws, -1)
    ids = sample(rows, [one] * draws, range(draws)).token_ids
    return torch.bincount(ids, minlength=len(logits)).tolist()


def softmax(logits: Sequence[float]) -> list[float]:
    weights = [math.exp(x) for x in logits]
    return [w / sum(weights) for w in weights]


def kept(probs: Sequence[float], keep: Sequence[int]) -> list[float]:
    total = sum(probs[i] for i in keep)
    return [p / total if i in keep else 0.0 for i, p in enumerate(probs)]


def assert_drawn_from(counts: Sequence[int], probs: Sequence[float]) -> None:
    """Pearson's chi-square; 45 is beyond the 1e-6 quantile for up to 8 degrees of freedom."""
    draws, statistic = sum(counts), 0.0
    for count, p in zip(counts, probs, strict=True):
        if p == 0.0:
            assert count == 0, f"a token of probability 0 was drawn: {counts}"
        else:
            statistic += (count - draws * p) ** 2 / (draws * p)
    assert statistic < 45.0, f"{counts} was not drawn from {probs}"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature: float) -> None:
    counts = frequencies(LOGITS, request(temperature=temperature))
    assert_drawn_from(counts, softmax([x / temperature for x in LOGITS]))


def test_top_k_keeps_exactly_k_and_follows_their_odds() -> None:
    assert_drawn_from(frequencies(LOGITS, request(temperature=1.0, top_k=3)), kept(softmax(LOGITS), [0, 1, 2]))
    assert frequencies(LOGITS, request(temperature=1.0, top_k=1)) == [DRAWS, 0, 0, 0, 0, 0]
    assert_drawn_from(frequencies(LOGITS, request(temperature=1.0, top_k=600)), softmax(LOGITS))


def test_top_p_keeps_the_token_that_crosses_the_boundary() -> None:
    probs = [0.1, 0.5, 0.25, 0.15]
    logits = [math.log(p) for p in probs]
    for top_p, keep in ((0.3, [1]), (0.55, [1, 2]), (0.8, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        assert_drawn_from(frequencies(logits, request(temperature=1.0, top_p=top_p)), kept(probs, keep))


def test_a_tiny_top_p_keeps_the_likeliest_token() -> None:
    for top_p in (1e-9, 1e-46):  # the second one is 0 in float32
        assert frequencies(LOGITS, request(temperature=1.0, top_p=top_p), 500) == [500, 0, 0, 0, 0, 0]


def test_top_p_counts_what_top_k_left() -> None:
    """Of 0.4, 0.3, 0.2, 0.1, top_k=2 leaves 4/7 and 3/7: the first alone reaches 0.55, though 0.4 does not."""
    logits = [math.log(p) for p in (0.4, 0.3, 0.2, 0.1)]
    assert frequencies(logits, request(temperature=1.0, top_k=2, top_p=0.55), 2000) == [2000, 0, 0, 0]


def test_min_p_is_relative_to_the_likeliest_token() -> None:
    probs = [0.5, 0.3, 0.15, 0.05]
    logits = [math.log(p) for p in probs]
    assert_drawn_from(frequencies(logits, request(temperature=1.0, min_p=0.25)), kept(probs, [0, 1, 2]))
    assert frequencies(logits, request(temperature=1.0, min_p=1.0), 500) == [500, 0, 0, 0]


def test_penalties_change_the_distribution_by_their_formulas() -> None:
    """Output 1, 1, 2 after the prompt 0, 4."""
    one = request(
        [1, 1, 2],
        prompt=(0, 4),
        temperature=1.0,
        repetition_penalty=1.5,
        presence_penalty=0.9,
        frequency_penalty=0.2,
    )
    expected = [2.0 / 1.5, 1.0 / 1.5 - 0.9 - 2 * 0.2, 0.5 / 1.5 - 0.9 - 0.2, 0.0, -1.0 * 1.5, -3.0]
    assert_drawn_from(frequencies(LOGITS, one), softmax(expected))


def test_penalties_also_apply_to_greedy_and_leave_the_logits_alone() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    output = sample(logits, [request([0], prompt=(2,), presence_penalty=1.0)], [2])
    assert output.token_ids.tolist() == [1]
    assert logits.tolist() == torch.tensor([[2.0, 1.9, 0.0]]).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_bans_every_way_to_stop_until_they_are_there(temperature: float) -> None:
    options: dict[str, Any] = {"temperature": temperature, "min_tokens": 2, "stop_token_ids": [1, 999_999]}
    banned = frequencies(LOGITS, request([5], eos=[0, 3], **options), 2000)
    assert banned[0] == banned[1] == banned[3] == 0
    free = frequencies(LOGITS, request([5, 5], eos=[0, 3], **options), 2000)
    assert free[0] > 0


def test_min_tokens_with_ignore_eos_leaves_eos_to_the_model() -> None:
    one = request([], eos=[0], min_tokens=2, ignore_eos=True)
    assert sample(torch.tensor([LOGITS]), [one], [1]).token_ids.tolist() == [0]


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1e-40, 1e-300])
def test_no_temperature_divides_by_zero(temperature: float) -> None:
    logits = torch.tensor([[40.0, 41.0, -40.0], [-5.0, -7.0, -6.0]])
    one = request(temperature=temperature)
    hot = request(temperature=1.0)
    assert sample(logits, [one, one], [5, 6]).token_ids.tolist() == [1, 0]
    assert sample(logits, [one, hot], [5, 6]).token_ids.tolist()[0] == 1


def test_a_small_temperature_is_the_likeliest_token() -> None:
    assert frequencies([90.0, 91.0, -90.0], request(temperature=2e-5), 500) == [0, 500, 0]


def mixed_batch() -> tuple[torch.Tensor, list[Request]]:
    options: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 7, "logprobs": 3},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.0, "repetition_penalty": 1.7, "presence_penalty": 1.0},
        {"min_tokens": 9, "logprobs": 0},
        {"temperature": 0.9, "frequency_penalty": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "logprobs": 5},
    ]
    requests = [request([3, 3, 8], prompt=(1, 2), eos=[4, 9], seed=n, **options[n % len(options)]) for n in range(40)]
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(requests), 100, generator=generator) * 3, requests


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_request_gets_does_not_depend_on_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    """The whole batch, its reverse, and each row alone: the same tokens and log-probabilities."""
    logits, requests = mixed_batch()
    logits = logits.to(dtype)
    positions = [5 + n % 3 for n in range(len(requests))]
    together = sample(logits, requests, positions).to_host(requests, range(len(requests)))
    backwards = sample(logits.flip(0), requests[::-1], positions[::-1]).to_host(requests[::-1], range(len(requests)))[
        ::-1
    ]
    alone = [sample(logits[n : n + 1], [one], [positions[n]]).to_host([one], [0])[0] for n, one in enumerate(requests)]
    for other in (backwards, alone):
        assert [t.token_id for t in other] == [t.token_id for t in together]
        for got, want in zip(other, together, strict=True):
            assert (got.logprobs is None) == (want.logprobs is None)
            if got.logprobs is not None and want.logprobs is not None:
                assert got.logprobs == pytest.approx(want.logprobs)


def test_logprobs_are_raw_and_always_hold_the_sampled_token() -> None:
    """Temperature, penalties and bans choose the token; the log-probabilities are the model's own."""
    logits = torch.tensor([LOGITS])
    raw = torch.tensor(LOGITS).log_softmax(0).tolist()
    one = request([1], eos=[0], temperature=5.0, min_tokens=5, presence_penalty=2.0, logprobs=2)
    seen: set[int] = set()
    for position in range(200):
        token_id, logprobs = sample(logits, [one], [position]).to_host([one], [0])[0]
        assert logprobs is not None
        assert set(logprobs) == {0, 1, token_id}
        assert logprobs == pytest.approx({i: raw[i] for i in logprobs})
        seen.add(token_id)
    assert seen == {1, 2, 3, 4, 5}


def test_logprobs_zero_is_the_sampled_token_alone_and_none_is_none() -> None:
    requests = [request(logprobs=0), request(logprobs=20), request()]
    host = sample(torch.tensor([LOGITS] * 3), requests, [1, 1, 1]).to_host(requests, range(len(requests)))
    assert [None if t.logprobs is None else sorted(t.logprobs) for t in host] == [[0], [0, 1, 2, 3, 4, 5], None]


def test_impossible_tokens_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probability 0 at both ends of the vocabulary, where inverse sampling could slip, above all at extreme noise."""
    logits = [-math.inf, 1.0, -math.inf, 1.0, -math.inf]
    assert_drawn_from(frequencies(logits, request(temperature=1.0)), [0.0, 0.5, 0.0, 0.5, 0.0])
    for noise, expected in ((0.0, 1), (1.0 - 2.0**-53, 3)):
        monkeypatch.setattr("common.sampler.uniform", lambda seed, position, noise=noise: noise)
        assert sample(torch.tensor([logits]), [request(temperature=1.0)], [0]).token_ids.tolist() == [expected]


def chi_square(counts: Sequence[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("seed", [0, 1, 2, 12345, 2**63 - 1])
def test_noise_is_uniform_and_its_neighbours_are_independent(seed: int) -> None:
    draws = [uniform(seed, position) for position in range(DRAWS)]
    assert all(0.0 <= u < 1.0 for u in draws)
    assert chi_square([sum(int(u * 10) == cell for u in draws) for cell in range(10)]) < 45
    pairs = [int(a * 4) * 4 + int(b * 4) for a, b in pairwise(draws)]
    assert chi_square([pairs.count(cell) for cell in range(16)]) < 65  # 15 degrees of freedom


def test_neighbouring_seeds_share_no_noise() -> None:
    """A seed and the next one, at the same position, and one position further: no correlation, no repeats."""
    for shift in (0, 1):
        pairs = [(uniform(seed, 10), uniform(seed + 1, 10 + shift)) for seed in range(DRAWS)]
        cells = [int(a * 4) * 4 + int(b * 4) for a, b in pairs]
        assert chi_square([cells.count(cell) for cell in range(16)]) < 65
    grid = {mix(seed, position) for seed in range(200) for position in range(200)}
    assert len(grid) == 200 * 200
