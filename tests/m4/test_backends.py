"""Every backend that runs on a CPU, over the lengths, offsets, groups and formats at which attention goes wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from stages.m4_flash_attention.fast import select
from stages.m4_flash_attention.fast.backends import Backend
from tests.depth import DEEP
from tests.m4.cases import (
    HEADS,
    LENGTHS,
    SHORT_STEPS,
    STEPS,
    TOLERANCE,
    Case,
    check_fused_qkv,
    make_case,
    relative_error,
)

BACKENDS = tuple(name for name in select.NAMES if name != "flash_attn")  # which needs a GPU: test_library_calls


def poison(name: str) -> float:
    """PyTorch's own kernels read what they mask, as m3 does; the cache begins as zeros, so it never holds a NaN."""
    return 1e4 if name == "torch" else torch.nan


def create(name: str, case: Case) -> Backend:
    return select.module_of(name).create(case.shape)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
def test_attention_is_right_at_every_length(name: str, step: str) -> None:
    """Must not be right at one length and wrong at another."""
    steps = STEPS if DEEP or name != "triton" else SHORT_STEPS
    case = make_case(steps[step], poison=poison(name))
    case.check(create(name, case))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("heads", HEADS)
def test_every_query_head_reads_the_keys_of_its_own_group(name: str, heads: tuple[int, int]) -> None:
    case = make_case([(1, 35), (1, 16), (20, 50)], heads, poison=poison(name))
    case.check(create(name, case))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("head_dim", [16, 32, 128])
