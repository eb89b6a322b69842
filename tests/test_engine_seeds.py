"""What an answer depends on: its seed, and nothing that other requests or other engines do."""

from __future__ import annotations

from dataclasses import replace

from common import RequestOutput, SamplingParams
from tests.test_engine import EIGHT, PROMPTS, Build, tokens


def test_sampled_tokens_depend_on_the_seed_alone(build: Build) -> None:
    """Alone, in company, in another engine: the same. Another seed, or none given twice: different."""
    params = SamplingParams(max_tokens=10, temperature=1.5, seed=7)
    alone = build("m1").generate([PROMPTS[0]], params)[0].token_ids
    mates = [SamplingParams(max_tokens=4, temperature=1.0), params, SamplingParams(max_tokens=12)]
    for stage in ("m0", "m1"):
        crowd = build(stage).generate([PROMPTS[1], PROMPTS[0], PROMPTS[3]], mates)
        assert crowd[1].token_ids == alone
    assert build().generate([PROMPTS[0]], replace(params, seed=8))[0].token_ids != alone


def test_requests_without_a_seed_get_one_from_the_engines_seed(build: Build) -> None:
    params = SamplingParams(max_tokens=10, temperature=1.5)
    first = tokens(build(seed=3).generate([PROMPTS[0]] * 2, params))
    assert first[0] != first[1]
    assert tokens(build(seed=3).generate([PROMPTS[0]] * 2, params)) == first


def test_two_engines_live_in_one_process(build: Build) -> None:
    one, two = build("m1", seed=1), build("m0", seed=2)
    apart = tokens(one.generate(PROMPTS, EIGHT)), tokens(two.generate(PROMPTS, EIGHT))
    for engine in (one, two):
        for prompt in PROMPTS:
            engine.add_request(prompt, EIGHT)
    outputs: tuple[dict[str, RequestOutput], dict[str, RequestOutput]] = ({}, {})
    while one.has_unfinished or two.has_unfinished:
        for engine, seen in zip((one, two), outputs, strict=True):
            seen |= {o.request_id: o for o in engine.step()}
    together = tuple([o.token_ids for o in seen.values()] for seen in outputs)
    assert together == apart and apart[0] != apart[1]
