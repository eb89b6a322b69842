"""The 8-bit head, compiled and on a GPU: both kernels over real sizes, in a graph, and in the engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stages
from common import SamplingParams
from common.execution.gpu.fused import FusedOps
from common.models.linear import Linear
from common.models.ops import Ops
from stages.m7_gptq.fast.choose import Int4Layers
from stages.m7_gptq.fast.int8_head import Int8Head
from stages.m7_gptq.head import QuantizedHead, eight_bit_head, round_rows
from tests.execution.cases import Inputs, drawn, replays
from tests.helpers import all_logits
from tests.m7.head_checks import check_head, check_norm, make_head

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = [torch.bfloat16, torch.float16]
SHAPES = [(49152, 576), (151936, 1024), (4001, 2560), (999, 100)]
"""Vocabulary and inputs: SmolLM2-135M, Qwen3-0.6B, a wider one, and one that no tile divides."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_head_is_right_at_every_number_of_tokens(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Must not be right at one number of tokens and wrong at another."""
    head = make_head(*shape, dtype, "cuda")
    for tokens in (1, 2, 3, 4, 5, 16, 17, 33, 64, 65, 256):
        check_head(Int8Head(head), head, tokens, dtype)


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping", "one after another"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_norm_is_done_exactly_once(tokens: int, overlap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not be left out or done twice."""
    from stages.m7_gptq.fast.kernels import triton_int8

    head = make_head(151936, 1024, torch.bfloat16, "cuda")
    ops = FusedOps(torch.device("cuda"), overlap)
    for few in (triton_int8.GEMV_TOKENS, 4):
        monkeypatch.setattr(triton_int8, "GEMV_TOKENS", few)
        check_norm(ops, Int8Head(head), head, tokens, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 2, 16])
def test_a_kernel_that_starts_early_waits_for_its_input(tokens: int) -> None:
    """Norm, head and the choice of a token, which is the row of the embedding that the next norm reads, in a graph.
    Must not read too early."""
    make = Inputs(torch.bfloat16, "cuda")
    embedding = make.tensor(5000, 1024)
    head, norm, x = Int8Head(round_rows(embedding)), make.norm(1024), make.tensor(tokens, 1024)

    def chain(ops: Ops) -> torch.Tensor:
        y = x.clone()
        for _ in range(8):
            y = embedding[drawn(ops, ops.norm_linear(y, norm, head))] + y
        return y

    with torch.inference_mode():
        assert len(list(replays(chain, x, make, 20))) == 20


def test_two_runs_are_equal_to_the_last_bit() -> None:
    head = Int8Head(make_head(49152, 576, torch.bfloat16, "cuda"))
    for tokens in (1, 8, 64):
        x = Inputs(torch.bfloat16, "cuda").tensor(tokens, 576)
        first = head(x)
        assert all(torch.equal(first, head(x)) for _ in range(10))


def test_a_head_of_its_own_is_replaced_by_the_8_bits() -> None:
    """Must not be kept next to them."""
    weight = Inputs(torch.bfloat16, "cuda").tensor(4000, 512)
    fast = Int4Layers(torch.bfloat16, torch.device("cuda"))
    head = eight_bit_head(Linear(weight), fast)
    assert isinstance(head, Int8Head) and head.weights_bytes() == 4000 * (512 + 4)
    assert isinstance(eight_bit_head(Linear(weight[:, :510]), fast), Linear), "no kernel takes this number of inputs"


@pytest.mark.parametrize("options", [{}, {"fused_kernels": False, "cuda_graphs": False}], ids=str)
def test_the_engine_multiplies_by_the_8_bit_head(options: dict[str, Any]) -> None:
    """Its logits are those of the definition; what it holds is counted; it answers in graphs and without."""
    shared = {"model": "random:qwen3-0.6b", "dtype": "bf16", "max_model_len": 256, "kv_cache_memory": 1 << 28}
    ids = [(7 * i * i + 3) % 997 for i in range(20)]
    with stages.build("m7", device="cuda", **shared, **options) as engine:
        model = engine.runner.model
        assert isinstance(model.head, Int8Head)
        assert model.weights_bytes() - model.head.weights_bytes() > model.embedding.nbytes
        got = all_logits(model, ids)
        few = [all_logits(model, ids[: i + 1])[-1] for i in range(2)]
        model.head = QuantizedHead(round_rows(model.embedding))
        expected = all_logits(model, ids)
        size = expected.abs().max()
        assert (got - expected).abs().max() < 0.05 * size
        assert all((row - expected[i]).abs().max() < 0.05 * size for i, row in enumerate(few))
    with stages.build("m7", device="cuda", **shared, **options) as engine:
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        outputs = engine.generate([ids[:5], ids[:9], ids], params)
        assert all(len(output.outputs[0].token_ids) == 8 for output in outputs)
