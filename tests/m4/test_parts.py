"""How the Triton kernels cut contexts into parts, and put them together again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from stages.m4_flash_attention.fast.kernels import triton_decode, triton_decode_fused_qkv
from stages.m4_flash_attention.fast.kernels.triton_parts import Workspace, find_part, padded_count
from tests.depth import DEEP
from tests.m4.cases import check_fused_qkv, make_case
from tests.m4.test_backends import create


@triton.jit
def parts_kernel(rows, context, found, TARGET: tl.constexpr):
    number, index = tl.program_id(0), tl.arange(0, 16)
    sequence, part, count, tiles, before = find_part(tl.load(rows + index), tl.load(context + index), number, TARGET)
    tl.store(found + number * 5 + 0, sequence)
    tl.store(found + number * 5 + 1, part)
    tl.store(found + number * 5 + 2, count)
    tl.store(found + number * 5 + 3, tiles)
    tl.store(found + number * 5 + 4, before)


@cache
def parts(name: str, target: int) -> list[list[int]]:
    """What each program finds in that work, those that find nothing left out."""
    work = WORK[name]
    rows, context = torch.tensor(work + [(0, 0)] * (16 - len(work)), dtype=torch.int32).T.contiguous()
    found = torch.full((target + int(rows.sum()), 5), -1, dtype=torch.int32)
    kernel: Any = parts_kernel[(len(found),)]
    kernel(rows, context, found, target)
    return [row for row in found.tolist() if row[0] < 16]


WORK = {
    "one": [(1, 1)],
    "one long": [(1, 640)],
    "without tokens": [(1, 0), (1, 5), (1, 0)],
    "alike": [(1, 16)] * 16,
    "a long one among short ones": [(1, 1), (1, 500), (1, 1), (1, 44)],
    "the long one first": [(1, 500), (1, 1)],
    "short chunks": [(1, 130), (3, 7), (2, 64)],
    "missing prompts": [(0, 1), (4, 300), (0, 1), (1, 2), (0, 1)],
    "a long prompt": [(32, 64)],
}
"""Rows and context of each sequence."""
if DEEP:
    WORK["a longer prompt"] = [(64, 128)]
TARGETS = (1, 3, 7, 28, 40) if DEEP else (1, 7, 28)  # 28: "alike" makes more parts than that


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WORK)
def test_every_tile_belongs_to_exactly_one_part(name: str, target: int) -> None:
    work = WORK[name]
    found = parts(name, target)
    share = max(1, -(-sum(rows * context for rows, context in work) // target))
    cuts = [max(1, (context + share // 2) // share) for _, context in work]
    wanted = [(s, p, cuts[s], -(-work[s][1] // cuts[s])) for s, (rows, _) in enumerate(work)
              for p in range(rows * cuts[s])]  # fmt: skip
    assert [tuple(row[:4]) for row in found] == wanted


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", WORK)
def test_every_part_writes_to_a_place_of_its_own_in_the_workspace(name: str, target: int) -> None:
    """Two must not write to the same place, and none behind the workspace."""
    places = [before + part for _, part, count, _, before in parts(name, target) if count > 1]
    assert len(set(places)) == len(places)
    assert all(0 <= place < 2 * target for place in places)


CUT = {
    "decode": [(1, 333), (1, 2), (1, 1), (1, 90)],
    "prefill": [(40, 333), (2, 2), (3, 150), (70, 90), (70, 70)] if DEEP else [(40, 77), (2, 2), (70, 70)],
}
"""The first 64 of 70 queries over 70 keys see nothing of the last part."""


@pytest.mark.parametrize("target", [1, 5, 64 if DEEP else 12], ids=["uncut", "some cut", "a part for each tile"])
@pytest.mark.parametrize(
    ("kind", "heads", "merged"),
    [("decode", (6, 2), 1024), ("prefill", (4, 2), 1024)]
    + [("decode", (9, 3), 1024), ("prefill", (6, 2), 1024), ("prefill", (9, 3), 1024)] * DEEP
    + [("decode", (6, 2), triton_decode.MERGED), ("decode", (9, 3), triton_decode.MERGED)] * DEEP,
)
def test_parts_lose_no_token_and_read_only_what_was_written(
    kind: str, target: int, heads: tuple[int, int], merged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1,024 numbers merged at a time these are four parts, of six."""
    monkeypatch.setattr(triton_decode, "MERGED", merged)
    case = make_case(CUT[kind], heads, padded_rows=kind == "decode")
    backend = create("triton", case)
    kernel: Any = getattr(backend, f"_{kind}")
    rows = kernel.workspace.acc.shape[0] // len(kernel.workspace.arrived)
    kernel.workspace = Workspace(target, heads[kind == "decode"], rows, 64, torch.device("cpu"))
    kernel.programs = 1 << 20  # prompts are cut until they have this many
    kernel.smallest_part = 1
    for tensor in kernel.workspace.tensors()[:3]:
        tensor.fill_(torch.nan)
    case.check(backend)
    assert not kernel.workspace.arrived.any(), "the next layer would start with these"


LONG, MANY = (333, 12) if DEEP else (141, 6)
FUSED_QKV = [(length, parts) for length in (1, 32, 33, 97, LONG) for parts in (1, 3, MANY)
             if DEEP or parts < MANY or length == LONG]  # fmt: skip
"""(length, parts). More parts than tiles are as many parts as tiles."""


@pytest.mark.parametrize("merged", [512] + [triton_decode_fused_qkv.MERGED] * DEEP)
@pytest.mark.parametrize(("length", "parts"), FUSED_QKV)
def test_parts_of_fused_qkv_lose_no_token_and_read_only_what_was_written(
    length: int, parts: int, merged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 512 numbers merged at a time these are four parts, of up to five (or eleven)."""
    monkeypatch.setattr(triton_decode_fused_qkv, "MERGED", merged)
    case = make_case([(1, length)], (4, 2), 128)
    backend = create("triton", case)
    kernel: Any = backend._fused_qkv  # pyright: ignore[reportAttributeAccessIssue]
    kernel.config, kernel.parts = kernel.config | {"TILE": 32}, parts
    kernel.workspace = Workspace(parts, 4, 1, 128, torch.device("cpu"))
    for tensor in kernel.workspace.tensors()[:3]:
        tensor.fill_(torch.nan)
    check_fused_qkv(case, backend)  # two steps
    assert not kernel.workspace.arrived.any(), "the next layer would start with these"


@pytest.mark.parametrize(("sequences", "size"), [(1, 1), (2, 16), (16, 16), (17, 64), (256, 256), (257, 1024)])
def test_the_padded_count_is_enough_for_all_sequences(sequences: int, size: int) -> None:
    assert padded_count(sequences) == size
