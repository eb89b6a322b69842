"""The checkpoint format: what is written can be read, and every way in which a folder can lie is refused."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import UserError
from common.models.decoder import PROJECTIONS, Decoder
from common.models.load import open_source
from common.models.quantized_weight import PER_CHANNEL, Format, concatenate, pack_zeros, unpack_zeros
from common.models.sources.gptq_checks import check_version
from common.models.sources.gptq_description import Stored
from common.models.sources.gptq_folder import GPTQFolder
from common.models.sources.quantized_folder import fused_names, quantization
from common.models.weights import build_decoder
from stages.m7_gptq.checkpoint.baselines import RTN, round_to_nearest
from stages.m7_gptq.linear import SideBySide
from stages.m7_gptq.load import build_quantized_decoder
from tests.conftest import TINY
from tests.helpers import all_logits
from tests.m7.conftest import Frozen, GetMade

FIRST = "model.layers.0.self_attn.q_proj"
CPU = torch.device("cpu")


def build_from(folder: GPTQFolder, dtype: torch.dtype) -> Decoder:
    return build_quantized_decoder(folder, lambda names, _: [folder.quantized(n) for n in names], dtype, CPU)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], shard: int = 1) -> None:
    path = folder / f"model-{shard:05d}-of-00003.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {n: s for n, s in index["weight_map"].items() if s != path.name}
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def relabel(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        GPTQFolder(folder).check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": False}, {"desc_act": True}, {"bits": 8}, {"group_size": -1}, {"group_size": 128}],
    ids=str,
)
def test_what_is_written_is_what_was_computed(made: GetMade, model: str, options: dict[str, Any]) -> None:
    folder, layers = GPTQFolder(made(model, **options).folder), made(model, **options).layers
    assert len(layers) == folder.config.num_layers
    for index, layer in enumerate(layers):
        for projection, names in fused_names(index).items():
            stored, computed = concatenate([folder.quantized(n) for n in names]), layer.weights[projection]
            assert stored is not None
            assert torch.equal(stored.dequantize(), computed.dequantize())
            assert (stored.g_idx is None) == ("desc_act" not in options)
            assert (stored.bias is None) == (computed.bias is None)


def test_version_1_for_symmetric_and_version_2_for_asymmetric(made: GetMade) -> None:
    forms = [GPTQFolder(made(**options).folder).stored.form for options in ({}, {"symmetric": False})]
    assert forms == ["gptq", "gptq_v2"], "GPTQModel refuses asymmetric version 1"


def test_what_is_not_quantised_stays(saved: Path, frozen: Frozen) -> None:
    folder, source = GPTQFolder(saved), open_source(frozen(TINY[0]))
    shape = (512, 64)
    embedding = source.read("model.embed_tokens.weight", shape)
    assert torch.equal(folder.read("model.embed_tokens.weight", shape), embedding.to(torch.bfloat16))


def test_a_decoder_from_the_folder_has_the_dequantised_weights(saved: Path) -> None:
    folder = GPTQFolder(saved)
    decoder = build_decoder(folder, torch.float32, CPU, False)
    for projection in PROJECTIONS:
        parts = [folder.quantized(name).dequantize() for name in fused_names(1)[projection]]
        assert torch.equal(getattr(decoder.layers[1], projection).weight, torch.cat(parts))


def test_which_folders_are_gptq(saved: Path, tmp_path: Path) -> None:
    assert quantization(saved) and not quantization(tmp_path)


def test_an_older_folder_with_quantize_config_alone(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    options = json.loads((folder / "quantize_config.json").read_text())
    for key in ("checkpoint_format", "pack_dtype", "quant_method", "lm_head"):
        del options[key]
    (folder / "quantize_config.json").write_text(json.dumps(options))
    GPTQFolder(folder).check()


def test_what_a_description_leaves_out_takes_its_default() -> None:
    assert Stored.from_dict("x", {"bits": 4}) == Stored(4, PER_CHANNEL, True, False, "gptq")


def test_a_zero_point_beside_the_middle_is_read_as_it_is(folder: Path) -> None:
    """Some writers call grids symmetric that are nearly so: it must not be taken for another version."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FIRST}.qzeros"][0, 0] += 1

    edit(folder, change)
    source = GPTQFolder(folder)
    source.check()
    assert source.quantized(FIRST).zeros[0, :2].tolist() == [9, 8]


