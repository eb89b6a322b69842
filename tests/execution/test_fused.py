"""Fused kernels against their definitions, under Triton's interpreter where there is no GPU. Real sizes: tests/gpu.

The interpreter runs one program after another, each for some milliseconds whatever its size: so there are few.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from common.execution.choose import choose_ops
from common.execution.cpu.fused_cpu import CompiledOps
from common.execution.gpu import triton_batch, triton_elementwise, triton_gemv, triton_skinny
from common.execution.gpu.fused import FusedOps
from common.execution.gpu.launch import launch_options
from common.models import load_model
from common.models.linear import Linear
from common.models.ops import Ops
from tests.depth import DEEP, by_depth
from tests.execution.cases import (
    Inputs,
    check_embed,
    check_norm,
    check_products,
    check_qk_norm_rope,
    check_sample,
    close,
    drawn,
)
from tests.helpers import all_logits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # the interpreter cuts, not rounds


ROWS = [1, 3, 8, 9, triton_skinny.MAX_ROWS + 1, triton_batch.MAX_ROWS + 1] + [2, 16, 20, 32, 65] * DEEP
"""On both sides of every kernel's limit; more than `triton_batch.MAX_ROWS` are the library's. float32 is multiplied by
the library from two rows on."""

SIZES = [(64, 1), (100, 7), (576, 27), (16, 110), (1030, 5)] + [(576, 60), (1030, 13)] * DEEP
"""Inputs and outputs of a product: one output, and last tiles with 1, 3 and 14 of them."""

DRAWS = by_depth(3, 8)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> FusedOps:
    if DEVICE == "cpu":  # each program has several outputs, and some of the last one's are too many
        monkeypatch.setattr(triton_gemv, "MIN_PROGRAMS", 2)
        monkeypatch.setattr(triton_skinny, "MIN_PROGRAMS", 2)
    return FusedOps(torch.device(DEVICE))


@pytest.fixture(params=[2] + [5] * DEEP, ids="at least {} programs".format)
def product_ops(ops: FusedOps, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FusedOps:
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_gemv, "MIN_PROGRAMS", request.param)
    return ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "dim"), [(1, 64, 16), (3, 100, 24), (20, 576, 64), (2, 1030, 128)])
def test_every_row_is_that_of_its_own_token_and_position(
    ops: FusedOps, rows: int, width: int, dim: int, dtype: torch.dtype
) -> None:
    check_embed(ops, Inputs(dtype, DEVICE), rows, width, dim)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (3, 100), (4, 576), (2, 1030)] + [(9, 576)] * DEEP)
def test_norm_is_right_at_widths_that_are_no_power_of_two(
    ops: FusedOps, rows: int, width: int, dtype: torch.dtype
) -> None:
    check_norm(ops, Inputs(dtype, DEVICE), rows, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_right_on_both_sides_of_the_row_limit(
    product_ops: FusedOps, rows: int, dtype: torch.dtype
) -> None:
    check_products(product_ops, Inputs(dtype, DEVICE), rows, 48, 80)


@pytest.mark.parametrize(("width", "outputs"), SIZES)
@pytest.mark.parametrize("bias", [False, True] if DEEP else [True])  # without one: the test above
def test_products_are_right_at_sizes_that_no_tile_divides(
    product_ops: FusedOps, width: int, outputs: int, bias: bool
) -> None:
    check_products(product_ops, Inputs(torch.float32, DEVICE), 1, width, outputs, bias)


@pytest.mark.parametrize(("width", "outputs"), [(100, 7), (576, 27), (1030, 5), (2048, 40)])
@pytest.mark.parametrize("rows", [5, 17])
def test_products_of_the_tensor_cores_are_right_at_sizes_that_no_tile_divides(
    ops: FusedOps, width: int, outputs: int, rows: int
) -> None:
    """A last tile with few outputs, a last part with few inputs, and a last group with one token."""
    check_products(ops, Inputs(torch.float16, DEVICE), rows, width, outputs, bias=True)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("out", "warps", "tokens"), [(8, 8, 8), (8, 4, 16), (16, 2, 8), (16, 16, 8), (32, 4, 16)])
def test_every_shape_of_a_program_gives_the_same_product(out: int, warps: int, tokens: int, gated: bool) -> None:
    if gated and out == 8:
        return  # gate and up are eight rows each
    make = Inputs(torch.float16, DEVICE)
    x, norm, proj = make.tensor(9, 1100, scale=3), make.norm(1100), make.linear(2 * 20, 1100)
    config = triton_skinny.SkinnyConfig(out, warps, tokens)
    options: dict[str, Any] = {"norm": norm.weight, "eps": norm.eps, "gated": gated, "config": config}
    result = triton_skinny.skinny(x, proj.weight, launch_options(torch.device(DEVICE)), **options)
    close(result, Ops().norm_swiglu(x, norm, proj) if gated else Ops().norm_linear(x, norm, proj))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("width", "outputs"), [(100, 7), (1024, 64), (576, 100)])
@pytest.mark.parametrize("config", [*triton_batch.CONFIGS[1::2], *triton_batch.CONFIGS[::2] * DEEP], ids=str)
def test_every_tile_of_a_batch_gives_the_same_product(
    config: triton_batch.BatchConfig, width: int, outputs: int, bias: bool
) -> None:
    """Two tiles of tokens, the second of one; outputs and inputs that no tile divides, and some that all divide."""
    make = Inputs(torch.float16, DEVICE)
    x, norm, proj = make.tensor(65, width, scale=3), make.norm(width), make.linear(outputs, width, bias)
    gate_up, residual = make.linear(2 * outputs, width), make.tensor(65, outputs)
    launch = launch_options(torch.device(DEVICE))
    options: dict[str, Any] = {"norm": norm.weight, "eps": norm.eps}
    given = (launch, config)
    close(triton_batch.batch(x, proj.weight, *given, bias=proj.bias, **options), Ops().norm_linear(x, norm, proj))
    close(triton_batch.batch(x, gate_up.weight, *given, gated=True, **options), Ops().norm_swiglu(x, norm, gate_up))
    expected = Ops().residual_linear(residual, proj, x)
    close(triton_batch.batch(x, proj.weight, *given, bias=proj.bias, add_to=residual), expected)


@pytest.mark.parametrize("rows", [65, 3])
def test_parts_of_a_product_are_added_up_by_the_norm_that_follows(rows: int) -> None:
    make, launch = Inputs(torch.float16, DEVICE), launch_options(torch.device(DEVICE))
    x, norm, y, proj = make.tensor(rows, 96), make.norm(96), make.tensor(rows, 1024), make.linear(96, 1024)
    expected = Ops().residual_linear(x, proj, y)
    parts = triton_batch.split_batch(y, proj.weight, launch)
    assert parts.shape == (2, rows, 96)
    close(parts.sum(0), y.float() @ proj.weight.float().T)
    normed = triton_elementwise.add_norm(x, parts, norm.weight, norm.eps, launch)
    close(x, expected)
    close(normed, norm(x))


def test_a_norm_that_is_known_is_not_computed_again_and_no_other_is_taken_for_it() -> None:
    make, launch, config = Inputs(torch.float16, DEVICE), launch_options(torch.device(DEVICE)), triton_batch.CONFIGS[3]
    x, norm, other, proj = make.tensor(3, 64), make.norm(64), make.norm(64), make.linear(40, 64)
    known = triton_batch.Normed(x, norm.weight, torch.ones_like(x))
    given: dict[str, Any] = {"eps": norm.eps, "normed": known}
    got = triton_batch.batch(x, proj.weight, launch, config, norm=norm.weight, **given)
    close(got, proj(torch.ones_like(x)))
    for rows, own in ((x, other), (x.clone(), norm)):
        got = triton_batch.batch(rows, proj.weight, launch, config, norm=own.weight, **given)
        close(got, Ops().norm_linear(rows, own, proj))


def test_whole_layers_of_a_batch_are_split_and_right(ops: FusedOps, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's residual products and norms in their order, as the decoder calls them; a bias is not split."""
    make, split = Inputs(torch.float16, DEVICE), list[int]()
    real = triton_batch.split_batch
    monkeypatch.setattr(triton_batch, "split_batch", lambda *a: split.append(len(a[0])) or real(*a))
    for bias in (False, True):
        x, y = make.tensor(40, 64), make.tensor(40, 512)
        norm, down, up = make.norm(64), make.linear(64, 512, bias), make.linear(40, 64)
        expected = Ops().residual_linear(x, down, y)
        got = ops.residual_linear(x.clone(), down, y, norm)
        close(got, expected)
        close(ops.norm_linear(got, norm, up), Ops().norm_linear(got, norm, up))
    assert split == [40]


