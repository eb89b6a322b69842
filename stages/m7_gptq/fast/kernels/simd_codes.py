"""The product of a few rows and a panel of the weight in bytes: 4- or 8-bit codes times 8-bit activations.

One instruction (VNNI's `vpdpbusd`) multiplies and adds 64 pairs of bytes, where bfloat16's takes 32 pairs of numbers
and the weight is four times as large. AVX2 does the same in three (`vpmaddubsw`, `vpmaddwd`, `vpaddd`). The instruction
wants one side unsigned: the codes, to which a constant is added (`CENTRE`) that the sums of x take away again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from common.execution.cpu.simd import F32, I16, I32, LANES, call, constant, fma, intrinsic, pointer, splat
from common.execution.cpu.simd_products import (
    AHEAD,
    BLOCKS,
    FAR_AHEAD,
    FEW_ROWS,
    FLOATS,
    INTS,
    PANEL,
    Tile,
    features,
    prefetch,
)

# pyright: basic
# Numba and llvmlite carry no types.

GROUP = 32  # inputs of x that share a scale
CODE_BYTES = {4: 256, 8: 512}  # of one vector's outputs and a group of inputs, by the bits of a code
CENTRE = {4: 16, 8: 128}  # what makes a weight's byte unsigned, by the bits of a code

I8 = ir.IntType(8)
BYTES = ir.VectorType(I8, 4 * LANES)


def multiplies_bytes() -> bool:
    """Has it instructions for products of bytes: AVX2 or more?"""
    return "avx2" in features()


def multiplies_whole_bytes() -> bool:
    """Also where the unsigned side has all 8 bits? AVX2 alone adds two products in 16, which overflow."""
    return "avxvnni" in features() or {"avx512vnni", "avx512f"} <= features()


def _dot4(builder: Any, sums: Any, codes: Any, x: Any) -> Any:
    """sums[i] += the 4 bytes of codes[i] (unsigned, up to 31 without VNNI) times the 4 bytes of x[i] (signed)."""
    if {"avx512vnni", "avx512f"} <= features():
        return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS, sums, codes, x, fast=False)
    halves = [[_half(builder, vector, i) for vector in (sums, codes, x)] for i in range(2)]
    parts = [_dot4_of_8(builder, *half) for half in halves]
    return builder.shuffle_vector(*parts, ir.Constant(INTS, list(range(LANES))))


def _half(builder: Any, vector: Any, which: int) -> Any:
    first = which * LANES // 2
    return builder.shuffle_vector(
        vector, vector, ir.Constant(ir.VectorType(I32, LANES // 2), list(range(first, first + LANES // 2)))
    )


def _dot4_of_8(builder: Any, sums: Any, codes: Any, x: Any) -> Any:
    if "avxvnni" in features() or {"avx512vnni", "avx512vl"} <= features():
        return call(builder, "llvm.x86.avx512.vpdpbusd.256", sums.type, sums, codes, x, fast=False)
    as_bytes, pairs = ir.VectorType(I8, 32), ir.VectorType(I16, 16)
    codes, x = builder.bitcast(codes, as_bytes), builder.bitcast(x, as_bytes)
    products = call(builder, "llvm.x86.avx2.pmadd.ub.sw", pairs, codes, x, fast=False)
    added = call(builder, "llvm.x86.avx2.pmadd.wd", sums.type, products, constant(I16, 16, 1), fast=False)
    return builder.add(sums, added)


@intrinsic
def codes_panel(
    _typing: Any, weight: Any, bits: Any, panel: Any, groups: Any, x: Any, row: Any, rows: Any, sums: Any
) -> tuple[Any, Callable[..., Any]]:  # fmt: skip
    """`bf16_panel` in bytes: a weight is (code + offset - CENTRE) * scale, a number of x is byte * scale.

    weight: a tuple of codes, uint8 [panels, groups, BLOCKS, CODE_BYTES[bits]], for 16 outputs 4 inputs of each (of 4
    bits those of the next 4 inputs are the upper halves); offsets, uint8 (none with 8 bits), and scales (float32, or
    int16 for bits of float16), both [panels, groups / per, BLOCKS, 16]; per. bits: a tuple of that length.
    x: bytes, int8 [T, groups * GROUP]; corrections, int32 [T, groups], minus CENTRE times the sum of a group; scales,
    float32 [T, groups].
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight_parts, _, panel, groups, x_parts, row, _, sums = args
        codes, offsets, scales, per = cgutils.unpack_tuple(builder, weight_parts)
        numbers, corrections, x_scales = cgutils.unpack_tuple(builder, x_parts)
        codes_kind, offsets_kind, scales_kind, _ = weight
        tile, code_bytes = Tile(context, builder, rows.count), CODE_BYTES[bits.count]
        number, ahead = tile.number, AHEAD if rows.count <= FEW_ROWS else FAR_AHEAD
        weight_groups = builder.udiv(builder.add(groups, builder.sub(per, number(1))), per)

        def load(array_kind: Any, array: Any, where: Any, kind: Any) -> Any:
            return builder.load(pointer(context, builder, array_kind, array, where, kind), align=1)

        with cgutils.for_range(builder, groups) as loop:
            group = builder.add(builder.mul(panel, groups), loop.index)
            scale_group = builder.add(builder.mul(panel, weight_groups), builder.udiv(loop.index, per))
            lines = [
                builder.add(builder.mul(builder.add(row, number(r)), groups), loop.index) for r in range(rows.count)
            ]
            vectors, factors = [], []
            for j in range(BLOCKS):
                scale = tile.at(number(j * LANES), (scale_group, PANEL))
                stored = FLOATS if scales_kind.dtype == types.float32 else ir.VectorType(ir.HalfType(), LANES)
                factor = load(scales_kind, scales, scale, stored)
                factors.append(factor if stored == FLOATS else builder.fpext(factor, FLOATS))
                add = None
                if bits.count == 4:
                    add = load(offsets_kind, offsets, scale, ir.VectorType(I8, LANES))
                    add = builder.shuffle_vector(
                        add, add, ir.Constant(ir.VectorType(I32, 4 * LANES), [i // 4 for i in range(4 * LANES)])
                    )
                first = tile.at(number(j * code_bytes), (group, BLOCKS * code_bytes))
                found: list[Any] = []
                for line in range(0, code_bytes, 64):
                    where = builder.add(first, number(line))
                    found += _bytes(builder, load(codes_kind, codes, where, BYTES), add)
                    prefetch(context, builder, codes_kind, codes, builder.add(where, number(ahead)))
                vectors.append(found)
            starts = [splat(builder, load(x[1], corrections, line, I32), LANES) for line in lines]
            totals = [[start] * BLOCKS for start in starts]
            for step in range(GROUP // 4):
                for r, line in enumerate(lines):
                    four = splat(builder, load(x[0], numbers, tile.at(number(4 * step), (line, GROUP)), I32), LANES)
                    for j in range(BLOCKS):
                        totals[r][j] = _dot4(builder, totals[r][j], builder.bitcast(vectors[j][step], INTS), four)
            for places, line, row_totals in zip(tile.places, lines, totals, strict=True):
                x_scale = splat(builder, load(x[2], x_scales, line, F32), LANES)
                for place, total, factor in zip(places, row_totals, factors, strict=True):
                    factor = builder.fmul(factor, x_scale)
                    value = fma(builder, builder.sitofp(total, FLOATS), factor, builder.load(place))
                    builder.store(value, place)
        tile.store(signature.args[-1], sums)
        return context.get_dummy_value()

    return types.void(weight, bits, types.intp, types.intp, x, types.intp, rows, sums), generate


def _bytes(builder: Any, packed: Any, offset: Any) -> list[Any]:
    """Vectors of unsigned bytes in the order of their inputs; offset: of 4 bits, else None."""
    if offset is None:
        return [packed]
    low = constant(I8, 4 * LANES, 15)
    shifted = builder.lshr(builder.bitcast(packed, ir.VectorType(I16, 2 * LANES)), constant(I16, 2 * LANES, 4))
    upper = builder.and_(builder.bitcast(shifted, BYTES), low)
    return [builder.add(builder.and_(packed, low), offset), builder.add(upper, offset)]
