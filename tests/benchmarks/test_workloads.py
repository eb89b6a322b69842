"""The workloads are fixed: these numbers change only with a reason, since they make old results incomparable."""

from __future__ import annotations

import hashlib
import json

import pytest

from benchmarks.recipes import BenchRequest, total_output
from benchmarks.workloads import WORKLOADS, find, find_size
from common.errors import UserError

GOLDEN = {
    ("single", "cpu"): (1, 128, 128, "c68829b243bf"),
    ("single", "gpu"): (1, 128, 128, "c68829b243bf"),
    ("mixed", "cpu"): (48, 2693, 2089, "348d3ac609c6"),
    ("mixed", "gpu"): (256, 144191, 48374, "3baf123408d2"),
    ("decode", "cpu"): (16, 512, 2048, "47adbd508124"),
    ("decode", "gpu"): (64, 8192, 32768, "d7f9d8e921f1"),
    ("ladder", "cpu"): (12, 571, 268, "46d80b93463c"),
    ("ladder", "gpu"): (12, 7749, 551, "d39881c76aca"),
    ("arrivals", "cpu"): (48, 2693, 2089, "02dbca323f85"),
    ("arrivals", "gpu"): (256, 144191, 48374, "c7e135b15e66"),
    ("memory_pressure", "cpu"): (64, 5243, 5552, "0daac6809565"),
    ("memory_pressure", "gpu"): (256, 41031, 42032, "e2cfb1b6f546"),
    ("long_context", "cpu"): (1, 4096, 16, "8264a53a5356"),
    ("long_context", "gpu"): (1, 16384, 16, "4d14717c00ac"),
    ("interference", "cpu"): (24, 16896, 2560, "58335fb08943"),
    ("interference", "gpu"): (40, 131840, 4864, "5b904b0233f2"),
    ("shared_prefix", "cpu"): (25, 26930, 546, "8e5ca96c2380"),
    ("shared_prefix", "gpu"): (129, 556301, 3098, "285237543d0a"),
    ("multi_turn", "cpu"): (25, 31538, 546, "9693adabce76"),
    ("multi_turn", "gpu"): (65, 334326, 1527, "8a7783633684"),
    ("decode_one", "cpu"): (1, 32, 128, "2f3a1af041ea"),
    ("decode_one", "gpu"): (1, 128, 512, "8b7134a5cb24"),
    ("decode_four", "cpu"): (4, 128, 512, "40274565286b"),
    ("decode_four", "gpu"): (4, 512, 2048, "6b329713986a"),
    ("decode_eight", "cpu"): (8, 256, 1024, "baae3b922fca"),
    ("decode_eight", "gpu"): (8, 1024, 4096, "613d7ec1cff7"),
    ("prefill", "cpu"): (8, 4096, 8, "ffbcd43ddc26"),
    ("prefill", "gpu"): (32, 131072, 32, "4178ecc6f059"),
    ("nano", "cpu"): (16, 605, 540, "dc9af71bc267"),
    ("nano", "gpu"): (256, 144191, 149026, "b2d19e90f90e"),
}


def summary(workload: str, preset: str) -> tuple[int, int, int, str]:
    requests = find_size(workload, None, preset).requests(49152)
    content = json.dumps([(r.prompt, r.max_tokens, round(r.arrival, 9), *more(r)) for r in requests])
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return len(requests), sum(r.prompt_length for r in requests), total_output(requests), digest


def more(request: BenchRequest) -> tuple[object, ...]:
    """What sets a request apart from one that only has a prompt, a length and a time; nothing where nothing does."""
    values = (request.group, request.after_tokens, request.follows, request.keep, request.warm)
    return () if values == ("", None, None, 0, False) else values


@pytest.mark.parametrize(("workload", "preset"), GOLDEN)
def test_a_workload_never_changes(workload: str, preset: str) -> None:
    assert summary(workload, preset) == GOLDEN[workload, preset]


def test_every_workload_is_fixed_by_a_golden_entry() -> None:
    assert {(name, preset) for name in WORKLOADS for preset in ("cpu", "gpu")} == set(GOLDEN)


@pytest.mark.parametrize(
    ("preset", "count", "inputs", "short", "long"),
    [("cpu", 48, (16, 96), (4, 32), (160, 224)), ("gpu", 256, (100, 1024), (16, 128), (700, 1000))],
)
def test_mixed_has_the_lengths_that_it_promises(
    preset: str, count: int, inputs: tuple[int, int], short: tuple[int, int], long: tuple[int, int]
) -> None:
    requests = find_size("mixed", None, preset).requests(1000)
    longs = [r for r in requests if r.max_tokens > short[1]]
    assert len(requests) == count
    assert len(longs) == round(0.15 * count)
    assert all(inputs[0] <= len(r.prompt) <= inputs[1] for r in requests)
    assert all(long[0] <= r.max_tokens <= long[1] for r in longs)
    assert all(r.max_tokens >= short[0] for r in requests)


def test_ladder_is_the_start_of_mixed_with_outputs_cut() -> None:
    mixed, ladder = (find_size(name, None, "cpu").requests(1000) for name in ("mixed", "ladder"))
    assert [r.prompt for r in ladder] == [r.prompt for r in mixed[:12]]
    assert [r.max_tokens for r in ladder] == [min(48, r.max_tokens) for r in mixed[:12]]


def test_arrivals_come_at_the_stated_rate() -> None:
    arrivals = [r.arrival for r in find_size("arrivals", None, "gpu").requests(1000)]
    assert arrivals[0] == 0.0
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(20, rel=0.15)


def test_runs_share_lengths_but_no_token_ids() -> None:
    size = find_size("arrivals", None, "cpu")
    first, second = size.requests(49152, run=1), size.requests(49152, run=2)
    assert [(len(r.prompt), r.max_tokens, r.arrival) for r in first] == [
        (len(r.prompt), r.max_tokens, r.arrival) for r in second
    ]
    assert all(a.prompt[:4] != b.prompt[:4] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("vocab_size", [2, 512])
def test_token_ids_are_in_the_vocabulary_and_requests_fit(vocab_size: int) -> None:
    for workload in WORKLOADS.values():
        for sizes in (workload.sizes, *workload.variants.values()):
            for size in sizes.values():
                requests = size.requests(vocab_size)
                assert all(0 <= t < vocab_size for r in requests for t in r.prompt)
                assert all(r.prompt_length + r.max_tokens <= size.max_model_len for r in requests)


@pytest.mark.parametrize(
    ("preset", "lengths", "headline"),
    [
        ("cpu", [512, 1024, 2048, 4096, 8176], 4096),
        ("gpu", [512, 1024, 2048, 4096, 8192, 16384, 32768], 16384),
    ],
)
def test_long_context_sweeps_all_lengths_but_its_headline(preset: str, lengths: list[int], headline: int) -> None:
    workload = find("long_context")
    found = {name: workload.variants[name][preset].requests(9) for name in workload.variants_for(preset)}
    swept = [len(request.prompt) for requests in found.values() for request in requests]
    assert swept == [length for length in lengths if length != headline]
    assert f"prompt={headline}" not in found
    assert workload.sizes[preset].max_model_len == headline + 16
    assert all(workload.variants[name][preset].max_model_len <= {"cpu": 8192, "gpu": 40960}[preset] for name in found)


def test_an_unknown_workload_is_refused_with_the_list() -> None:
    with pytest.raises(
        UserError, match=r"unknown workload 'mixd'. Did you mean 'mixed'.*single, mixed, decode, ladder, arrivals"
    ):
        find("mixd")