def test_attention_is_right_at_head_dimensions_other_than_64(name: str, head_dim: int) -> None:
    case = make_case([(1, 35), (1, 16), (20, 50)], head_dim=head_dim, poison=poison(name))
    case.check(create(name, case))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float16) for name in BACKENDS]
    # Triton's interpreter does not compute in bfloat16: tests/gpu does.
    + [(name, torch.bfloat16) for name in BACKENDS if name != "triton"],
)
def test_attention_is_right_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Must not sum in half precision."""
    case = make_case([(1, 200), (1, 16), (40, 90)], dtype=dtype, poison=poison(name))
    case.check(create(name, case))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("block_size", [1, 3, 8, 64, 256])
def test_attention_is_right_at_block_sizes_other_than_16(name: str, block_size: int) -> None:
    case = make_case([(1, 70), (1, 1), (1, 64), (40, 100), (5, 5)], block_size=block_size, poison=poison(name))
    case.check(create(name, case))


@pytest.mark.parametrize("name", BACKENDS)
def test_padded_rows_of_a_graph_leave_the_others_right(name: str) -> None:
    case = make_case([(1, 50), (1, 3)], padded_rows=3, poison=poison(name))
    result = case.run(create(name, case))
    torch.testing.assert_close(result[:2].double(), case.expected[:2], atol=2e-5, rtol=0)
    assert result.isfinite().all() or name == "torch"


@pytest.mark.parametrize("name", [name for name in BACKENDS if select.module_of(name).CAPTURABLE])
def test_room_for_more_prompts_and_tokens_leaves_the_others_right(name: str) -> None:
    """A graph captured for more: five sequences without a token, and 60 padding rows behind the last prompt."""
    case = make_case([(1, 50), (64, 64), (65, 100), (3, 3)], padded_rows=2, poison=poison(name))
    rows, batch = len(case.q), case.batch
    case.q, case.k, case.v = (torch.cat([x, torch.full_like(x[:60], torch.nan)]) for x in (case.q, case.k, case.v))
    pad = torch.nn.functional.pad
    batch.query_start_loc = pad(batch.query_start_loc, (0, 5), value=rows)
    batch.seq_lens = pad(batch.seq_lens, (0, 5), value=1)
    batch.slot_mapping, batch.block_tables = pad(batch.slot_mapping, (0, 60)), pad(batch.block_tables, (0, 0, 0, 5))
    batch.max_query_len = 192
    result = case.run(create(name, case))[:rows]
    torch.testing.assert_close(result.double(), case.expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_large_scores_never_overflow_the_softmax(name: str) -> None:
    case, reference = (make_case([(1, 80), (30, 60)], poison=1e4) for _ in range(2))
    case.q.mul_(60)
    reference.q.mul_(60)
    result = case.run(create(name, case))
    expected = reference.run(create("naive", reference))
    assert result.isfinite().all()
    torch.testing.assert_close(result, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", BACKENDS)
def test_store_writes_into_its_own_slots_only(name: str) -> None:
    case = make_case([(1, 35), (1, 16), (20, 50)])
    before = case.kv.clone()
    backend = create(name, case)
    backend.begin(case.batch)
    backend.store(case.kv, case.k, case.v)
    slots = case.batch.slot_mapping
    for half, old, new in zip(case.kv, before, (case.k, case.v), strict=True):
        assert torch.equal(half.flatten(0, 1)[slots], new)
        untouched = torch.ones(half.shape[0] * half.shape[1], dtype=torch.bool)
        untouched[slots] = False
        assert torch.equal(half.flatten(0, 1)[untouched].nan_to_num(7), old.flatten(0, 1)[untouched].nan_to_num(7))


FUSED_QKV = [(length, True) for length in LENGTHS if DEEP or length <= 300] + [
    (length, False) for length in LENGTHS if DEEP or length in (1, 65, 129)
]
"""(length, with norms of the heads): 300 is several parts, one of several tiles; 129 a part of one token."""


@pytest.mark.parametrize(("length", "normalised"), FUSED_QKV)
def test_fused_qkv_gives_the_same_numbers(length: int, normalised: bool) -> None:
    """Normalised, rotated, stored and attended to in one kernel."""
    case = make_case([(1, length)])
    check_fused_qkv(case, create("triton", case), normalised)


FUSED_HEADS = [(heads, dim) for heads in HEADS for dim in (16, 32, 128) if DEEP or dim == 32 or heads == (4, 2)]
"""What a group is follows from the head alone, whatever its dimension."""


@pytest.mark.parametrize(("heads", "head_dim"), FUSED_HEADS)
def test_fused_qkv_of_any_group_and_dimension_gives_the_same_numbers(heads: tuple[int, int], head_dim: int) -> None:
    case = make_case([(1, 50)], heads, head_dim, dtype=torch.float16)
    check_fused_qkv(case, create("triton", case))


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_fused_qkv_in_blocks_of_any_size_gives_the_same_numbers(block_size: int) -> None:
    case = make_case([(1, 70)], block_size=block_size)
    check_fused_qkv(case, create("triton", case))


CHUNKS = {
    "one decode": [(1, 40)],
    "decodes": [(1, 70), (1, 1), (1, 16)],
    "a prompt": [(50, 50)],
    "decodes and prompts": [(1, 33), (1, 90), (40, 100), (3, 3)],
}
"""(tokens of the step, context) of each sequence; what is more than `cpu.FEW_TOKENS` is shared among threads."""


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_qkv_on_a_cpu_gives_the_same_numbers(
    chunks: list[tuple[int, int]], normalised: bool, dtype: torch.dtype
) -> None:
    case = make_case(chunks, dtype=dtype)
    check_fused_qkv(case, create("cpu", case), normalised)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("chunks", "heads"),
    [([(1, 20), (1, 1)], (9, 3)), ([(1, 17), (5, 9)], (4, 2)), ([(1, 17), (130, 130)], (9, 3))],
    ids=str,
)
def test_fused_qkv_of_several_sequences_gives_the_same_numbers(
    chunks: list[tuple[int, int]], heads: tuple[int, int], normalised: bool
) -> None:
    """Heads that fill no last program, of few tokens and many; neither a query nor a value may be taken for a key."""
    case = make_case(chunks, heads, head_dim=32)
    check_fused_qkv(case, create("triton", case), normalised)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [32, 96, 128, 256])
def test_fused_qkv_on_a_cpu_of_any_group_and_dimension_gives_the_same_numbers(
    heads: tuple[int, int], head_dim: int
) -> None:
    case = make_case([(1, 50), (4, 20)], heads, head_dim)
    check_fused_qkv(case, create("cpu", case))


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_cpu_threads_rotate_every_token(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.m4_flash_attention.fast.backends import cpu

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for tokens in (33, 34, 40):
        case = make_case([(1, 30), (tokens - 1, 60)])
        check_fused_qkv(case, cpu.create(case.shape))


@pytest.mark.parametrize("head_dim", [16, 48, 80])
def test_the_cpu_kernel_fuses_no_heads_whose_half_is_no_vector(head_dim: int) -> None:
    """It must not rotate them."""
    case = make_case([(1, 20)], head_dim=head_dim)
    backend = create("cpu", case)
    backend.begin(case.batch)
    assert not backend.fuses_qkv()
    case.check(backend)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_cpu_threads_that_cut_a_sequence_lose_no_part(threads: int) -> None:
    from stages.m4_flash_attention.fast.backends.cpu import CpuBackend

    case = make_case([(1, 333), (1, 2), (1, 1), (1, 90), (50, 200)], (6, 2))
    backend = CpuBackend(case.shape)
    backend.begin(case.batch)
    backend._threads = threads
    backend.store(case.kv, case.k, case.v)
    error = (backend.attend(case.q, case.kv).double() - case.expected).abs().max()
    assert error < TOLERANCE[torch.float32]


def test_prompts_in_pairs_of_bfloat16_come_close_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    from common.execution.cpu import simd_products

    if not simd_products.multiplies_bfloat16():
        pytest.skip("this processor multiplies no pairs of bfloat16")
    for head_dim in (16, 48, 64):
        case = make_case([(70, 70), (33, 150)], (9, 3), head_dim, dtype=torch.bfloat16)
        in_pairs = case.run(create("cpu", case))
        with monkeypatch.context() as other:
            other.setattr(simd_products, "multiplies_bfloat16", lambda: False)
            error = relative_error(in_pairs, case.run(create("cpu", case)).double())
        assert 0 < error < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_does_not_depend_on_what_shares_its_step(dtype: torch.dtype) -> None:
    case = make_case([(70, 70), (33, 150)], (9, 3), dtype=dtype)
    backend, together = create("cpu", case), case.run(create("cpu", case))
    step = case.batch
    alone = replace(
        step,
        query_start_loc=step.query_start_loc[1:] - 70,
        seq_lens=step.seq_lens[1:],
        block_tables=step.block_tables[1:],
    )
    backend.begin(alone)
    assert torch.equal(backend.attend(case.q[70:], case.kv), together[70:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_check_of_a_long_context_finds_lost_keys(dtype: torch.dtype) -> None:
    case = make_case([(1, 3000), (40, 1500)], dtype=dtype)
    case.check(create("naive", case))
    table = case.batch.block_tables
    assert table is not None
    for row in (0, 1):
        changed = make_case([(1, 3000), (40, 1500)], dtype=dtype)
        changed.kv[1, table[row, 7]] = 0
        with pytest.raises(AssertionError, match="off by"):
            changed.check(create("naive", changed))


@pytest.mark.parametrize("name", ["torch", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_long_context_loses_no_key(name: str, dtype: torch.dtype) -> None:
    case = make_case([(1, 3000), (1, 2049), (40, 1500)], (9, 3), dtype=dtype, poison=poison(name))
    case.check(create(name, case))


def test_no_backend_is_imported_before_it_is_chosen() -> None:
    program = (
        "import sys, torch\n"
        "from stages.m4_flash_attention.fast import attention, select\n"
        "from stages.m4_flash_attention.fast.backends import AttentionShape\n"
        "shape = AttentionShape(4, 2, 64, 16, torch.float32, torch.device('cpu'))\n"
        "for name in select.NAMES: select.module_of(name).why_not(shape)\n"
        "select.choose('naive', shape)\n"
        "print([m for m in ('numba', 'triton', 'flash_attn') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
