"""Our decoder against transformers', and its parts against their definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from common.execution.choose import choose_linear
from common.execution.cpu.bf16_linear import NumbaLinear, OneDnnLinear, UpcastLinear
from common.models import Decoder, load_model
from common.models.linear import Linear
from tests.helpers import all_logits, full_attention, run_in_numbas_own_pool
from tests.models import reference

TOKENS = [(7 * i * i + 3) % 97 for i in range(150)]


@pytest.mark.parametrize("case", reference.CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = reference.save(case, tmp_path)
    ours = load_model(str(tmp_path))
    expected = reference.logits(theirs, TOKENS)
    assert expected.std() > 0.1  # a model that says nothing would agree with anything
    reference.assert_close(all_logits(ours, TOKENS), expected)


@pytest.mark.parametrize("case", ["llama, stretched rope", "qwen2", "qwen3, tied, 8 queries a KV head"])
def test_bfloat16_stays_near_float32(case: str, tmp_path: Path) -> None:
    theirs = reference.save(case, tmp_path)
    ours = all_logits(load_model(str(tmp_path), dtype="bf16"), TOKENS)
    assert ours.dtype == torch.bfloat16
    expected = reference.logits(theirs, TOKENS)
    assert (ours.float() - expected).std() < 0.05 * expected.std()


def test_embedded_model_equals_transformers(embedded_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = [504, 3575, 282, 4649, 314, 1, 2, 0, 49151, 7042, 30]
    theirs = AutoModelForCausalLM.from_pretrained(embedded_folder, dtype=torch.float32)
    reference.assert_close(all_logits(load_model("smollm2-135m-instruct"), tokens), reference.logits(theirs, tokens))


def test_tokens_of_several_sequences_lie_end_to_end() -> None:
    """Positions restart with each sequence, and everything but attention works token by token."""
    model = load_model("random:tiny-qwen3")
    first, second = [5, 6, 7, 8], [9, 10, 11]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        parts = zip(q.split([4, 3]), k.split([4, 3]), v.split([4, 3]), strict=True)
        return torch.cat([full_attention(layer, *part) for part in parts])

    with torch.inference_mode():
        hidden = model(torch.tensor(first + second), torch.tensor([0, 1, 2, 3, 0, 1, 2]), attend)
    expected = torch.cat([all_logits(model, first), all_logits(model, second)])
    torch.testing.assert_close(model.logits(hidden), expected, atol=1e-5, rtol=1e-4)


def test_attend_sees_each_layer_once_with_its_heads() -> None:
    model = load_model("random:tiny-llama", dtype="bf16")
    seen: list[int] = []

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        assert q.shape == (3, 4, 16)
        assert k.shape == v.shape == (3, 2, 16)
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16
        seen.append(layer)
        return q

    with torch.inference_mode():
        assert model(torch.tensor([1, 2, 3]), torch.arange(3), attend).shape == (3, 64)
    assert seen == [0, 1]


def test_rope_reaches_the_last_position() -> None:
    model = load_model("random:tiny-llama")
    last = model.config.max_position_embeddings - 1
    with torch.inference_mode():
        assert model(torch.tensor([1]), torch.tensor([last]), full_attention).isfinite().all()
        with pytest.raises(IndexError):
            model(torch.tensor([1]), torch.tensor([last + 1]), full_attention)


def test_a_projection_can_be_replaced() -> None:
    """What a quantised stage does: put its own layer in place of any of the four projections."""
    model = load_model("random:tiny-llama")
    before = all_logits(model, [1, 2, 3])
    plain = model.layers[0].down_proj

    class Doubled:
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * plain(x)

        def weights_bytes(self) -> int:
            return 0

    model.layers[0].down_proj = Doubled()
    assert not torch.allclose(all_logits(model, [1, 2, 3]), before)


def held_bytes(model: Decoder) -> int:
    """Every distinct tensor's bytes, found by walking the objects."""
    tensors: dict[int, torch.Tensor] = {}

    def walk(value: object) -> None:
        if isinstance(value, torch.Tensor):
            tensors[id(value)] = value
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif type(value).__module__.startswith("common.models") and not hasattr(value, "at"):
            for item in vars(value).values():
                walk(item)

    walk(model)
    return sum(t.numel() * t.element_size() for t in tensors.values() if t.dim() > 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("preset", ["tiny-llama", "tiny-qwen2", "tiny-qwen3"])
def test_weights_bytes_counts_every_tensor_once(preset: str, dtype: str) -> None:
    model = load_model(f"random:{preset}", dtype=dtype)
    assert model.weights_bytes() == held_bytes(model)


@pytest.mark.parametrize("tokens", [1, 3, 16, 200])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_weights_multiply_alike(tokens: int, biased: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(96, 64).bfloat16(), torch.randn(tokens, 64).bfloat16()
    bias = torch.randn(96).bfloat16() if biased else None
    made = choose_linear(weight, bias)
    with torch.inference_mode():
        torch.testing.assert_close(made(x), Linear(weight, bias)(x), atol=0.125, rtol=0.02)
    assert torch.equal(made.weight, weight)  # what a quantised stage reads
    assert made.weights_bytes() == Linear(weight, bias).weights_bytes()


def test_only_bfloat16_on_the_cpu_is_packed() -> None:
    assert isinstance(choose_linear(torch.zeros(4, 4)), Linear)
    assert isinstance(choose_linear(torch.zeros(4, 4, dtype=torch.float16)), Linear)
    assert isinstance(choose_linear(torch.zeros(4, 4, dtype=torch.bfloat16, device="meta")), Linear)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert isinstance(choose_linear(torch.zeros(4, 4, dtype=torch.bfloat16)), OneDnnLinear)


MANY = [1, 2, 5, UpcastLinear.many - 1, UpcastLinear.many, NumbaLinear.many - 1, NumbaLinear.many]


@pytest.mark.parametrize("tokens", MANY)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("sides", [(48, 64), (1040, 80), (44, 64), (48, 60)], ids=str)
def test_bfloat16_is_right_on_a_cpu_without_instructions_for_it(
    tokens: int, biased: bool, sides: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole vectors are multiplied by the compiled kernel, other sides by PyTorch."""
    monkeypatch.setattr("common.execution.choose._onednn_multiplies_bfloat16", lambda: False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(sides, generator=generator).bfloat16()
    x = torch.randn(sides[1], tokens, generator=generator).bfloat16().t()  # rows of a tensor that is turned
    bias = torch.randn(sides[0], generator=generator).bfloat16() if biased else None
    made = choose_linear(weight, bias)
    whole = sides[0] % 16 == sides[1] % 16 == 0
    assert type(made) is (NumbaLinear if whole else UpcastLinear) and made.weight is weight
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    got = made(x)
    assert got.dtype == torch.bfloat16
    assert (got.double() - exact).norm() / exact.norm() < 2**-8
    assert torch.equal(got, made(x)), "threads meet in a number"


@pytest.mark.parametrize(
    "x", [torch.zeros(4, 32).bfloat16(), torch.zeros(4, 64).half(), torch.zeros(4, 128).bfloat16()]
)
def test_input_that_does_not_fit_is_refused(x: torch.Tensor) -> None:
    """Must not give a number."""
    with pytest.raises(RuntimeError):
        NumbaLinear(torch.zeros(48, 64).bfloat16())(x)


TWO_THREADS = """
import threading, torch
from common.execution.cpu.bf16_linear import NumbaLinear
made, x = NumbaLinear(torch.eye(512).bfloat16()), torch.randn(9, 512).bfloat16()
made(x)
def work():
    for _ in range(300):
        assert torch.equal(made(x), x)
    done.append(1)
done = []
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(done))
"""


def test_threads_may_multiply_at_once_in_numbas_own_pool() -> None:
    """Two threads must not enter the pool at once."""
    assert run_in_numbas_own_pool(TWO_THREADS) == "4"


@pytest.mark.parametrize("threads", [1, 3, 7, 100])
def test_every_number_of_threads_computes_all_outputs(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    made = NumbaLinear(torch.eye(80).bfloat16())
    x = torch.randn(6, 80).bfloat16()
    assert torch.equal(made(x), x)


@pytest.mark.parametrize(
    ("kind", "expected"), [(UpcastLinear, [torch.bfloat16, torch.float32]), (NumbaLinear, [torch.float32])]
)
def test_many_rows_are_multiplied_in_float32_where_bfloat16_is_slow(
    kind: type[UpcastLinear], expected: list[torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def noting(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(x.dtype)
        return linear(x, *rest)

    monkeypatch.setattr("torch.nn.functional.linear", noting)
    made = kind(torch.zeros(16, 16, dtype=torch.bfloat16))
    for tokens in (kind.many - 1, kind.many):
        made(torch.zeros(tokens, 16, dtype=torch.bfloat16))
    assert seen == expected


def test_without_numba_pytorchs_product_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Must not choose the compiled one."""
    monkeypatch.setattr("common.execution.choose._onednn_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert type(choose_linear(torch.zeros(16, 16, dtype=torch.bfloat16))) is UpcastLinear