def test_a_missing_g_idx_and_a_bias_of_zeros_are_accepted(folder: Path, saved: Path) -> None:
    """AutoGPTQ's habits: a bias of zeros where the model has none; others leave out g_idx where it says nothing."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{FIRST}.g_idx"]
        tensors[f"{FIRST}.bias"] = torch.zeros(64)

    edit(folder, change)
    assert torch.equal(
        GPTQFolder(folder).quantized(FIRST).dequantize(), GPTQFolder(saved).quantized(FIRST).dequantize()
    )
    edit(folder, lambda tensors: tensors[f"{FIRST}.bias"].fill_(1))
    assert "bias" in refusal(folder)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("truth", get_args(Format))
def test_a_lie_about_the_version_is_found(made: GetMade, tmp_path: Path, symmetric: bool, truth: Any) -> None:
    folder = Path(shutil.copytree(made(symmetric=symmetric, method="rtn").folder, tmp_path / "copy"))
    written = GPTQFolder(folder).stored.form
    for shard in (1, 2):

        def change(tensors: dict[str, torch.Tensor]) -> None:
            for name in [n for n in tensors if n.endswith("qzeros")]:
                tensors[name] = pack_zeros(unpack_zeros(tensors[name], 4, written), 4, truth)

        edit(folder, change, shard)
    relabel(folder, checkpoint_format=truth)
    GPTQFolder(folder).check()
    other = "gptq" if truth == "gptq_v2" else "gptq_v2"
    relabel(folder, checkpoint_format=other)
    assert f"it seems to be {truth!r}" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 3}, "bits=3 is not supported"),
        ({"bits": 8}, "bits=8 and group_size=32 mean"),
        ({"group_size": 64}, "group_size=64 mean"),
        ({"bits": "4"}, "bits='4' is not supported"),
        ({"group_size": 0}, "group_size=0"),
        ({"sym": "false"}, "sym='false'"),
        ({"quant_method": "awq"}, "'awq' is not supported"),
        ({"checkpoint_format": "marlin"}, "'marlin' is not supported"),
        ({"pack_dtype": "int64"}, "pack_dtype"),
        ({"dynamic": {"-:.*": {}}}, "dynamic"),
    ],
    ids=str,
)
def test_a_mislabelled_folder_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    relabel(folder, **changes)
    assert words in refusal(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "truncated or damaged" in refusal(folder)


def test_a_missing_shard_is_refused(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "lacks 1 of 3 shards" in refusal(folder)


def test_a_missing_part_is_refused(folder: Path) -> None:
    edit(folder, lambda tensors: tensors.pop(f"{FIRST}.scales"))
    assert f"lacks {FIRST}.scales" in refusal(folder)


DAMAGE: list[tuple[str, Callable[[torch.Tensor], object], str]] = [
    ("scales", lambda part: part.fill_(float("nan")), "scales are not finite"),
    ("scales", lambda part: part.neg_(), "scales are negative"),
    ("scales", lambda part: part[:, :8].zero_(), "scales are 0, 6% of them"),
    ("scales", lambda part: part.fill_(1e4), "weights of up to 150000"),
    ("qweight", lambda part: part.zero_(), "do not belong together"),
    ("qzeros", lambda part: part.zero_(), "hold no 8"),
    ("qzeros", lambda part: part.add_(0x11111111), "hold no 8"),
    ("qzeros", lambda part: part[:, :4].zero_(), "do not belong together"),
    ("g_idx", lambda part: part.zero_(), "64 inputs into a group of 32"),
]


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize(("kind", "damage", "words"), DAMAGE, ids=lambda value: str(value) * isinstance(value, str))
def test_numbers_that_no_layer_has_are_refused(folder: Path, index: int, kind: str, damage: Any, words: str) -> None:
    """The first layer at the door, every other one when it is read: before anything runs."""
    name = f"model.layers.{index}.mlp.up_proj"
    edit(folder, lambda tensors: damage(tensors[f"{name}.{kind}"]), shard=index + 1)
    with pytest.raises(UserError, match=rf"{name}.*{words}.*again"):
        build_from(GPTQFolder(folder), torch.bfloat16)


def test_a_shard_of_zeros_is_refused(folder: Path) -> None:
    """As a download leaves it that stopped in a file whose place was taken already."""
    edit(folder, lambda tensors: [tensor.zero_() for tensor in tensors.values()], shard=2)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.scales are 0, 100% of them"):
        build_from(GPTQFolder(folder), torch.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, PER_CHANNEL])
def test_the_version_of_asymmetric_zero_points(bits: int, group: int) -> None:
    """One step of 256 is found out as well as one of 16."""
    settings = RTN(bits=bits, group_size=group, search=False)
    layer = [round_to_nearest(torch.randn(576, 576), settings) for _ in range(7)]
    for true, said in itertools.product(get_args(Format), repeat=2):
        read = [replace(w, zeros=unpack_zeros(pack_zeros(w.zeros, bits, true), bits, said)) for w in layer]
        if true == said:
            check_version("x", read, False, said)
        else:
            with pytest.raises(UserError, match=f"seems to be '{true}'"):
                check_version("x", read, False, said)


def test_few_weights_prove_no_version() -> None:
    """The mean of 8-bit codes of so small a layer is a step from its zero points by chance."""
    settings = RTN(bits=8, search=False)
    layer = [round_to_nearest(torch.randn(32, 32) + 0.02, settings) for _ in range(7)]
    for form in get_args(Format):
        check_version("x", layer, False, form)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("qweight", "not int32"), ("qzeros", "not int32"), ("scales", "no floating"), ("g_idx", "no int")],
)
def test_numbers_of_another_kind_are_refused(folder: Path, kind: str, words: str) -> None:
    dtype = torch.int32 if kind == "scales" else torch.float32
    edit(folder, lambda tensors: tensors.update({f"{FIRST}.{kind}": tensors[f"{FIRST}.{kind}"].to(dtype)}))
    assert words in refusal(folder)


def test_a_norm_that_is_not_finite_is_refused(folder: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    edit(folder, lambda tensors: tensors[name].fill_(float("nan")), shard=2)
    with pytest.raises(UserError, match=f"{name} is not finite"):
        GPTQFolder(folder).read(name, (64,))


def test_act_order_without_g_idx_is_refused(made: GetMade, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made(desc_act=True).folder, tmp_path / "copy"))
    edit(folder, lambda tensors: tensors.pop(f"{FIRST}.g_idx"))
    assert f"lacks {FIRST}.g_idx" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, "qweight has shape"),
        ({"num_hidden_layers": 4}, "lacks model.layers.2.self_attn.q_proj.qweight"),
        ({"num_hidden_layers": 1}, "unexpected tensors model.layers.1"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
            "lacks tensors model.layers.0",
        ),
        ({"quantization_config": "gptq"}, "is not quantised"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert words in refusal(folder)


def test_one_file_and_config_json_alone(folder: Path, saved: Path) -> None:
    """As many checkpoints are: no shards, no index, no quantize_config.json."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").unlink()
    (folder / "quantize_config.json").unlink()
    assert torch.equal(
        GPTQFolder(folder).quantized(FIRST).dequantize(), GPTQFolder(saved).quantized(FIRST).dequantize()
    )


@pytest.mark.parametrize("group", [-1, 2])
def test_a_group_that_does_not_exist_is_refused(folder: Path, group: int) -> None:
    edit(folder, lambda tensors: tensors[f"{FIRST}.g_idx"].fill_(group))
    assert "g_idx names groups" in refusal(folder)


def test_q_and_k_in_different_orders_are_computed_side_by_side(folder: Path) -> None:
    """They cannot be one matrix: they are computed side by side."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{FIRST}.g_idx"] = tensors[f"{FIRST}.g_idx"].flip(0).contiguous()

    edit(folder, change)
    source = GPTQFolder(folder)
    with torch.inference_mode():
        model = build_from(source, torch.float32)
        assert isinstance(model.layers[0].qkv_proj, SideBySide)
        full = build_decoder(source, torch.float32, CPU, False)
    torch.testing.assert_close(all_logits(model, [1, 2, 3]), all_logits(full, [1, 2, 3]))


def test_a_folder_that_is_not_quantised_is_refused(folder: Path) -> None:
    (folder / "quantize_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not quantised"):
        GPTQFolder(folder)
