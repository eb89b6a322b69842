"""Products of bfloat16 whose weight lies in panels, against the plain ones."""

from __future__ import annotations

import pytest
import torch

from common.execution.choose import choose_linear
from common.execution.cpu.fused_cpu import CompiledOps
from common.execution.cpu.huge_pages import CHUNK, LINE, HugePages
from common.execution.cpu.panel_linear import PanelLinear
from common.models.linear import Linear
from tests.execution.cases import Inputs, check_products

BF16 = torch.bfloat16
needs_instructions = pytest.mark.skipif(
    not PanelLinear.takes(torch.zeros(32, 16)), reason="this processor has no AVX-512 for bfloat16, or numba is missing"
)


def made(outputs: int, size: int, bias: bool = False) -> PanelLinear:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, size, generator=generator).bfloat16()
    return PanelLinear(weight, torch.randn(outputs, generator=generator).bfloat16() if bias else None)


@needs_instructions
class TestPanels:
    @pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 70])
    @pytest.mark.parametrize("shape", [(32, 16), (96, 48), (960, 576), (576, 1536)], ids=str)
    def test_every_number_of_rows_gives_the_right_product(self, shape: tuple[int, int], rows: int) -> None:
        layer = made(*shape, bias=rows % 2 == 0)
        x = torch.randn(shape[1], rows, generator=torch.Generator().manual_seed(1)).bfloat16().t()
        exact = x.double() @ layer.weight.double().t() + (0 if layer.bias is None else layer.bias.double())
        got = layer(x)
        assert got.shape == exact.shape and got.dtype == BF16
        assert rows == 0 or (got.double() - exact).norm() / exact.norm() < 2**-8

    def test_more_rows_than_the_cache_holds(self) -> None:
        layer, x = made(64, 1536), torch.randn(401, 1536).bfloat16()
        assert torch.equal(layer(x), torch.cat([layer(row[None]) for row in x])), "a row depends on its neighbours"

    def test_the_weight_comes_back(self) -> None:
        weight = torch.randn(96, 48).bfloat16()
        layer = choose_linear(weight)
        assert isinstance(layer, PanelLinear) and torch.equal(layer.weight, weight)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("rows", [1, 3, 40])
    def test_norm_gate_and_residual_are_done_on_the_way(
        self, rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tests.execution.cases.Linear", PanelLinear, raising=False)
        monkeypatch.setattr(CompiledOps, "swiglu", lambda *_: pytest.fail("SiLU had a call of its own"))
        check_products(CompiledOps(), Inputs(BF16), rows, 192, 128, bias=bias)

    def test_a_gate_that_is_no_whole_panel_is_done_apart(self) -> None:
        """48 gates: their ups begin in the middle of a panel."""
        layer, plain, make = made(96, 64), CompiledOps(), Inputs(BF16)
        x, norm = make.tensor(3, 64), make.norm(64)
        got = plain.norm_swiglu(x, norm, layer)
        torch.testing.assert_close(got, plain.norm_swiglu(x, norm, Linear(layer.weight)), atol=0.2, rtol=0.02)

    @pytest.mark.parametrize("threads", [1, 2, 3, 7, 100])
    @pytest.mark.parametrize("rows", [1, 200])
    def test_every_number_of_threads_computes_all_outputs(
        self, threads: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        x = torch.randn(rows, 96).bfloat16()
        assert torch.equal(PanelLinear(torch.eye(96).bfloat16())(x), x)
        norm = torch.ones(96).bfloat16()
        got = PanelLinear(torch.eye(96).bfloat16())(x, norm=norm, eps=1e-6)
        torch.testing.assert_close(got, (x.float() * x.float().square().mean(-1, True).rsqrt()).bfloat16())

    @pytest.mark.parametrize("x", [torch.zeros(4, 32).bfloat16(), torch.zeros(4, 64).half(), torch.zeros(64).float()])
    def test_input_that_does_not_fit_is_refused(self, x: torch.Tensor) -> None:
        with pytest.raises(RuntimeError):
            made(32, 64)(x)

    def test_sides_that_are_no_whole_panels_are_not_taken(self) -> None:
        for sides in ((48, 64), (64, 40)):
            assert not isinstance(choose_linear(torch.zeros(sides, dtype=BF16)), PanelLinear)


class TestHugePages:
    def test_tensors_begin_at_cache_lines_and_keep_their_numbers(self) -> None:
        pages = HugePages()
        tensors = [torch.randn(size).to(dtype) for size in (1, 100, 3001) for dtype in (BF16, torch.float32)]
        copies = [pages.copy(tensor) for tensor in tensors]
        for tensor, copy in zip(tensors, copies, strict=True):
            assert torch.equal(tensor, copy) and copy.data_ptr() % LINE == 0

    def test_a_tensor_larger_than_a_chunk_and_one_after_it(self) -> None:
        pages = HugePages()
        large, small = torch.arange(CHUNK // 8 + 5), torch.arange(7).float()
        assert torch.equal(pages.copy(large), large) and torch.equal(pages.copy(small), small)

    def test_turned_tensors_are_laid_out_in_order(self) -> None:
        turned = torch.arange(6).view(2, 3).t()
        assert HugePages().copy(turned).is_contiguous() and torch.equal(HugePages().copy(turned), turned)