@pytest.mark.parametrize(
    ("rows", "width", "outputs", "expected"),
    [
        (33, 2048, 1024, True),
        (64, 512, 64, True),
        (32, 2048, 1024, False),
        (65, 2048, 1024, False),
        (40, 1000, 1024, False),
        (40, 2048, 1000, False),
        (40, 2048, 1 << 15, False),
    ],
)
def test_a_product_is_split_where_one_tile_holds_its_tokens(
    rows: int, width: int, outputs: int, expected: bool
) -> None:
    weight = torch.empty(outputs, width, dtype=torch.bfloat16, device="meta")
    assert triton_batch.splits(weight, None, rows) is expected
    assert not triton_batch.splits(weight.float(), None, rows)
    assert not triton_batch.splits(weight, weight[0], rows)


@pytest.mark.parametrize(
    ("outputs", "rows", "out"),
    [(4096, 33, 32), (4096, 64, 32), (4096, 65, 64), (6144, 64, 64), (6144, 128, 128), (1024, 64, 16), (48, 64, 16)],
)
def test_a_batch_is_cut_into_enough_programs(outputs: int, rows: int, out: int) -> None:
    weight = torch.empty(outputs, 64, dtype=torch.bfloat16, device="meta")
    config = triton_batch.batch_config(weight, rows)
    assert config is not None and config.out == out


