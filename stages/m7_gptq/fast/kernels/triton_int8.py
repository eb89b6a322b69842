"""Products with an 8-bit weight that has one scale for each row: few tokens and many.

A word of 32 bits holds four codes of one row, whose inputs lie a quarter of the row apart:

    word j holds inputs  j, n + j, 2n + j, 3n + j    (lowest byte first; n words a row)

so that *plane* p, the p-th bytes of a row's words, is n inputs that lie side by side in x too.

The GPU's own conversion from int8 is slow. Here a code becomes a float in two instructions: a shift brings its byte to
the highest bits of a mantissa, and one logical operation (mask and magic) clears the others and flips the sign bit. The
bits then read 1.5 + code / 256. `gemv_kernel` takes 1.5 times the sum of x off its sums, `tiles_kernel` 1.5 off each
(exactly); the 256 goes into the scale.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# pyright: basic

MAGIC = 0x3FC00000
"""1.5, whose mantissa's highest bit is the flipped sign of a code that is not negative."""
GEMV_TOKENS = 1
"""Up to this many tokens (4 at most) are multiplied one after the other; more take the tensor cores."""
LOADS = 16
"""Of 16 bytes, by each thread, all on their way at once. For rows of 1,024 inputs: 16 KB a program."""
WARP = 32 * 4
"""Words of a row that a warp loads at once. With a warp for each such part, x lies in the threads that use it."""
TILES = {  # tokens up to
    16: {"TOKENS": 16, "ROWS": 64, "WORDS": 64, "num_warps": 4, "num_stages": 3},
    32: {"TOKENS": 32, "ROWS": 64, "WORDS": 64, "num_warps": 4, "num_stages": 3},
    64: {"TOKENS": 64, "ROWS": 64, "WORDS": 32, "num_warps": 4, "num_stages": 3},
    1 << 30: {"TOKENS": 128, "ROWS": 128, "WORDS": 32, "num_warps": 8, "num_stages": 4},
}


@triton.jit
def numbers(words, plane: tl.constexpr, magic):
    """1.5 + code / 256 of the plane's codes, in float32."""
    moved = words << (15 - 8 * plane) if plane < 2 else words >> (8 * plane - 15)
    return ((moved & 0x7F8000) ^ magic).to(tl.float32, bitcast=True)


