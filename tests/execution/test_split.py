"""What a rank holds and reads of a model, without any other rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

from common import EngineConfig, SamplingParams, UserError
from common.execution.parallel.ranks import Ranks
from common.execution.parallel.runner import PlanReader, PlanWriter
from common.execution.parallel.split import Split, SplitSource
from common.models.load import open_source
from common.models.sources.hf_folder import HFFolder
from common.models.sources.random_weights import PRESETS
from common.models.weights import ModelSource, tensor_shapes
from common.plan import Chunk, StepPlan
from common.request import Request
from stages.m6_prefix_caching.engine import build as build_m6
from stages.m7_gptq.checkpoint.model import open_checkpoint
from tests.conftest import TINY
from tests.engine_checks import exactly, prompts_of, tokens
from tests.fake_graphs import FakeRecorder, fake_graphs  # noqa: F401
from tests.helpers import freeze
from tests.m7 import gptq_writer
from tests.models import gguf_writer, reference

Open = Callable[[], ModelSource]


def whole(source: ModelSource) -> dict[str, torch.Tensor]:
    return {name: source.read(name, shape).float() for name, shape in tensor_shapes(source.config).items()}


def assert_parts_make_the_whole(open_one: Open, size: int) -> None:
    """Each number of the whole is on a rank, at its place; what is on several is a norm or a KV head."""
    full, split = whole(open_one()), Split(open_one().config, 0, size)
    parts = [whole(SplitSource(open_one(), replace(split, rank=rank))) for rank in range(size)]
    for name, tensor in full.items():
        places = [replace(split, rank=rank).part(name) for rank in range(size)]
        assert all(torch.equal(part[name], tensor[place]) for place, part in zip(places, parts, strict=True))
        assert bool(places[0]) != ("norm" in name)
        if not places[0]:
            continue
        count = tensor.shape[len(places[0]) - 1]
        covered = [number for place in places for number in range(count)[place[-1]]]
        assert sorted(set(covered)) == list(range(count))
        shared = size > split.whole.num_kv_heads and name.split(".")[-2] in ("k_proj", "v_proj")
        assert shared or len(set(covered)) == len(covered)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", TINY)
def test_random_weights_are_the_same_numbers(model: str, size: int) -> None:
    assert_parts_make_the_whole(lambda: open_source(model), size)


def test_a_rank_reads_only_its_part_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = freeze(TINY[1], tmp_path)
    assert_parts_make_the_whole(lambda: open_source(folder), 2)
    source = HFFolder(tmp_path)
    source.check()
    asked: list[str] = []

    class File:
        def __init__(self, file: Any) -> None:
            self.file = file

        def get_tensor(self, name: str) -> torch.Tensor:
            asked.append(name)
            return self.file.get_tensor(name)

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)

    monkeypatch.setattr(source, "_files", {name: File(file) for name, file in source._files.items()})
    whole(SplitSource(source, Split(source.config, 1, 2)))
    assert asked
    assert all("norm" in name for name in asked)


@pytest.mark.parametrize("case", ["llama, 3 queries a KV head", "qwen2, tied"])
def test_a_gguf_file_in_parts(tmp_path: Path, case: str) -> None:
    gguf_writer.write(reference.make(case), tmp_path / "model.gguf")
    assert_parts_make_the_whole(lambda: open_source(str(tmp_path / "model.gguf")), 2)


def test_a_quantised_gguf_file_in_parts_that_cut_its_blocks() -> None:
    from common.models.sources.embedded import find_gguf
    from common.models.sources.gguf_file import GGUFFile

    name, source = "model.layers.0.mlp.down_proj.weight", GGUFFile(find_gguf())
    full = source.read(name, tensor_shapes(source.config)[name])
    for rank in range(2):
        part = slice(None), slice(17 + 700 * rank, 700 + 800 * rank)
        assert torch.equal(source.read(name, tuple(full.shape), part), full[part])


@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_gptq_layers_are_split_along_groups(tmp_path: Path, group_size: int) -> None:
    case = gptq_writer.Case(
        {"group_size": group_size, "sym": False}, {".*": {**gptq_writer.BASE, "sym": False, "group_size": group_size}}
    )
    folder = str(gptq_writer.write(tmp_path, case))
    assert_parts_make_the_whole(lambda: open_source(folder), 2)
    source = open_source(folder)
    assert hasattr(source, "quantized")
    for rank in range(4):
        split = Split(source.config, rank, 4)
        for kind in ("o_proj", "down_proj", "q_proj", "up_proj"):
            name = f"model.layers.1.{'mlp' if kind in ('down_proj', 'up_proj') else 'self_attn'}.{kind}"
            own = source.quantized(name, split.part(f"{name}.weight"))  # type: ignore[attr-defined]
            full = source.quantized(name).dequantize()  # type: ignore[attr-defined]
            assert torch.equal(own.dequantize(), full[split.part(f"{name}.weight")])
            assert own.qweight.numel() * 4 == source.quantized(name).qweight.numel()  # type: ignore[attr-defined]


def test_act_order_across_ranks_is_refused_by_name(tmp_path: Path) -> None:
    act_order = {**gptq_writer.BASE, "desc_act": True}
    folder = str(gptq_writer.write(tmp_path, gptq_writer.Case({"desc_act": True}, {".*": act_order})))
    config, source = EngineConfig(model=folder, device="cpu"), open_source(folder)
    config.ranks = type("Fake", (), {"split": Split(source.config, 0, 2)})()
    read = open_checkpoint(config, source).read
    with pytest.raises(UserError, match=r"down_proj: .*act-order \(desc_act\).*tensor_parallel_size"):
        read(["model.layers.0.mlp.down_proj"], False)
    assert read(["model.layers.0.mlp.up_proj"], False)[0] is not None  # its outputs can be split


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("heads", [(9, 3), (4, 2), (16, 8), (14, 2), (32, 8), (12, 12), (8, 1)])
def test_any_split_keeps_whole_groups_of_heads_or_is_refused(heads: tuple[int, int], size: int) -> None:
    config = replace(PRESETS["tiny-llama"], num_heads=heads[0], num_kv_heads=heads[1], vocab_size=515)
    try:
        splits = [Split(config, rank, size) for rank in range(size)]
    except UserError as error:
        named = "tensor_parallel_size" in str(error)
    else:
        named = None
    if named is not None:
        assert named
        assert size > heads[1]
        assert size % heads[1] or heads[0] % size
        return
    parts = [split.config for split in splits]
    assert sum(part.num_heads for part in parts) == heads[0]
    assert sum(part.vocab_size for part in parts) == 515
    assert sum(part.intermediate_size for part in parts) == config.intermediate_size
    for split, part in zip(splits, parts, strict=True):
        group = heads[0] // heads[1]
        own = [row // config.head_dim // group for row in range(config.head_dim * heads[0])[split.held["q_proj"]]]
        assert sorted(set(own)) == list(range(*split.kv_heads(split.rank)))
        rows = config.head_dim * part.num_heads // part.num_kv_heads
        assert [own.count(head) for head in set(own)] == [rows] * part.num_kv_heads
    assert sum(split.share(1000) for split in splits) <= 1000


def test_a_plan_arrives_as_it_was_sent_and_small() -> None:
    """Over steps in which tables grow, are replaced, and slots change hands."""
    writer, reader = PlanWriter(2, 512), PlanReader()
    a, b, c = (Request(name, list(range(100)), exactly(9), frozenset(), 5, 0.0) for name in "abc")
    tables = {"a": list(range(7)), "b": [9], "c": [1, 2]}
    sizes: list[int] = []
    for step, (first, second) in enumerate([(a, b), (a, b), (a, b), (c, b), (a, c)]):
        plan = StepPlan(
            [Chunk(r, 90 + step, 11, tables[r.id]) for r in (first, second)], swap_out=[(step, 1)], copies=[(2, 3)]
        )
        message = writer.write(plan)
        sizes.append(len(message))
        found = reader.read(message)
        assert (found.swap_out, found.swap_in, found.copies) == (plan.swap_out, [], plan.copies)
        for mine, theirs in zip(plan.chunks, found.chunks, strict=True):
            assert theirs.request.token_ids == mine.request.token_ids
            assert theirs.request is not mine.request
            assert (theirs.start, theirs.length, list(theirs.block_table)) == (
                mine.start,
                mine.length,
                mine.block_table,
            )
            assert theirs.waits_for_token == mine.waits_for_token
        for request in (first, second):
            request.token_ids.append(step)
            tables[request.id] = [*tables[request.id], 50 + step] if step != 1 else [8, *tables[request.id][1:]]
    assert sizes[2] < 120


def test_a_split_model_in_cuda_graphs(fake_graphs: type[FakeRecorder]) -> None:  # noqa: F811
    """One rank, over gloo: what it draws comes from the collectives, inside of the graphs."""
    options: dict[str, Any] = {"model": TINY[2], "device": "cpu", "max_num_seqs": 3, "max_num_batched_tokens": 64}
    alone = build_m6(EngineConfig(**options, cuda_graphs=False))
    config = EngineConfig(**options)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    config.ranks = Ranks(Split(PRESETS["tiny-qwen3"], 0, 1), store, torch.device("cpu"))
    params = [exactly(12), SamplingParams(max_tokens=12, temperature=0.8, top_k=30, seed=2, logprobs=2), exactly(7)]
    with alone, build_m6(config) as split:
        for wanted in (params, [exactly(12)] * 3):
            assert tokens(split.generate(prompts_of([5, 30, 70]), wanted)) == tokens(
                alone.generate(prompts_of([5, 30, 70]), wanted)
            )
    assert FakeRecorder.replays
    assert set(config.ranks.counts) == {"sum", "gather", "likeliest", "first"}