def test_the_library_keeps_large_batches_large_heads_and_float32() -> None:
    weight = torch.empty(4096, 64, dtype=torch.bfloat16, device="meta")
    assert triton_batch.batch_config(weight, triton_batch.MAX_ROWS + 1) is None
    assert triton_batch.batch_config(weight.float(), 64) is None
    assert triton_batch.batch_config(weight.new_empty(151_936, 64), 64) is None


def test_no_tokens_are_no_product(ops: FusedOps) -> None:
    """A step in which nothing is sampled has no logits."""
    make = Inputs(torch.float16, DEVICE)
    assert ops.norm_linear(make.tensor(0, 64), make.norm(64), make.linear(24, 64)).shape == (0, 24)


def test_rows_that_lie_apart_are_multiplied_in_place(ops: FusedOps) -> None:
    make = Inputs(torch.float16, DEVICE)
    wide, proj, residual = make.tensor(3, 200), make.linear(24, 64), make.tensor(3, 24)
    expected = Ops().residual_linear(residual, proj, wide[:, 100:164])
    close(ops.residual_linear(residual.clone(), proj, wide[:, 100:164]), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("rows", "heads", "dim"),
    [(1, (4, 2), 16), (3, (9, 3), 64), (2, (8, 1), 24), (2, (2, 2), 128)] + [(11, (8, 1), 24)] * DEEP,
)
def test_every_head_is_normalised_and_rotated_on_its_own(
    ops: FusedOps, rows: int, heads: tuple[int, int], dim: int, normalised: bool, dtype: torch.dtype
) -> None:
    """Heads must not be mixed up."""
    check_qk_norm_rope(ops, Inputs(dtype, DEVICE), rows, heads, dim, normalised)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(2, 5), (3, 2048), (3, 2049), (5, 9000) if DEEP else (3, 4500)] + [(1, 5), (4, 2048)] * DEEP,
)
def test_drawn_tokens_are_right_around_the_end_of_a_chunk(
    ops: FusedOps, rows: int, vocab: int, dtype: torch.dtype
) -> None:
    check_sample(ops, Inputs(dtype, DEVICE), rows, vocab, draws=DRAWS)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 30.0])
def test_drawn_tokens_are_right_at_extreme_temperatures(ops: FusedOps, temperature: float) -> None:
    check_sample(ops, Inputs(torch.float32, DEVICE), by_depth(3, 4), 5000, temperature, DRAWS)


def test_a_banned_token_is_never_drawn(ops: FusedOps) -> None:
    logits = torch.full((3, 5000), -torch.inf, device=DEVICE)
    logits[:, 2500] = 0.0  # the chunks around its own hold nothing
    assert drawn(ops, logits, 1.0).tolist() == drawn(ops, logits).tolist() == [2500] * 3


def test_of_equal_logits_the_first_is_taken(ops: FusedOps) -> None:
    logits = torch.zeros(1, 7000, device=DEVICE)
    logits[0, [3000, 3001, 6000]] = 1.0
    assert drawn(ops, logits).item() == 3000


