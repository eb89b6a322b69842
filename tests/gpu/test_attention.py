"""The attention backends, compiled and on a GPU, over the lengths, offsets, groups and formats of TRAPS.md."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stages.m4_flash_attention.fast import select
from stages.m4_flash_attention.fast.backends import AttentionShape, Backend
from stages.m4_flash_attention.fast.kernels import triton_config
from tests.m4.cases import HEADS, LENGTHS, STEPS, TOLERANCE, Case, check_fused_qkv, make_case, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

NAMES = ("triton", "torch", "flash_attn")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def backend_for(name: str, case: Case) -> Backend:
    if name == "flash_attn" and (reason := select.module_of(name).why_not(case.shape)):
        pytest.skip(f"flash_attn: {reason}")
    return select.choose(name, case.shape).backend


def poison(name: str) -> float:
    return torch.nan if name == "triton" else 1e4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("step", STEPS)
def test_attention_is_right_at_every_length(name: str, step: str, head_dim: int, dtype: torch.dtype) -> None:
    """Must not be right at one length and wrong at another."""
    case = make_case(STEPS[step], head_dim=head_dim, dtype=dtype, device="cuda", poison=poison(name))
    case.check(backend_for(name, case))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_query_head_reads_the_keys_of_its_own_group(
    name: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    case = make_case([(1, 35), (1, 16), (20, 50)], heads, dtype=dtype, device="cuda", poison=poison(name))
    case.check(backend_for(name, case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize("length", [*LENGTHS, 255, 256, 257, 5000])
def test_fused_qkv_gives_the_same_numbers(length: int, head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([(1, length)], head_dim=head_dim, dtype=dtype, device="cuda")
    check_fused_qkv(case, backend_for("triton", case), normalised=head_dim != 64)


@pytest.mark.parametrize("heads", [(16, 8), (9, 3), (14, 2)])
@pytest.mark.parametrize("length", [1, 129, 1000])
def test_fused_qkv_of_any_group_gives_the_same_numbers(length: int, heads: tuple[int, int]) -> None:
    case = make_case([(1, length)], heads, 128, dtype=torch.bfloat16, device="cuda")
    check_fused_qkv(case, backend_for("triton", case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "head_dim"), [((16, 8), 128), ((9, 3), 64), ((4, 2), 16)])
@pytest.mark.parametrize("decodes", [1, 7, 47, 48, 130])
def test_fused_qkv_of_several_sequences_gives_the_same_numbers(
    decodes: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> None:
    """With prompts and without, on both sides of what counts as many."""
    chunks = [(1, 1 + 37 * i % 500) for i in range(decodes)]
    for prompts in ([], [(40, 100), (3, 3)]) if decodes > 1 else ([(40, 100)],):
        case = make_case(chunks + prompts, heads, head_dim, dtype=dtype, device="cuda")
        check_fused_qkv(case, backend_for("triton", case), normalised=head_dim != 64)


@pytest.mark.parametrize("head_dim", [16, 32, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_is_right_at_head_dimensions_other_than_64_and_128(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([(1, 35), (1, 16), (150, 300)], head_dim=head_dim, dtype=dtype, device="cuda")
    case.check(backend_for("triton", case))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("block_size", [1, 8, 64, 256])
def test_attention_is_right_at_block_sizes_other_than_16(name: str, block_size: int) -> None:
    chunks = [(1, 70), (1, 1), (1, 640), (40, 100), (5, 5)]
    case = make_case(chunks, block_size=block_size, dtype=torch.bfloat16, device="cuda", poison=poison(name))
    case.check(backend_for(name, case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_attention_is_right_for_prompts_longer_than_the_table_of_tiles(dtype: torch.dtype) -> None:
    case = make_case([(1, 5000), (2100, 4100), (3000, 3000)], (8, 4), 128, dtype=dtype, device="cuda")
    case.check(backend_for("triton", case))


def test_attention_is_right_for_so_many_queries_that_their_tiles_are_larger() -> None:
    """196,608 of all heads together; some programs are only half full, and those behind the last have no work."""
    case = make_case([(2100, 4100)] + [(130, 130)] * 79 + [(7, 300)], (16, 8), 128, dtype=torch.bfloat16, device="cuda")
    assert len(case.q) * 16 >= triton_config.ENOUGH_QUERIES
    case.check(backend_for("triton", case))


def test_graph_captured_at_one_length_is_right_at_others() -> None:
    """Captured once with padded rows, replayed with other lengths, tables and tokens in the same tensors."""
    lengths = [[(1, 500), (1, 3), (1, 77)], [(1, 16), (1, 900), (1, 1)], [(1, 1000), (1, 1000), (1, 1000)]]
    cases = [make_case(chunks, (16, 8), 128, dtype=torch.bfloat16, device="cuda", padded_rows=2, seed=i)
             for i, chunks in enumerate(lengths)]  # fmt: skip
    width = max(case.batch.block_tables.shape[1] for case in cases)  # pyright: ignore[reportOptionalMemberAccess]
    blocks = max(case.kv.shape[1] for case in cases)
    kv = torch.zeros(2, blocks, *cases[0].kv.shape[2:], dtype=torch.bfloat16, device="cuda")
    q, k, v = (x.clone() for x in (cases[0].q, cases[0].k, cases[0].v))
    tables = torch.zeros(5, width, dtype=torch.int32, device="cuda")
    slots = torch.zeros(5, dtype=torch.int64, device="cuda")
    seq_lens = torch.zeros(5, dtype=torch.int32, device="cuda")
    batch = dataclasses.replace(
        cases[0].batch, block_tables=tables, slot_mapping=slots, seq_lens=seq_lens, max_seq_len=1024
    )
    backend = select.choose("triton", cases[0].shape).backend
    backend.begin(batch)
    backend.store(kv, k, v)
    backend.attend(q, kv)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.store(kv, k, v)
        out = backend.attend(q, kv)
    for case in cases:
        step = case.batch
        assert step.block_tables is not None
        assert step.slot_mapping is not None
        kv.fill_(torch.nan)
        kv[:, : case.kv.shape[1]] = case.kv
        tables.zero_()
        tables[:, : step.block_tables.shape[1]] = step.block_tables
        sources = (step.slot_mapping, step.seq_lens, case.q, case.k, case.v)
        for target, source in zip((slots, seq_lens, q, k, v), sources, strict=True):
            target.copy_(source)
        graph.replay()
        error = relative_error(out, case.expected)
        assert error < TOLERANCE[torch.bfloat16], f"off by {error}"


def test_auto_on_a_gpu_takes_our_kernels() -> None:
    shape = AttentionShape(16, 8, 128, 16, torch.bfloat16, torch.device("cuda"))
    assert select.choose("auto", shape).name == "triton"
