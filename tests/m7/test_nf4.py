"""NF4: its values, the folder that is written, what opens it, and every way in which such a folder can lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import stages
from common import Engine, UserError
from common.models.linear import Linear
from common.models.load import load_model, open_source
from common.models.sources.nf4 import BLOCK, STATE, VALUES, NF4Weight, table
from common.models.sources.nf4_folder import NF4Folder
from common.models.sources.quantized_folder import fused_names
from stages.m7_gptq.checkpoint import baselines
from stages.m7_gptq.checkpoint import quantize as quantize_module
from stages.m7_gptq.checkpoint.baselines import NF4, RTN, check_shape, quantize_layers, to_nf4
from stages.m7_gptq.checkpoint.quantize import cached_folder, quantize, short_name
from stages.m7_gptq.settings import Settings
from tests.conftest import TINY
from tests.engine_checks import TOKEN_BYTES, exactly, prompts_of, serve, tokens
from tests.helpers import freeze
from tests.m7.conftest import Command, Frozen
from tests.m7.test_checkpoint import edit, relabel

CPU = torch.device("cpu")
FIRST = "model.layers.0.self_attn.q_proj"
NOTE = "dequantised at load from NF4, blocks of 64: no bytes are saved"
Change = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def saved(frozen: Frozen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(frozen(TINY[0]), NF4(), tmp_path_factory.mktemp("nf4") / "made", progress=False).folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "made"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(folder)).read(f"{FIRST}.weight", (64, 64))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def described(**changes: Any) -> Change:
    """Change the description of the first layer."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = json.loads(bytes(tensors[f"{FIRST}.{STATE}"].tolist())) | changes
        tensors[f"{FIRST}.{STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def set_part(kind: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({f"{FIRST}.{kind}": change(tensors[f"{FIRST}.{kind}"])})


OFFSET = 0.9677083  # the outermost quantile: the mean of 1 - 1/32 and 1 - 1/30, one for each of the halves


def nf4_values() -> torch.Tensor:
    """Where `VALUES` come from, float32 [16] in -1 ... 1: 8 for positive numbers, 7 for negative ones, and 0. Equal to
    them but for the last bit."""
    positive = torch.special.ndtri(torch.linspace(OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    return (values / values.max()).float()


def test_the_values_are_qlora_s() -> None:
    values = nf4_values()
    assert values.shape == (16,) and values[0] == -1 and values[7] == 0 and values[15] == 1
    assert torch.allclose(values, table(CPU), rtol=0, atol=2e-7)
    assert sorted(VALUES) == list(VALUES)


def test_rounds_to_the_nearest() -> None:
    weight = torch.randn(4, 128)
    result = to_nf4(weight)
    for part, rounded in zip(weight.split(64, 1), result.dequantize().split(64, 1), strict=True):
        scale = part.abs().amax(1, keepdim=True)
        best = (part[..., None] / scale[..., None] - table(CPU)).abs().amin(-1) * scale
        assert torch.allclose((part - rounded).abs(), best, atol=1e-6)
    assert result.weights_bytes() == 4 * 128 * (4 + 32 / BLOCK) / 8


def test_a_block_of_zeros_stays_zeros() -> None:
    assert not to_nf4(torch.zeros(2, 64)).dequantize().any()


def test_the_layout() -> None:
    """The first of two codes lies in the high half of a byte, and blocks follow one another over the rows."""
    packed = torch.full((2, 32), 0x77, dtype=torch.uint8)
    packed[1, 0] = 0x0F
    weight = NF4Weight(packed, torch.tensor([[2.0], [3.0]]))
    assert weight.dequantize()[1, :3].tolist() == [-3.0, 3.0, 0.0] and not weight.dequantize()[0].any()
    parts = weight.parts()
    assert {kind: (tuple(part.shape), part.dtype) for kind, part in parts.items() if kind != STATE} == {
        "weight": ((64, 1), torch.uint8),
        "weight.absmax": ((2,), torch.float32),
        "weight.quant_map": ((16,), torch.float32),
    }
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [2, 64]}
    assert json.loads(bytes(parts[STATE].tolist())) == state
    assert torch.equal(NF4Weight.from_parts(parts, 2, None).dequantize(), weight.dequantize())


def test_the_method_alone_is_enough() -> None:
    assert (NF4().bits, NF4().group_size, short_name(NF4())) == (4, 64, "4bit-g64-nf4")
    assert Settings().group_size == 32
    with pytest.raises(UserError, match="multiple of 64"):
        check_shape(NF4(), "o_proj", 96, 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": 8}, "leave out bits=8"),
        ({"group_size": 32}, "leave out group_size=32"),
        ({"symmetric": True, "desc_act": True}, "leave out symmetric=True, desc_act=True"),
        ({"damping": 0.1}, "leave out damping=0.1"),
        ({"search": False}, "leave out search=False"),
    ],
    ids=str,
)
def test_it_leaves_nothing_to_choose(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        NF4(**options)


@pytest.mark.parametrize("model", TINY)
def test_what_is_written_is_what_was_computed(frozen: Frozen, model: str, tmp_path: Path) -> None:
    source = open_source(str(quantize(frozen(model), NF4(), tmp_path / "made", progress=False).folder))
    assert isinstance(source, NF4Folder)
    with torch.inference_mode():
        layers = list(quantize_layers(open_source(frozen(model)), torch.empty(0, 0), NF4(), CPU))
    for index, layer in enumerate(layers):
        for projection, names in fused_names(index).items():
            stored, computed = [source.quantized(name) for name in names], layer.weights[projection]
            assert torch.equal(torch.cat([weight.dequantize() for weight in stored]), computed.dequantize())
            assert (stored[0].bias is None) == (computed.bias is None)


@pytest.mark.parametrize("stage", ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7"])
def test_every_stage_runs_its_dequantised_weights(build: Callable[..., Engine], folder: Path, stage: str) -> None:
    engine, source = build(stage, model=str(folder)), NF4Folder(folder)
    for projection, names in fused_names(1).items():
        expected = torch.cat([source.quantized(name).dequantize() for name in names])
        assert torch.equal(getattr(engine.runner.model.layers[1], projection).weight, expected)
    head = "; output head rounded to 8 bits" if stage == "m7" else ""  # in float32
    assert engine.note == NOTE + head
    left = {"head_bits": 16} if stage == "m7" else {}
    assert build(stage, model=str(folder), dtype="bf16", **left).note == NOTE


@pytest.mark.parametrize("model", TINY)
def test_tokens_are_those_of_m0(build: Callable[..., Engine], frozen: Frozen, model: str, tmp_path: Path) -> None:
    folder = str(quantize(frozen(model), NF4(), tmp_path / "made", progress=False).folder)
    prompts, outputs = prompts_of((7, 1, 30, 2)), [exactly(count) for count in (9, 20, 3, 12)]
    options = {"block_size": 4, "kv_cache_memory": 48 * TOKEN_BYTES, "max_num_seqs": 4, "head_bits": 16}
    engine = build("m7", model=folder, **options)
    expected = tokens(build("m0", model=folder).generate(prompts, outputs))
    assert tokens(serve(engine, prompts, outputs)) == expected


def test_a_stopped_run_goes_on_and_ends_the_same(
    folder: Path, frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def stops(*arguments: Any) -> NF4Weight:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return to_nf4(*arguments)

    monkeypatch.setattr(baselines, "to_nf4", stops)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(frozen(TINY[0]), NF4(), out, progress=False)
    assert not out.exists()
    quantize(frozen(TINY[0]), NF4(), out, progress=False)
    assert len(calls) == 6 + 4, "only the second layer was quantised again"
    for path in folder.glob("*.safetensors"):
        whole, resumed = load_file(path), load_file(out / path.name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_made_once_and_kept_apart_from_other_methods(
    folder: Path, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen(TINY[0])
    assert cached_folder(model, NF4()) != cached_folder(model, RTN(group_size=64))
    with pytest.raises(UserError, match=r"made otherwise \(group_size, method\)"):
        quantize(model, RTN(), folder, progress=False)
    monkeypatch.setattr(quantize_module, "quantize_layers", None)
    assert quantize(model, NF4(), folder, progress=False).losses == []
    with pytest.raises(UserError, match="quantised already"):
        quantize(str(folder), NF4(), progress=False)


def test_weights_that_are_not_finite_are_refused(
    frozen: Frozen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "to_nf4", lambda weight, bias: to_nf4(weight * float("inf"), bias))
    with pytest.raises(UserError, match="not finite"):
        quantize(frozen(TINY[0]), NF4(), tmp_path / "out", progress=False)


def test_the_command(command: Command, frozen: Frozen, tmp_path: Path) -> None:
    words = ("quantize", "--model", frozen(TINY[0]), "--device", "cpu", "--out", str(tmp_path / "out"))
    status, said = command(*words, "--method", "nf4")
    assert status == 0, said
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (found["quant_method"], found["load_in_4bit"], found["bnb_4bit_quant_type"]) == ("bitsandbytes", True, "nf4")
    assert not (tmp_path / "out" / "quantize_config.json").exists()
    status, said = command(*words, "--method", "nf4", "--group-size", "128")
    assert status == 2 and "leave out group_size=128" in said and said.count("\n") == 1


@pytest.mark.parametrize("stage", ["m0", "m7"])
def test_a_damaged_folder_is_refused_everywhere(folder: Path, stage: str) -> None:
    (folder / "model-00001-of-00003.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"safetensors (is truncated or damaged|cannot be read)"):
        stages.build(stage, model=str(folder), device="cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"load_in_8bit": True, "load_in_4bit": False}, "load_in_8bit (LLM.int8) is not supported"),
        ({"load_in_4bit": False}, "load_in_4bit is not true"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4' is not supported"),
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage 'bfloat16'"),
        ({"bnb_4bit_use_double_quant": "no"}, "bnb_4bit_use_double_quant='no'"),
        ({"bnb_4bit_use_double_quant": True}, "lacks model.layers.0.self_attn.q_proj.weight.nested_absmax"),
        ({"quant_method": "gptq"}, "'load_in_4bit'=True is not supported"),
        ({"quant_method": "hqq"}, "'hqq' is not supported"),
    ],
    ids=str,
)
def test_a_mislabelled_folder_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    relabel(folder, **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize("part", ["weight", "weight.absmax", "weight.quant_map", STATE])
def test_a_missing_part_is_refused(folder: Path, part: str) -> None:
    edit(folder, lambda tensors: tensors.pop(f"{FIRST}.{part}"))
    assert f"lacks {FIRST}.{part}" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_part("weight", lambda part: part[:-1]), "weight has shape [2047, 1]"),
        (set_part("weight.absmax", lambda part: part[1:]), "absmax has shape [63]"),
        (set_part("weight.absmax", torch.Tensor.half), "absmax holds torch.float16"),
        (set_part("weight.absmax", lambda part: part * float("nan")), "absmax is not finite"),
        (set_part("weight.absmax", torch.neg), "absmax is negative"),
        (set_part("weight.absmax", lambda part: part * 1e30), "stands for weights of up to"),
        (set_part("weight.absmax", torch.zeros_like), "is all but empty"),
        (set_part("weight", torch.zeros_like), "codes that no rounding gives"),
        (set_part("weight", lambda part: torch.full_like(part, 0x77)), "is all but empty"),
        (set_part("weight.absmax", torch.ones_like), "is the same in all blocks"),
        (set_part("weight", lambda part: part.to(torch.int8)), "weight holds torch.int8"),
        (set_part("weight.quant_map", lambda part: part.flip(0)), "does not hold the values of NF4"),
        (set_part(STATE, lambda part: part[:-1]), f"{STATE} is truncated or damaged"),
        (set_part(STATE, lambda part: part.float()), f"{STATE} is truncated or damaged"),
        (described(quant_type="fp4"), "quant_type 'fp4', not 'nf4'"),
        (described(blocksize=128), "blocksize 128, not 64"),
        (described(shape=[32, 128]), "shape [32, 128], not [64, 64]"),
    ],
)
def test_damaged_parts_are_refused(folder: Path, change: Change, words: str) -> None:
    edit(folder, change)
    assert words in refusal(folder)


@pytest.mark.parametrize("size", [0.0, 1e-39])
def test_blocks_of_nothing_or_next_to_nothing_are_no_damage(size: float, frozen: Frozen, tmp_path: Path) -> None:
    """Dead outputs, as some models have them."""
    model = tmp_path / "model"
    freeze(TINY[0], model)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][:20] = size * torch.randn(20, 128)
    save_file(weights, model / "model.safetensors")
    made = quantize(str(model), NF4(), tmp_path / "made", progress=False).folder
    assert not NF4Folder(made).quantized("model.layers.1.mlp.down_proj").dequantize()[:20].abs().max() > 1e-38


def test_a_damaged_layer_behind_the_first_is_refused(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors[name].zero_(), shard=2)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds codes"):
        stages.build("m7", model=str(folder))


def test_a_layer_left_out_is_read_as_it_is(folder: Path) -> None:
    """bitsandbytes leaves out what llm_int8_skip_modules names: such a layer is read as it is."""
    plain = torch.randn(64, 64)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(f"{FIRST}.")]:
            del tensors[name]
        tensors[f"{FIRST}.weight"] = plain

    edit(folder, change)
    assert torch.equal(NF4Folder(folder).read(f"{FIRST}.weight", (64, 64)), plain)


@pytest.mark.parametrize("stage", ["m0", "m7"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_head(build: Callable[..., Engine], folder: Path, stage: str, tied: bool) -> None:
    """`"llm_int8_skip_modules": []` leaves out nothing."""
    head = to_nf4(torch.randn(512, 64))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight")
        tensors.update({f"lm_head.{kind}": part for kind, part in head.parts().items()})

    edit(folder, change, shard=3)
    relabel(folder, llm_int8_skip_modules=[])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": tied}))
    options = {"head_bits": 16} if stage == "m7" else {}
    model = build(stage, model=str(folder), **options).runner.model
    assert isinstance(model.head, Linear)
    assert torch.equal(model.head.weight, head.dequantize())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llm_int8_skip_modules": None}, None),
        ({"llm_int8_skip_modules": []}, None),
        ({"llm_int8_skip_modules": ["model.layers.0.mlp", "lm_head", ".*down_proj", "re:(("]}, None),
        ({"llm_int8_threshold": 1e300, "bnb_4bit_compute_dtype": "float64", "quant_method": "bitsandbytes"}, None),
        ({"bnb_4bit_quant_storage": None, "bnb_4bit_use_double_quant": None, "meta": None}, None),
        ({"quant_method": None}, None),
        ({"quant_method": None, "load_in_4bit": None}, "is not supported|bits="),
        ({"load_in_4bit": 10**4000}, "load_in_4bit"),
        ({"load_in_8bit": float("nan")}, "load_in_8bit"),
        ({"bnb_4bit_quant_type": "x" * 10**6}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_quant_type": None}, "bnb_4bit_quant_type"),
        ({"bnb_4bit_quant_storage": {"a": [1] * 10**5}}, "bnb_4bit_quant_storage"),
        ({"bnb_4bit_blocksize": 128, "unknown": 1}, None),
    ],
    ids=lambda value: str(value)[:40],
)
def test_descriptions_of_all_kinds(folder: Path, changes: dict[str, Any], words: str | None) -> None:
    relabel(folder, **changes)
    if words is None:
        load_model(str(folder))
        return
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "state", ["[" * 2000 + "]" * 2000, "[" * 10**6, '{"a": ' + "9" * 4000 + "}", '{"shape": NaN}', "null", '"x"', ""]
)
def test_a_hostile_description_of_a_layer_is_refused(folder: Path, state: str) -> None:
    part = torch.tensor(list(state.encode()), dtype=torch.uint8)
    edit(folder, lambda tensors: tensors.update({f"{FIRST}.{STATE}": part}))
    assert FIRST in refusal(folder)


@pytest.mark.parametrize(
    ("lies", "words"),
    [
        ({}, None),
        ({"nested_blocksize": 64}, "nested_blocksize 256"),
        ({"nested_offset": None}, "nested_offset"),
        ({"level": True}, "no list of growing steps"),
        ({"nested_offset": float("nan")}, "not finite"),
    ],
    ids=str,
)
def test_double_quantisation(folder: Path, lies: dict[str, Any], words: str | None) -> None:
    """Scales in 8 bits: `map[absmax] * nested_absmax + offset`, 256 of them with a scale of their own."""
    exact: list[torch.Tensor] = []

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]:
            scales = tensors[f"{name}.weight.absmax"]
            exact.append(scales)
            largest = (scales - 0.5).abs().max()
            steps = ((scales - 0.5) / largest * 127.5 + 127.5).round()
            tensors[f"{name}.weight.absmax"] = steps.to(torch.uint8)
            tensors[f"{name}.weight.nested_absmax"] = largest.repeat(-(-len(scales) // 256))
            tensors[f"{name}.weight.nested_quant_map"] = torch.linspace(-1, 1, 256).clamp(
                min=1 if "level" in lies else -1
            )
            state = json.loads(bytes(tensors[f"{name}.{STATE}"].tolist()))
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5} | lies
            tensors[f"{name}.{STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit(folder, change, shard=1)
    edit(folder, change, shard=2)
    relabel(folder, bnb_4bit_use_double_quant=True)
    if words is not None:
        assert words in refusal(folder)
        return
    source = NF4Folder(folder)
    found = [source.quantized(n).scales.flatten() for i in (0, 1) for part in fused_names(i).values() for n in part]
    assert sorted(map(len, found)) == sorted(map(len, exact))
    assert float(torch.cat(found).sort().values.sub(torch.cat(exact).sort().values).abs().max()) < 0.01
