"""A few tokens times a 4-bit weight: as fast as the weight can be read, and what stands beside it is done on the way.

This is `common.kernels.triton_gemv` over 4 bits (NORM, GATED, ADD, EARLY: that file says what and why). A quarter of
the bytes means a quarter of the time only if nothing else takes longer, and in a small model something does: each
kernel waits for the one in front, and then for its own instructions. So the weight is unpacked before the wait: its
codes minus zero points, whole numbers that 16 bits hold exactly, lie in shared memory as the tensor cores want them.
Behind the wait 16 rows times 16 inputs take a warp one instruction, beside one that fetches the codes and two that
load x, from where it is into the operand's registers. The operand has 8 columns: all of them are x.

A group's scale is applied to its sums, the factor of RMSNorm to the result, so that nobody waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from common.kernels.triton_elementwise import silu_times
from stages.m7_gptq.kernels.triton_config import gemv_config
from stages.m7_gptq.kernels.triton_layout import TritonWeight
from stages.m7_gptq.kernels.triton_tiles import MAGIC

# pyright: basic


# What the compiler does not know: that one token is no loop (see below), and a number that it would not keep in a
# register, from where one instruction takes mask and magic.
@triton.jit(do_not_specialize=["tokens", "magic"])
def gemv_kernel(
    x, words, scales, zeros, bias, gain, out, eps, x_stride, out_stride, tokens, magic,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, VALUE: tl.constexpr, ROWS: tl.constexpr, WARPS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A program has ROWS rows. Its warps share the inputs: of each part, which is WARPS blocks, a warp has one."""
    if EARLY:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    PARTS: tl.constexpr = (BLOCKS + WARPS - 1) // WARPS
    PLANES: tl.constexpr = 8 // SPLIT  # of one group
    SMALLER: tl.constexpr = 0.0625 if dtype == tl.float16 else 1.0  # x times gain may pass the end of float16
    first, lane = tl.program_id(0) * ROWS, tl.arange(0, ROWS)
    row = first + lane
    output = row
    if GATED:  # half of the rows are gate, the others the same rows of up
        row = first // 2 + lane % (ROWS // 2) + lane // (ROWS // 2) * (OUT // 2)
        output = first // 2 + tl.arange(0, ROWS // 2)
    warp, word, column = tl.arange(0, WARPS), tl.arange(0, 16), tl.arange(0, WIDTH)
    codes, factors, gains = (), (), ()
    for part in tl.static_range(PARTS):
        block = part * WARPS + warp
        real = (block < BLOCKS)[:, None]
        at = words + row[None, :, None] * (16 * BLOCKS) + block[:, None, None] * 16 + word[None, None, :]
        packed = tl.load(at, mask=real[:, :, None], other=0)
        shifts = ()
        for split in tl.static_range(SPLIT):
            group = row[None, :] * GROUPS + (block * SPLIT // SHARE + split)[:, None]
            factors = factors + (tl.load(scales + group, mask=real, other=0.0).to(tl.float32),)  # noqa: RUF005
            shifts = shifts + ((tl.load(zeros + group, mask=real, other=0.0) + VALUE)[:, :, None],)  # noqa: RUF005
        lows, highs = (), ()
        for plane in tl.static_range(4):  # and plane + 4, with the same instructions
            bits = ((packed >> (4 * plane)) & 0x000F000F) | magic
            low, high = bits.to(tl.int16), (bits >> 16).to(tl.int16)
            lows = lows + (low.to(dtype, bitcast=True) - shifts[plane // PLANES],)  # noqa: RUF005
            highs = highs + (high.to(dtype, bitcast=True) - shifts[(plane + 4) // PLANES],)  # noqa: RUF005
        codes = codes + lows + highs
        if NORM:
            for plane in tl.static_range(8):
                k = block[:, None] * 128 + plane * 16 + word[None, :]
                gains = gains + (tl.load(gain + k, mask=k < IN, other=0.0) * SMALLER,)  # noqa: RUF005
    if BIAS:
        biases = tl.load(bias + row).to(tl.float32)
    for token in range(tokens):
        if EARLY:
            gdc_wait()  # in the loop: in front of it the compiler would move it up, ahead of the work on the weight
        source, target = x + token * x_stride, out + token * out_stride + output
        if NORM:
            full = tl.load(source + column, mask=column < IN, other=0.0).to(tl.float32)
        if ADD:
            result = tl.load(target).to(tl.float32)
        total = tl.zeros([WARPS, ROWS, 8], tl.float32)
        for split in tl.static_range(SPLIT):
            sums = (tl.zeros([WARPS, ROWS, 8], tl.float32),) * PARTS
            for plane in tl.static_range(split * PLANES, (split + 1) * PLANES):
                longer = ()
                for part in tl.static_range(PARTS):  # innermost: their sums do not wait for each other
                    k = (part * WARPS + warp)[:, None] * 128 + plane * 16 + word[None, :]
                    value = tl.load(source + k, mask=k < IN, other=0.0)
                    if NORM:
                        value *= gains[part * 8 + plane]
                    columns = tl.broadcast_to(value[:, :, None], (WARPS, 16, 8))
                    longer = longer + (tl.dot(codes[part * 8 + plane], columns, sums[part]),)  # noqa: RUF005
                sums = longer
            for part in tl.static_range(PARTS):
                total += sums[part] * factors[part * SPLIT + split][:, :, None]
        product = tl.sum(tl.max(total, 2), 0)  # the columns are equal
        if NORM:
            product *= tl.rsqrt(tl.sum(full * full, 0) / IN + eps) / SMALLER
        if BIAS:
            product += biases
        if GATED:
            gate, up = tl.split(product.to(dtype).to(tl.float32).reshape(2, ROWS // 2).trans(1, 0))
            product = silu_times(gate, up, dtype)
        if ADD:
            product += result
        tl.store(target, product.to(dtype))


def most_inputs(device: torch.device) -> int:
    """Of how many inputs shared memory holds 16 rows, 2 bytes a number, in parts of 1024: 7168 on an H100."""
    if device.type == "cpu":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor // 32 // 1024 * 1024


def gemv(
    x: torch.Tensor,
    weight: TritonWeight,
    launch: dict[str, Any],
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    add_to: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """x [T, in] (rows may lie apart), T up to `GEMV_TOKENS`, times the weight, of up to `most_inputs`: [T, out], or
    [T, out / 2] if gated. norm, eps, gated, add_to: as in `common.kernels.triton_gemv.gemv`.

    config: ROWS of a program, 16 or more, and WARPS; None takes the table's."""
    rows, warps = (config or gemv_config(weight.in_features, weight.out_features)).values()
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
