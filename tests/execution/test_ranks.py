"""Engines of several ranks, over gloo: the same tokens, no more bytes or collectives than said, and how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
from common import Engine, EngineConfig, SamplingParams, UserError
from common.execution.parallel import ranks as parallel
from common.execution.parallel.decoder import RowLinear
from common.execution.parallel.ranks import Ranks
from common.execution.parallel.start import on_ranks
from common.models.decoder import PROJECTIONS
from stages.m6_prefix_caching.engine import build as build_m6
from tests.conftest import TINY
from tests.engine_checks import TOKEN_BYTES, assert_empty, exactly, prompts_of, tokens
from tests.execution import one_rank_fails

Build = Callable[..., Engine]
PROMPTS = prompts_of([5, 40, 17, 33])
GREEDY = [exactly(20)] * 4
MIXED = [
    exactly(20),
    SamplingParams(max_tokens=20, temperature=0.9, top_p=0.9, seed=3, ignore_eos=True, logprobs=3),
    SamplingParams(max_tokens=15, temperature=1.2, top_k=20, repetition_penalty=1.2, seed=4, logit_bias={3: 4.0}),
    SamplingParams(max_tokens=9, n=3, temperature=1.0, seed=9, prompt_logprobs=2),
]
TIGHT = {"block_size": 4, "kv_cache_memory": 160 * TOKEN_BYTES, "max_num_seqs": 4}
CASES = [
    ("m1", TINY[0], {"max_num_seqs": 4}),
    ("m3", TINY[1], {**TIGHT, "swap_space": 80 * TOKEN_BYTES}),
    ("m6", TINY[2], {**TIGHT, "prefill_chunk_size": 7, "overlap": True}),
    ("m7", TINY[0], {**TIGHT, "prefill_chunk_size": 7}),
]
ROOT = Path(__file__).parents[2]


def ranks_of(engine: Engine) -> Ranks:
    assert engine.config.ranks is not None
    return engine.config.ranks


def pids(engine: Engine) -> list[int]:
    return [process.pid for process in ranks_of(engine)._processes]


def for_ever(engine: Engine) -> None:
    while True:
        engine.generate(PROMPTS, GREEDY)


def listening() -> int:
    """Sockets of this process, and of its children, that listen."""
    inodes: set[str] = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "status").read_text()
            if f"PPid:\t{os.getpid()}\n" in status or folder.name == str(os.getpid()):
                inodes |= {
                    os.readlink(link)[8:-1] for link in (folder / "fd").iterdir() if "socket:" in os.readlink(link)
                }
        except OSError:
            continue
    table = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "0A" and row[9] in inodes for row in table)


def assert_same(build: Build, stage: str, model: str, options: dict[str, Any], size: int) -> None:
    """Greedy, mixed and again, when prefixes may hit; with an abort between."""
    one, m0 = build(stage, model=model, **options), build("m0", model=model)
    split = build(stage, model=model, tensor_parallel_size=size, **options)
    greedy = tokens(one.generate(PROMPTS, GREEDY))
    if stage != "m7":
        assert greedy == tokens(m0.generate(PROMPTS, GREEDY))
    assert tokens(split.generate(PROMPTS, GREEDY)) == greedy
    split.add_request(PROMPTS[0], exactly(30), request_id="gone")
    split.step()
    split.abort("gone")
    assert [output.finish_reason for output in split.step() if output.request_id == "gone"] == ["abort"]
    mixed, theirs = one.generate(PROMPTS, MIXED), split.generate(PROMPTS, MIXED)
    assert [[s.token_ids for s in o.outputs] for o in theirs] == [[s.token_ids for s in o.outputs] for o in mixed]
    for mine, other in zip(mixed, theirs, strict=True):
        for scores in ("logprobs", "prompt_logprobs"):
            for a, b in zip(getattr(mine, scores) or (), getattr(other, scores) or (), strict=True):
                assert (a is None) == (b is None)
                assert a is None or sorted(a.values()) == pytest.approx(sorted(b.values()), abs=1e-4)
    assert tokens(split.generate(PROMPTS, GREEDY)) == greedy
    assert stage in ("m1", "m2") or split.metrics()["preemptions"]
    assert stage != "m6" or split.metrics()["tokens_saved"]
    share = 0.55 if size == 2 else 0.3
    assert split.runner.model.weights_bytes() <= share * one.runner.model.weights_bytes()
    assert split.runner.attention.kv_bytes() <= 0.5 * one.runner.attention.kv_bytes()
    for engine in (one, split):
        assert_empty(engine)
        engine.close()


@pytest.mark.parametrize(("stage", "model", "options"), CASES, ids=[case[0] for case in CASES])
def test_two_ranks_give_the_same_tokens_from_half_the_bytes(
    build: Build, stage: str, model: str, options: dict[str, Any]
) -> None:
    assert_same(build, stage, model, options, 2)


def projections(engine: Engine) -> list[str]:
    """Their kinds, without the sum over ranks."""
    model = engine.runner.model
    kinds = [model.head] + [getattr(layer, name) for layer in model.layers for name in PROJECTIONS]
    return [type(kind.own if isinstance(kind, RowLinear) else kind).__name__ for kind in kinds]


@pytest.mark.parametrize("stage", ["m6", "m7"])
def test_in_bfloat16_parts_have_the_same_kernels_and_close_results(build: Build, stage: str) -> None:
    scored = SamplingParams(max_tokens=1, prompt_logprobs=0)
    one, two = (build(stage, model=TINY[1], dtype="bf16", tensor_parallel_size=size) for size in (1, 2))
    assert projections(one) == projections(two)
    for whole, split in zip(one.generate(PROMPTS, scored), two.generate(PROMPTS, scored), strict=True):
        pairs = list(zip(whole.prompt_logprobs or (), split.prompt_logprobs or (), strict=True))[1:]
        assert pairs
        for a, b in pairs:
            assert a is not None
            assert b is not None
            assert next(iter(a.values())) == pytest.approx(next(iter(b.values())), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("stage", ["m1", "m2", "m3", "m4", "m5", "m6", "m7"])
def test_four_ranks_everywhere(build: Build, stage: str, model: str) -> None:
    options: dict[str, Any] = {"max_num_seqs": 4}
    if stages.number(stage) >= 3:
        options |= TIGHT
    assert_same(build, stage, model, options, 4)


@pytest.fixture(scope="module")
def pair() -> Any:
    """An engine of two ranks that several tests use. They share the threads."""
    before = torch.get_num_threads()
    with stages.build("m6", model=TINY[0], device="cpu", tensor_parallel_size=2, max_num_seqs=4) as engine:
        engine.generate(PROMPTS, GREEDY)
        assert torch.get_num_threads() == max(1, before // 2)
        yield engine
    assert torch.get_num_threads() == before


def test_a_step_sums_twice_a_layer(pair: Engine) -> None:
    """And once for the embedding; the likeliest token is one more collective, a drawn one two."""
    ranks = ranks_of(pair)
    for params, choice in ((exactly(5), {"likeliest": 1}), (exactly(5, temperature=1.0), {"gather": 1, "first": 1})):
        ranks.counts.clear()
        pair.reset_metrics()
        pair.generate([[1, 2, 3]], params)
        steps = int(pair.metrics()["steps"] or 0)
        assert ranks.counts == {kind: count * steps for kind, count in ({"sum": 2 * 2 + 1} | choice).items()}


def test_a_structure_is_followed_by_rank_0(pair: Engine, build: Build) -> None:
    pytest.importorskip("llguidance")
    from common.sampling.structure import Structures
    from tests.test_structure import EOS, bytes_tokenizer, set_eos

    one, outputs = build("m6", model=TINY[0], max_num_seqs=4), list[list[list[int]]]()
    params = [SamplingParams(max_tokens=30, regex="[A-Z]{4}-[0-9]{9}", temperature=t, seed=1) for t in (0.0, 1.0)]
    for engine in (one, pair):
        set_eos(engine, EOS)
        engine.tokenizer = bytes_tokenizer()
        engine._admission.structures = Structures(engine.tokenizer, 512, [EOS])
        outputs.append(tokens(engine.generate([[1, 2, 3], [4, 5]], params)))
    assert outputs[0] == outputs[1]


def test_ctrl_c_takes_effect_between_steps(pair: Engine) -> None:
    wanted = tokens(pair.generate(PROMPTS, GREEDY))
    for delay in (0.02, 0.05, 0.11):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for_ever(pair)
        assert tokens(pair.generate(PROMPTS, GREEDY)) == wanted


@pytest.mark.parametrize(
    ("sent", "when", "said"),
    [
        (signal.SIGKILL, "in a step", r"rank 1 died \(SIGKILL\)"),
        (signal.SIGKILL, "idle", r"rank 1 died \(SIGKILL\)"),
        (signal.SIGSTOP, "in a step", "a rank did not answer"),
    ],
)
def test_a_lost_rank_ends_the_engine_in_one_line(
    build: Build, monkeypatch: pytest.MonkeyPatch, sent: signal.Signals, when: str, said: str
) -> None:
    before = listening()
    engine = build("m6", model=TINY[0], tensor_parallel_size=2, max_num_seqs=4)
    assert listening() > before
    [pid] = pids(engine)
    ranks_of(engine).patience = parallel.timedelta(seconds=1)
    if when == "idle":
        os.kill(pid, sent)
        time.sleep(0.1)
    else:
        engine.generate(PROMPTS, GREEDY)
        threading.Timer(0.1, os.kill, (pid, sent)).start()
    begin = time.monotonic()
    with pytest.raises(UserError, match=said) as caught:
        for_ever(engine)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begin < 8
    with pytest.raises(UserError, match=said):
        engine.generate(PROMPTS, GREEDY)
    assert not Path(f"/proc/{pid}").exists()
    assert listening() == before
    engine.close()


def test_what_only_another_rank_refuses_is_said() -> None:
    config = EngineConfig(model=TINY[0], device="cpu", tensor_parallel_size=2, max_num_seqs=4)
    with pytest.raises(UserError, match=r"^rank 1: UserError: no memory here: free some: build a new engine$"):
        on_ranks(one_rank_fails.build)(config)


def test_one_rank_is_the_ordinary_path(build: Build) -> None:
    engine = build("m6", model=TINY[0], tensor_parallel_size=1)
    assert engine.config.ranks is None
    assert type(engine.runner).__name__ == "Runner"
    assert not torch.distributed.is_initialized()


def test_what_cannot_be_split_is_refused_before_anything_starts(build: Build) -> None:
    for stage, model, size, said in (
        ("m0", TINY[0], 2, "m0 has no option 'tensor_parallel_size': it arrives with m1"),
        ("m6", TINY[0], 3, "4 attention heads and 2 KV heads cannot be divided over tensor_parallel_size=3 ranks"),
        ("m6", TINY[0], 0, "tensor_parallel_size must be a whole number"),
    ):
        with pytest.raises(UserError, match=said):
            build(stage, model=model, tensor_parallel_size=size)
    with pytest.raises(UserError, match=r"build the engine by stages\.build"):
        build_m6(EngineConfig(model=TINY[0], device="cpu", tensor_parallel_size=2))


def children_of(pid: int) -> list[int]:
    """Of all its threads."""
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


def run(*words: str, **options: Any) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, **(pipes | options))


GENERATE = (
    "-m stages.m6_prefix_caching generate --model random:tiny-llama --device cpu --dtype fp32 --token-ids 1,2,3,4"
)


@pytest.mark.slow
def test_torchrun_over_two_nodes(build: Build) -> None:
    start = "-m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port 29745"
    words = f"{GENERATE} --tensor-parallel-size 2 --max-tokens 12".split()
    nodes = [run(*start.split(), "--node-rank", str(node), *words) for node in (1, 0)]
    other, first = (node.communicate(timeout=120) for node in nodes)
    assert [node.returncode for node in nodes] == [0, 0]
    expected = build("m6", model=TINY[0]).generate([[1, 2, 3, 4]], SamplingParams(max_tokens=12))[0].token_ids
    assert [int(word) for word in first[0].split()] == expected
    assert other[0] == ""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_when_rank_0_ends_no_process_is_left(sent: signal.Signals) -> None:
    options = "--tensor-parallel-size 2 --max-tokens 500 --ignore-eos --max-num-seqs 1"
    process = run(*f"{GENERATE} {options}".split(), *["1 2"] * 100)
    deadline, children = time.monotonic() + 60, list[int]()
    while not children and time.monotonic() < deadline:
        children = children_of(process.pid)
        time.sleep(0.1)
    time.sleep(4)  # it is at work
    process.send_signal(sent)
    _, errors = process.communicate(timeout=30)
    assert children
    time.sleep(1)
    left = [path for child in children if (path := Path(f"/proc/{child}/cmdline")).exists() and path.read_bytes()]
    assert not left  # a process that has ended, and that nobody has waited for, has no words left
    if sent == signal.SIGINT:
        assert process.returncode == 130
        assert errors.strip() == "interrupted"


@pytest.mark.slow
def test_a_server_whose_rank_dies_ends_with_one_line() -> None:
    words = GENERATE.replace("generate", "serve").replace(" --token-ids 1,2,3,4", " --tensor-parallel-size 2 --port 0")
    server = run(*words.split())
    assert server.stdout is not None
    assert "/v1" in server.stdout.readline()
    [child] = children_of(server.pid)
    os.kill(child, signal.SIGKILL)
    _, errors = server.communicate(timeout=20)
    assert server.returncode == 2
    assert errors.splitlines()[-1] == "error: rank 1 died (SIGKILL): build a new engine"
    assert "Traceback" not in errors


def test_a_profile_shows_communication(pair: Engine) -> None:
    from benchmarks.profile_parts import COMMUNICATION, LINEAR
    from benchmarks.profile_ranges import named_parts

    entered: list[str] = []

    @contextmanager
    def around(name: str) -> Generator[None]:
        entered.append(name)
        yield

    with named_parts(pair, around):
        pair.generate([[1, 2, 3]], exactly(2))
    assert entered.count(COMMUNICATION) == 2 * (5 * 2 + 1)  # a sum gathers, and the likeliest token does
    assert entered[entered.index(LINEAR) :].count(COMMUNICATION) > 0


@pytest.mark.slow
def test_the_comparison_with_one_device(tmp_path: Path) -> None:
    words = ["-m", "benchmarks", "parallel", "--quick", "--model", "random:tiny-llama", "--json"]
    done = run(*words, str(tmp_path / "parallel.json"))
    assert done.communicate(timeout=120)[1] == ""
    records = json.loads((tmp_path / "parallel.json").read_text())["records"]
    assert [(r["workload"], r["ranks"]) for r in records] == [("single", 1), ("single", 2), ("mixed", 1), ("mixed", 2)]
    for one, two in zip(records[::2], records[1::2], strict=True):
        assert (one["communication_share"], one["collectives_per_step"]) == (0, 0)
        assert 0 < two["communication_share"] < 1
        assert two["collectives_per_step"] == 6
        assert two["weights_bytes"] <= 0.55 * one["weights_bytes"]
        assert two["kv_pool_bytes"] <= 0.55 * one["kv_pool_bytes"]