# magic: a number that the compiler does not know stays in a register, and one instruction takes mask and magic.
@triton.jit(do_not_specialize=["rows", "magic"])
def gemv_kernel(
    x, words, scales, gain, out, rows, width, outputs, eps, x_stride, out_stride, magic,
    ROWS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program has OUT rows of `width` words: as `execution.gpu.triton_gemv`, which says what NORM and ADD are."""
    if PDL:
        gdc_launch_dependents()
    dtype: tl.constexpr = out.dtype.element_ty
    output, word = tl.program_id(0) * OUT + tl.arange(0, OUT), tl.arange(0, WIDTH)
    exists, inside = output < outputs, word < width
    tile = output[:, None].to(tl.int64) * width + word[None, :]
    packed = tl.load(words + tile, mask=exists[:, None] & inside[None, :], other=0)
    scale = tl.load(scales + output, mask=exists, other=0.0) * 256
    gains = ()
    if NORM:
        for plane in tl.static_range(4):
            loaded = tl.load(gain + plane * width + word, mask=inside, other=0.0)
            gains = gains + (loaded.to(tl.float32),)  # noqa: RUF005
    if PDL:
        gdc_wait()
    for row in tl.static_range(ROWS):
        given = inside & (word * 0 + row < rows)  # a mask is a tensor: two numbers compared would be none
        values, squares = (), tl.zeros([WIDTH], tl.float32)
        for plane in tl.static_range(4):
            value = tl.load(x + row * x_stride + plane * width + word, mask=given, other=0.0).to(tl.float32)
            values = values + (value,)  # noqa: RUF005
            squares += value * value
        if NORM:  # `rms`, over four planes
            factor = tl.rsqrt(tl.sum(squares, 0) / (4 * width) + eps)
            normed = ()
            for plane in tl.static_range(4):
                value = gains[plane] * (values[plane] * factor).to(dtype).to(tl.float32)
                normed = normed + (value.to(dtype).to(tl.float32),)  # noqa: RUF005
            values = normed
        too_much = 1.5 * (values[0] + values[1] + values[2] + values[3])
        sums = tl.broadcast_to(-too_much[None, :], (OUT, WIDTH))
        for plane in tl.static_range(4):
            sums += numbers(packed, plane, magic) * values[plane][None, :]
        result = tl.sum(sums, 1) * scale
        at, real = out + row * out_stride + output, exists & (output * 0 + row < rows)
        if ADD:
            result += tl.load(at, mask=real, other=0.0).to(tl.float32)
        tl.store(at, result.to(dtype), mask=real)


@triton.jit(do_not_specialize=["tokens", "magic"])
def tiles_kernel(
    x, words, scales, out, tokens, width, outputs, x_stride, magic,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A program has ROWS rows and TOKENS tokens. Programs of the same rows follow one another: they share the cache."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live, exists = token < tokens, row < outputs
    dtype: tl.constexpr = out.dtype.element_ty
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for first in range(0, width, WORDS):
        word = first + tl.arange(0, WORDS)
        inside = word < width
        packed = tl.load(words + row[:, None] * width + word[None, :], mask=exists[:, None] & inside[None, :], other=0)
        for plane in tl.static_range(4):
            code = (numbers(packed, plane, magic) - 1.5).to(dtype)  # / 256, exactly
            at = x + token[None, :] * x_stride + plane * width + word[:, None]
            sums = tl.dot(code, tl.load(at, mask=live[None, :] & inside[:, None], other=0.0), sums)
    scale = tl.load(scales + row, mask=exists, other=0.0) * 256
    at = out + token[None, :] * outputs + row[:, None]
    tl.store(at, (sums * scale[:, None]).to(dtype), mask=exists[:, None] & live[None, :])


def lay_out(codes: torch.Tensor) -> torch.Tensor:
    """int8 [out, in], `in` a multiple of 4, to words, int32 [out, in / 4]."""
    outputs, inputs = codes.shape
    return codes.view(outputs, 4, inputs // 4).transpose(1, 2).reshape(outputs, inputs).view(torch.int32)


def gemv_config(width: int) -> tuple[int, int]:
    """Rows and warps of a program: as many warps as a row of `width` words takes, as many rows as make `LOADS`."""
    words = triton.next_power_of_2(width)
    warps = max(1, min(8, words // WARP))
    return max(1, LOADS * WARP * warps // words), warps


def gemv(
    x: torch.Tensor,
    words: torch.Tensor,
    scales: torch.Tensor,
    launch: dict[str, Any],
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, in], T up to 4, times the weight: [T, out]. norm, eps, add_to: as `execution.gpu.triton_gemv.gemv`."""
    rows, (outputs, width) = x.shape[0], words.shape
    per_program, warps = gemv_config(width)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device) if add_to is None else add_to
    kernel: Any = gemv_kernel[(triton.cdiv(outputs, per_program),)]
    kernel(
        x, words, scales, norm, out, rows, width, outputs, eps, x.stride(0), out.stride(0), MAGIC,
        ROWS=triton.next_power_of_2(rows), OUT=per_program, WIDTH=triton.next_power_of_2(width), NORM=norm is not None,
        ADD=add_to is not None, num_warps=warps, **launch,
    )  # fmt: skip
    return out


def tiles(x: torch.Tensor, words: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """x [T, in] times the weight: [T, out], in float16 or bfloat16."""
    tokens, (outputs, width) = x.shape[0], words.shape
    config = next(c for most, c in TILES.items() if tokens <= most)
    out = torch.empty(tokens, outputs, dtype=x.dtype, device=x.device)
    kernel: Any = tiles_kernel[(triton.cdiv(tokens, config["TOKENS"]), triton.cdiv(outputs, config["ROWS"]))]
    kernel(x, words, scales, out, tokens, width, outputs, x.stride(0), MAGIC, **config)
    return out
