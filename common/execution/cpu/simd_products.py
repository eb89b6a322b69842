"""A matrix product in registers: some rows of x times a panel of the weight, in bfloat16.

A panel is `PANEL` outputs with all their inputs. It is stored in the order in which it is read: two vectors, of 16
outputs each, for two inputs at a time, then the next two. So a thread that takes
panel after panel reads one stream from memory. Each vector is multiplied by the same few inputs of every row before the
next one is loaded; the sums of all rows stay in registers. Rows are summed alike, however many share a call.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core import config as numba_config

from common.execution.cpu.simd import DOT_PAIRS, F32, I32, LANES, call, constant, intrinsic, pointer, splat

# pyright: basic
# Numba and llvmlite carry no types.

BLOCKS = 2  # vectors of a panel: 16 outputs each
PANEL = BLOCKS * LANES
UNROLL = 4  # steps of bfloat16 in one turn of the loop
FEW_ROWS = 4  # with more, arithmetic takes longer than reading
AHEAD, FAR_AHEAD = 512, 2048  # bytes: how far in front of the sums of few rows, and of more, weights are asked for

INTS, FLOATS = ir.VectorType(I32, LANES), ir.VectorType(F32, LANES)


def features() -> set[str]:
    """Of the processor that Numba compiles for."""
    given = getattr(numba_config, "CPU_FEATURES", None)
    if given is not None:
        return {feature[1:] for feature in given.split(",") if feature.startswith("+")}
    return {name for name, present in binding.get_host_cpu_features().items() if present}


def multiplies_bfloat16() -> bool:
    """Has it AVX-512's instruction for that? With tiles (AMX) oneDNN's product is faster."""
    return "avx512bf16" in features() and "amx-bf16" not in features()


def rows_at_once() -> int:
    """As many rows as their sums fit into registers, 32 of 512 bits or 16 of 256."""
    return 8 if "avx512f" in features() else 2


class Tile:
    """Sums of `rows` rows and a panel's outputs, one vector each, while a kernel is being emitted."""

    def __init__(self, context: Any, builder: Any, rows: int) -> None:
        self._context, self._builder, self.rows = context, builder, rows
        zero = constant(F32, LANES, 0.0)
        self.places = [[cgutils.alloca_once_value(builder, zero) for _ in range(BLOCKS)] for _ in range(rows)]

    def number(self, value: int) -> Any:
        return self._context.get_constant(types.intp, value)

    def at(self, base: Any, *terms: tuple[Any, int]) -> Any:
        """base + the sum of index * step."""
        builder = self._builder
        for index, step in terms:
            base = builder.add(base, builder.mul(index, self.number(step)))
        return base

    def store(self, array_type: Any, sums: Any) -> None:
        """To sums [rows, PANEL], float32."""
        for r, row in enumerate(self.places):
            for j, place in enumerate(row):
                at = self.number(r * PANEL + j * LANES)
                to = pointer(self._context, self._builder, array_type, sums, at, FLOATS)
                self._builder.store(self._builder.load(place), to, align=4)


@intrinsic
def bf16_panel(_typing: Any, weight: Any, panel: Any, x: Any, row: Any, size: Any, rows: Any, sums: Any) -> Any:
    """sums [rows, PANEL] = x[row : row + rows] @ the panel's weights, transposed.

    weight: [panels, size / 2, BLOCKS, 16, 2], x [T, size], both bits of bfloat16, flat; sums: float32; rows: a tuple as
    long as there are rows.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        weight, panel, x, row, size, _, sums = args
        weight_type, _, x_type, *_, sums_type = signature.args
        tile = Tile(context, builder, rows.count)
        first = builder.mul(builder.mul(panel, size), tile.number(PANEL))
        with cgutils.for_range(builder, builder.udiv(size, tile.number(2 * UNROLL))) as loop:
            for step in range(UNROLL):
                k = tile.at(tile.number(2 * step), (loop.index, 2 * UNROLL))
                weights = []
                for j in range(BLOCKS):
                    where = tile.at(first, (k, PANEL), (tile.number(j), 2 * LANES))
                    weights.append(builder.load(pointer(context, builder, weight_type, weight, where, INTS), align=2))
                    if tile.rows <= FEW_ROWS:
                        prefetch(context, builder, weight_type, weight, tile.at(where, (tile.number(1), AHEAD // 2)))
                for r, places in enumerate(tile.places):
                    where = builder.add(builder.mul(builder.add(row, tile.number(r)), size), k)
                    pair = builder.load(pointer(context, builder, x_type, x, where, I32), align=2)
                    pair = splat(builder, pair, LANES)
                    for place, value in zip(places, weights, strict=True):
                        total = call(builder, DOT_PAIRS, FLOATS, builder.load(place), value, pair, fast=False)
                        builder.store(total, place)
        tile.store(sums_type, sums)
        return context.get_dummy_value()

    return types.void(weight, types.intp, x, types.intp, types.intp, rows, sums), generate


def prefetch(context: Any, builder: Any, array_type: Any, array: Any, where: Any) -> None:
    """For an intrinsic that is being emitted. Weights pass by once a step: they are not to take the place of others in
    the L2 cache (`keep`)."""
    reading, keep, data = I32(0), I32(0), I32(1)
    address = pointer(context, builder, array_type, array, where, ir.IntType(8))
    call(builder, "llvm.prefetch.p0", ir.VoidType(), address, reading, keep, data, fast=False)
