"""Some tokens times a 4-bit weight: tiles of the weight are unpacked in registers and go straight to the tensor cores.

The weight is the left operand, because that is the one that the tensor cores of Hopper take from registers: a tile of
words is copied to shared memory while the last one is multiplied, read from there in the operand's layout, and its
eight planes are masked out where they are. The codes minus their zero points are whole numbers that 16 bits hold
exactly; a group's scale is applied to its sums, of which there are fewer than weights.

Where the outputs give too few programs for the GPU, the inputs are cut into parts too, whose sums a second kernel adds
up in a fixed order: unlike atomic additions, the same result at every run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from stages.m7_gptq.fast.kernels.triton_int4_layout import TritonWeight

# pyright: basic

PROGRAMS_PER_SM = 2
CONFIGS = {  # tokens up to
    16: {"TOKENS": 16, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    32: {"TOKENS": 32, "ROWS": 64, "num_warps": 4, "num_stages": 4},
    64: {"TOKENS": 64, "ROWS": 64, "num_warps": 4, "num_stages": 3},
    1 << 30: {"TOKENS": 128, "ROWS": 64, "num_warps": 4, "num_stages": 3},
}
"""The fastest of some tried on each shape of Qwen3-0.6B."""
MAGIC = {torch.float16: (0x6400, 1024), torch.bfloat16: (0x4300, 128)}
"""The bits of a power of two whose last bit counts one, and its value: `bits | n` is the number value + n."""


@triton.jit
def tiles_kernel(
    x, words, scales, zeros, bias, out, parts, tokens, x_stride,
    IN: tl.constexpr, OUT: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, SPLIT: tl.constexpr,
    SHARE: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, MAGIC: tl.constexpr,
    VALUE: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    word = tl.arange(0, 16)
    dtype = x.dtype.element_ty
    PLANES: tl.constexpr = 8 // SPLIT
    EACH: tl.constexpr = (BLOCKS + PARTS - 1) // PARTS
    first = tl.program_id(2) * EACH
    result = tl.zeros([ROWS, TOKENS], tl.float32)
    for block in range(first, tl.minimum(first + EACH, BLOCKS)):
        packed = tl.load(words + row[:, None] * (16 * BLOCKS) + block * 16 + word[None, :])
        for split in tl.static_range(SPLIT):
            where = row * GROUPS + block * SPLIT // SHARE + split
            scale = tl.load(scales + where).to(tl.float32)
            zero = (tl.load(zeros + where).to(tl.float32) + VALUE).to(dtype)
            sums = tl.zeros([ROWS, TOKENS], tl.float32)
            for plane in tl.static_range(split * PLANES, (split + 1) * PLANES):
                bits = ((packed >> (4 * plane)) & 15) | MAGIC
                code = bits.to(tl.int16).to(dtype, bitcast=True) - zero[:, None]
                k = block * 128 + plane * 16 + word
                inside = live[None, :] if IN % 128 == 0 else live[None, :] & (k < IN)[:, None]
                value = tl.load(x + token[None, :] * x_stride + k[:, None], mask=inside, other=0.0)
                sums = tl.dot(code, value, sums)
            result += sums * scale[:, None]
    at = token[None, :] * OUT + row[:, None]
    if PARTS > 1:
        part = tl.program_id(2).to(tl.int64) * tokens * OUT
        tl.store(parts + part + at, result, mask=live[None, :])
    else:
        if BIAS:
            result += tl.load(bias + row).to(tl.float32)[:, None]
        tl.store(out + at, result.to(dtype), mask=live[None, :])


@triton.jit
def add_kernel(parts, bias, out, size, OUT: tl.constexpr, PARTS: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr):
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = at < size
    total = tl.zeros([TILE], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * size.to(tl.int64) + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % OUT, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def num_parts(weight: TritonWeight, programs: int) -> int:
    """Into how many parts to cut the inputs, so that the GPU's processors have work: whole blocks, none empty."""
    processors = torch.cuda.get_device_properties(weight.words.device).multi_processor_count
    return _even_parts(weight.blocks, PROGRAMS_PER_SM * processors // programs)


def _even_parts(blocks: int, wanted: int) -> int:
    each = -(-blocks // max(1, min(wanted, blocks)))
    return -(-blocks // each)


def tiles(x: torch.Tensor, weight: TritonWeight) -> torch.Tensor:
    """x [T, in] (rows may lie apart) times the weight: [T, out]; float16 or bfloat16."""
    tokens, outputs = x.shape[0], weight.out_features
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    config = next(c for most, c in CONFIGS.items() if tokens <= most)
    grid = (outputs // config["ROWS"], triton.cdiv(tokens, config["TOKENS"]))
    parts = num_parts(weight, grid[0] * grid[1])
    # Within a CUDA graph this comes from the graph's own memory, as `out` does.
    sums = torch.empty(parts, tokens, outputs, dtype=torch.float32, device=x.device) if parts > 1 else out
    magic, value = MAGIC[x.dtype]
    kernel: Any = tiles_kernel[(*grid, parts)]
    kernel(
        x, weight.words, weight.scales, weight.zeros, weight.bias, out, sums, tokens, x.stride(0),
        IN=weight.in_features, OUT=outputs, BLOCKS=weight.blocks, GROUPS=weight.scales.shape[1], SPLIT=weight.split,
        SHARE=weight.share, PARTS=parts, MAGIC=magic, VALUE=value, BIAS=weight.bias is not None, **config,
    )  # fmt: skip
    if parts > 1:
        add: Any = add_kernel[(triton.cdiv(out.numel(), 512),)]
        add(sums, weight.bias, out, out.numel(), OUT=outputs, PARTS=parts, TILE=512, BIAS=weight.bias is not None)
    return out
