"""A few tokens times a 4-bit weight: as fast as the weight can be read, with the neighbours' work on the way.

This is `execution.gpu.triton_gemv` over 4 bits (NORM, GATED, ADD, PDL: see there). In a small model each kernel waits
for the one in front, and then for its own instructions. So the weight is unpacked before the wait, in the registers
that it was read into, as the operand of the tensor cores. Shared memory stays free for the kernels behind. After the
wait 16 rows times 16 inputs take a warp one instruction.

No number moves from thread to thread on the way, because of the order in which a tile is read: two times eight rows,
four words of each row for a thread. The operand wants just that (16 x 16, rows g and g + 8, inputs 4t to 4t + 3 for
thread 4g + t of a warp); `tl.join` and `permute` only tell the compiler so.

A code is multiplied as VALUE + code, which is masked out of a word by one instruction (see `MAGIC`). What that adds,
(VALUE + zero point) times the sum of x, is taken off the sums; the sum of x is one more product, with ones. Scales are
applied to sums, and the factor of RMSNorm to the result, so that nothing waits for it; but to x in float16, which could
not hold x times the norm's weight.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.execution.gpu.triton_elementwise import silu_times
from stages.m7_gptq.fast.kernels.triton_int4_layout import TritonWeight
from stages.m7_gptq.fast.kernels.triton_int4_tiles import MAGIC

# pyright: basic

GEMV_TOKENS = 2
"""Up to this many tokens are multiplied one after the other, the weight in registers; more are faster as tiles."""
MOST_INPUTS = 4096
"""Unpacked, the rows of a program must find room in the registers of its threads."""
CONFIGS = {  # inputs and outputs up to: rows of a program (16 or 32), warps
    (1024, 1024): (16, 4),
    (1024, 1 << 30): (32, 4),
    (2048, 1 << 30): (32, 8),
    (MOST_INPUTS, 1 << 30): (16, 8),
}
"""The fastest of some tried in a whole decode step of Qwen3-0.6B on an H100, where kernels that wait for each other
share the registers; no record was kept."""


@triton.jit
def rows_of(first, tile, OUT: tl.constexpr, GATED: tl.constexpr):
    """The 16 rows of a tile as two times eight: eight of gate and the same of up, or simply one after the other."""
    eight = tl.arange(0, 8)
    if GATED:
        upper = first // 2 + tile * 8 + eight
        lower = upper + OUT // 2
    else:
        upper = first + tile * 16 + eight
        lower = upper + 8
    return upper, lower


@triton.jit
def operand(upper, lower, WARPS: tl.constexpr):
    """[8, WARPS, 16] twice to [WARPS, 16, 16], the left operand of a product: every number stays in its thread."""
    return tl.join(upper, lower).permute(1, 3, 0, 2).reshape(WARPS, 16, 16)


# What the compiler does not know: that one token is no loop (see below), and a number that it would not keep in a
# register, from where one instruction takes mask and magic.
@triton.jit(do_not_specialize=["tokens", "magic"])
def gemv_kernel(
    x, words, scales, zeros, bias, gain, out, eps, x_stride, out_stride, tokens, magic,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program has one or two tiles of 16 rows. Its warps share the inputs: of each part, which is WARPS blocks, a
    warp has one."""
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    TILES: tl.constexpr = ROWS // 16
    PARTS: tl.constexpr = (BLOCKS + WARPS - 1) // WARPS
    PLANES: tl.constexpr = 8 // SPLIT  # of one group
    LATE: tl.constexpr = dtype != tl.float16  # is the factor of RMSNorm applied to the result?
    first = tl.program_id(0) * ROWS
    warp, word, column, side = tl.arange(0, WARPS), tl.arange(0, 16), tl.arange(0, WIDTH), tl.arange(0, TILES)
    packed, factors, shifts, gains, codes = (), (), (), (), ()
    for tile in tl.static_range(TILES):
        upper, lower = rows_of(first, tile, OUT, GATED)
        row = tl.join(upper, lower).permute(1, 0).reshape(16)
        for part in tl.static_range(PARTS):
            block = part * WARPS + warp
            exists, real = (block < BLOCKS)[None, :, None], (block < BLOCKS)[:, None]
            at = words + block[None, :, None] * 16 + word[None, None, :]
            above = tl.load(at + upper[:, None, None] * (16 * BLOCKS), mask=exists, other=0)
            below = tl.load(at + lower[:, None, None] * (16 * BLOCKS), mask=exists, other=0)
            packed = packed + (operand(above, below, WARPS),)  # noqa: RUF005
            for split in tl.static_range(SPLIT):
                group = row[None, :] * GROUPS + (block * SPLIT // SHARE + split)[:, None]
                factor = tl.load(scales + group, mask=real, other=0.0).to(tl.float32)
                zero = tl.load(zeros + group, mask=real, other=0.0).to(tl.float32)
                factors = factors + (factor[:, :, None],)  # noqa: RUF005
                shifts = shifts + (((zero + VALUE) * factor)[:, :, None],)  # noqa: RUF005
    for plane in tl.static_range(8):
        for number in tl.static_range(TILES * PARTS):
            bits = ((packed[number] >> (4 * (plane % 4))) & 0x000F000F) | magic  # planes p and p + 4
            half = bits if plane < 4 else bits >> 16
            codes = codes + (half.to(tl.int16).to(dtype, bitcast=True),)  # noqa: RUF005
        for part in tl.static_range(PARTS):
            if NORM:
                k = (part * WARPS + warp)[:, None] * 128 + plane * 16 + word[None, :]
                gains = gains + (tl.load(gain + k, mask=k < IN, other=0.0),)  # noqa: RUF005
    output = first + tl.arange(0, 16)[:, None] + 16 * side[None, :]
    if GATED:
        output = first // 2 + tl.arange(0, 8)[:, None] + 8 * side[None, :]
    if BIAS:
        biases = tl.load(bias + output).to(tl.float32)
    one = tl.full([8, WARPS, 16], 1.0, dtype)
    ones = operand(one, one, WARPS)
    for token in range(tokens):
        if PDL:
            gdc_wait()  # in the loop: in front of it the compiler would move it up, ahead of the work on the weight
        source, target = x + token * x_stride, out + token * out_stride + output
        values = ()
        for plane in tl.static_range(8):
            for part in tl.static_range(PARTS):
                k = (part * WARPS + warp)[:, None] * 128 + plane * 16 + word[None, :]
                values = values + (tl.load(source + k, mask=k < IN, other=0.0),)  # noqa: RUF005
        if NORM:
            full = tl.load(source + column, mask=column < IN, other=0.0).to(tl.float32)
            if not LATE:
                inverse = tl.rsqrt(tl.sum(full * full, 0) / IN + eps)
        if ADD:
            residual = tl.load(target).to(tl.float32)
        total = (tl.zeros([WARPS, 16, 8], tl.float32),) * TILES
        for split in tl.static_range(SPLIT):
            sums = (tl.zeros([WARPS, 16, 8], tl.float32),) * (TILES * PARTS)
            plain = (tl.zeros([WARPS, 16, 8], tl.float32),) * PARTS  # of x, in every row
            for plane in tl.static_range(split * PLANES, (split + 1) * PLANES):
                longer, longer_plain, columns = (), (), ()
                for part in tl.static_range(PARTS):
                    value = values[plane * PARTS + part]
                    if NORM:
                        if not LATE:
                            value = (value.to(tl.float32) * inverse).to(dtype)
                        value *= gains[plane * PARTS + part]
                    columns = columns + (tl.broadcast_to(value[:, :, None], (WARPS, 16, 8)),)  # noqa: RUF005
                    longer_plain = longer_plain + (tl.dot(ones, columns[part], plain[part]),)  # noqa: RUF005
                for number in tl.static_range(TILES * PARTS):
                    code = codes[plane * TILES * PARTS + number]
                    longer = longer + (tl.dot(code, columns[number % PARTS], sums[number]),)  # noqa: RUF005
                sums, plain = longer, longer_plain
            larger = ()
            for tile in tl.static_range(TILES):
                subtotal = total[tile]
                for part in tl.static_range(PARTS):
                    subtotal += sums[tile * PARTS + part] * factors[(tile * PARTS + part) * SPLIT + split]
                    subtotal -= plain[part] * shifts[(tile * PARTS + part) * SPLIT + split]
                larger = larger + (subtotal,)  # noqa: RUF005
            total = larger
        tiles = tl.join(total[0], total[1]) if TILES == 2 else total[0][:, :, :, None]
        chosen = tl.where(tl.arange(0, 8)[None, None, :, None] == 0, tiles, 0.0)  # the columns are equal
        product = tl.sum(tl.sum(chosen, 2), 0)
        if NORM and LATE:
            product *= tl.rsqrt(tl.sum(full * full, 0) / IN + eps)
        if BIAS:
            product += biases
        if GATED:
            gate, up = tl.split(product.to(dtype).to(tl.float32).reshape(2, 8, TILES).permute(1, 2, 0))
            product = silu_times(gate, up, dtype)
        if ADD:
            product += residual
        tl.store(target, product.to(dtype))


def gemv_config(in_features: int, out_features: int) -> tuple[int, int]:
    return next(c for (inputs, outputs), c in CONFIGS.items() if in_features <= inputs and out_features <= outputs)


def gemv(
    x: torch.Tensor,
    weight: TritonWeight,
    launch: dict[str, Any],
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, in] (rows may lie apart), T up to `GEMV_TOKENS`, times the weight, of up to `MOST_INPUTS`: [T, out], or
    [T, out / 2] if gated. norm, eps, gated, add_to: as in `common.execution.gpu.triton_gemv.gemv`."""
    rows, warps = gemv_config(weight.in_features, weight.out_features)
    tokens, outputs = x.shape[0], weight.out_features // 2 if gated else weight.out_features
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    magic, value = MAGIC[x.dtype]
    kernel: Any = gemv_kernel[(weight.out_features // rows,)]
    kernel(
        x, weight.words, weight.scales, weight.zeros, weight.bias, norm, out, eps, x.stride(0), out.stride(0), tokens,
        magic * 0x10001, IN=weight.in_features, OUT=weight.out_features, BLOCKS=weight.blocks,
        GROUPS=weight.scales.shape[1], SPLIT=weight.split, SHARE=weight.share, VALUE=value, ROWS=rows, WARPS=warps,
        WIDTH=triton.next_power_of_2(weight.in_features), NORM=norm is not None, GATED=gated,
        BIAS=weight.bias is not None, ADD=add_to is not None, num_warps=warps,
        num_stages=1, **launch,  # no load of x may be moved in front of the wait
    )  # fmt: skip
    return out