@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
@pytest.mark.parametrize("tokens", [1, 6] + [20] * DEEP)
def test_whole_model_gives_the_same_logits(product_ops: FusedOps, preset: str, tokens: int) -> None:
    model = load_model(f"random:{preset}", device=DEVICE)
    ids = [(7 * i * i + 3) % 97 for i in range(tokens)]
    expected = all_logits(model, ids)
    model.ops = product_ops
    torch.testing.assert_close(all_logits(model, ids), expected, atol=2e-4, rtol=1e-4)


def test_projection_that_is_no_linear_keeps_its_own_product(ops: FusedOps) -> None:
    """A quantised stage's: it can be called, and need not offer more."""
    make = Inputs(torch.float32, DEVICE)
    x, norm, plain = make.tensor(2, 64), make.norm(64), make.linear(64, 64)

    class Doubled:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * plain(x)

        def weights_bytes(self) -> int:
            return 0

    expected = 2 * Ops().norm_linear(x, norm, plain)
    close(ops.norm_linear(x, norm, Doubled()), expected)
    close(ops.norm_swiglu(x, norm, Doubled()), Ops().norm_swiglu(x, norm, Linear(2 * plain.weight)))
    close(ops.residual_linear(x.clone(), Doubled(), x), x + 2 * plain(x))


def test_fused_kernels_are_chosen_only_for_a_device_that_has_them() -> None:
    assert type(choose_ops(torch.device("cpu"), fused=True)) is CompiledOps
    assert type(choose_ops(torch.device("cpu"), fused=False)) is Ops
    assert type(choose_ops(torch.device("meta"), fused=True)) is Ops


def test_a_cpu_without_numba_gets_plain_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not ask for Numba."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert type(choose_ops(torch.device("cpu"), fused=True)) is Ops


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "width"), [(1, 64), (512, 64), (4096, 1024), (6144, 1024), (151_936, 1024)])
def test_a_product_is_cut_into_enough_programs_of_bounded_size(outputs: int, width: int, gated: bool) -> None:
    out, warps = triton_gemv.gemv_config(outputs, width, itemsize=4, gated=gated)
    row_bytes, most = width * 4 * (2 if gated else 1), triton_gemv.BYTES_PER_PROGRAM
    assert out == 1 or (out * row_bytes <= most and outputs // out >= triton_gemv.MIN_PROGRAMS)
    twice = 2 * out
    assert twice * row_bytes > most or outputs // twice < triton_gemv.MIN_PROGRAMS, "larger programs would do"
    assert warps == max(1, min(8, row_bytes // 1024))


@pytest.mark.parametrize(
    ("outputs", "width", "rows", "kind", "expected"),
    [
        (4096, 1024, 8, "norm", (32, 4, 8)),
        (1024, 2048, 1, "add", (16, 4, 8)),
        (1024, 2048, 9, "add", (8, 4, 16)),
        (1024, 3072, 8, "add", (8, 4, 8)),
        (1024, 3072, 32, "add", (8, 4, 8)),
        (6144, 1024, 16, "gated", (32, 4, 16)),
        (6144, 1024, 17, "gated", None),
        (151_936, 1024, 8, "norm", (32, 4, 8)),
        (151_936, 1024, 9, "norm", None),
        (1024, 2048, 33, "add", None),
        (9728, 2560, 8, "gated", (16, 8, 8)),
        (6144, 2560, 9, "norm", (8, 8, 16)),
        (2560, 9728, 1, "add", None),
        (192, 576, 1, "norm", (8, 4, 8)),
        (128, 64, 1, "gated", (16, 4, 8)),
    ],
)
def test_a_product_of_the_tensor_cores_fits_into_registers(
    outputs: int, width: int, rows: int, kind: str, expected: tuple[int, int, int] | None
) -> None:
    """Qwen3-0.6B's products; those that the library keeps; and a narrow one, for which there are many programs."""
    weight = torch.empty(outputs, width, dtype=torch.bfloat16, device="meta")
    norm, gated = kind != "add", kind == "gated"
    config = triton_skinny.skinny_config(weight, rows, norm, gated)
    assert (None if config is None else (config.out, config.warps, config.tokens)) == expected
    assert triton_skinny.skinny_config(weight.float(), rows, norm, gated) is None
