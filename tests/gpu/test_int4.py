"""The 4-bit kernels, compiled and on a GPU, over the models' shapes, groups, act-order and 1 to 64 rows."""

from __future__ import annotations

import pytest
import torch

from common.execution.gpu.fused import FusedOps
from common.models.ops import Ops
from tests.execution.cases import Inputs, replays
from tests.m7.weights import GROUPS, QWEN3, SMOLLM2, check, check_fused, fast_linear, make_input, make_weight

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SHAPES = [*SMOLLM2.values(), *QWEN3.values()]
ROWS = (1, 2, 3, 8, 16, 17, 33, 64, 300)


def cuda(tokens: int, inputs: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return make_input(tokens, inputs, torch.float32).to("cuda", dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_is_right_at_every_number_of_rows(shape: tuple[int, int], group: int, symmetric: bool) -> None:
    """Must not be right at one number of rows and wrong at another."""
    weight = make_weight(*shape, group, symmetric=symmetric, bias=True)
    layer = fast_linear(weight, torch.bfloat16, torch.device("cuda"))
    assert layer.weights_bytes() < shape[0] * shape[1]
    for tokens in ROWS:
        check(layer, weight, cuda(tokens, shape[0]))


@pytest.mark.parametrize("overlap", [True, False], ids=["overlapping", "one after another"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", QWEN3)
def test_norm_silu_and_residual_are_done_exactly_once(shape: str, group: int, overlap: bool) -> None:
    """Must not be left out or done twice."""
    weight = make_weight(*QWEN3[shape], group)
    layer = fast_linear(weight, torch.bfloat16, torch.device("cuda"))
    for tokens in (1, 2, 3, 4, 5):
        check_fused(FusedOps(torch.device("cuda"), overlap), layer, weight, Inputs(torch.bfloat16, "cuda"), tokens)


def test_a_kernel_that_starts_early_waits_for_its_input() -> None:
    """A chain in a graph, each kernel reading what the one in front wrote. None must read too early."""
    device, make = torch.device("cuda"), Inputs(torch.bfloat16, "cuda")
    up, down = (fast_linear(make_weight(*QWEN3[s], 128), torch.bfloat16, device) for s in ("gate_up", "down"))
    norm, x = make.norm(1024), make.tensor(1, 1024)

    def chain(ops: Ops) -> torch.Tensor:
        y = x.clone()
        for _ in range(20):
            y = ops.residual_linear(y, down, ops.norm_swiglu(y, norm, up))
        return y

    with torch.inference_mode():
        assert len(list(replays(chain, x, make, 20))) == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_act_order(group: int, dtype: torch.dtype) -> None:
    weight = make_weight(1024, 4096, group, act_order=True)
    layer = fast_linear(weight, dtype, torch.device("cuda"))
    for tokens in ROWS:
        check(layer, weight, cuda(tokens, 1024, dtype))


@pytest.mark.parametrize("tokens", [1, 16])
def test_two_runs_are_equal_to_the_last_bit(tokens: int) -> None:
    layer = fast_linear(make_weight(3072, 1024, 128), torch.bfloat16, torch.device("cuda"))
    x = cuda(tokens, 3072)
    first = layer(x)
    assert all(torch.equal(first, layer(x)) for _ in range(20))


@pytest.mark.parametrize("tokens", [1, 2, 16, 64])
def test_graph_reads_new_input_at_every_replay(tokens: int) -> None:
    """Must not replay the input that it was captured with."""
    weight = make_weight(2048, 1024, 128)
    layer = fast_linear(weight, torch.bfloat16, torch.device("cuda"))
    x = cuda(tokens, 2048)
    layer(x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for seed in range(3):
        x.copy_(make_input(tokens, 2048, torch.float32, seed))
        graph.replay()
        check(lambda _: out, weight, x)  # type: ignore[arg-type]
