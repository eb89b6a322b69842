"""GPTQ folders as people have them: other tools' file names, settings for single layers, a quantised head."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import Engine, UserError
from common.models import load_model
from common.models.linear import Linear
from common.models.load import open_source
from stages.m7_gptq.linear import QuantizedLinear, SideBySide
from tests.helpers import all_logits, greedy
from tests.m7.fuzz import run as fuzz
from tests.m7.gptq_writer import Case, describe, write

Build = Callable[..., Engine]
PROMPT = [5, 99, 7, 300, 12, 45, 6]
USUAL = "gptq_model-4bit-32g"
DOWN = r"model\.layers\.\d+\.mlp\.down_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gptq") / "saved", Case())


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def same(folder: Path, other: Path) -> bool:
    return torch.equal(all_logits(load_model(str(folder)), PROMPT), all_logits(load_model(str(other)), PROMPT))


def rename(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / f"{name}.safetensors")


def shard(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"{name}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for i, file in enumerate(files):
        save_file({key: tensors[key] for key in sorted(tensors)[i::2]}, folder / file)
    weight_map = {key: files[i] for i in (0, 1) for key in sorted(tensors)[i::2]}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("place", [rename, shard])
@pytest.mark.parametrize("name", [USUAL, "model", "Llama-GPTQ-4bit.act"])
@pytest.mark.parametrize("said", [None, "config.json", "quantize_config.json"])
def test_other_names_of_the_weights(folder: Path, saved: Path, place: Any, name: str, said: str | None) -> None:
    place(folder, name)
    if said == "config.json":
        describe(folder, model_file_base_name=name)
    elif said is not None:
        (folder / said).write_text(json.dumps({"bits": 4, "group_size": 32, "model_file_base_name": name}))
    assert same(folder, saved)


def test_of_several_files_the_one_that_is_said_else_what_transformers_reads(folder: Path, saved: Path) -> None:
    write(folder, Case(model="random:tiny-qwen3"), "other.safetensors")
    shutil.copy(saved / "config.json", folder)
    assert same(folder, saved)
    describe(folder, model_file_base_name="gone")
    assert same(folder, saved)
    rename(folder, "main")
    assert "several weight files, ['main', 'other']" in refusal(folder)
    describe(folder, model_file_base_name="main.safetensors")
    assert same(folder, saved)


@pytest.mark.parametrize(
    "name", ["../outside", "/tmp/outside", "..", "a\\b", "sub/model", 5, ["model"], {"a": 1}, "\0/"]
)
def test_a_name_outside_of_the_folder_is_refused(folder: Path, name: Any) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    rename(folder, "main")
    describe(folder, model_file_base_name=name)
    if name == "..":  # the file would be `...safetensors`
        load_model(str(folder))
    else:
        assert "model_file_base_name" in refusal(folder)


@pytest.mark.parametrize("kind", ["bin", "pt"])
def test_pickled_weights_are_refused(folder: Path, kind: str) -> None:
    (folder / "model.safetensors").rename(folder / f"{USUAL}.{kind}")
    assert "pickled" in refusal(folder)


FIRST_PLAIN: dict[str, dict[str, Any] | None] = {r"model\.layers\.0\..*": None}
CASES: dict[str, Case] = {
    "one kind is left out": Case({"dynamic": {r"-:.*down.*": {}}}, {DOWN: None}),
    "a layer is left out": Case({"dynamic": {r"-:.*\.0\..*": {}}}, FIRST_PLAIN),
    "part of a fused layer is left out": Case({"dynamic": {r"-:.*v_proj": {}}}, {r".*v_proj": None}),
    "8 bits": Case({"dynamic": {r"+:.*down.*": {"bits": 8}}}, {DOWN: {"bits": 8}}),
    "8 bits in part of a fused layer": Case({"dynamic": {r".*up_proj": {"bits": 8}}}, {r".*up_proj": {"bits": 8}}),
    "other groups": Case({"dynamic": {r".*[qk]_proj$": {"group_size": 64}}}, {r".*[qk]_proj": {"group_size": 64}}),
    "asymmetric": Case(
        {"checkpoint_format": "gptq_v2", "dynamic": {r".*o_proj": {"sym": False}}}, {r".*o_proj": {"sym": False}}
    ),
    "act-order": Case({"dynamic": {r".*q_proj": {"desc_act": True}}}, {r".*q_proj": {"desc_act": True}}),
    "leaving out goes first": Case(
        {"dynamic": {r".*down.*": {"bits": 8}, r"-:.*\.0\..*": {}}}, {**FIRST_PLAIN, DOWN: {"bits": 8}}
    ),
    "then the first that matches": Case(
        {"dynamic": {r".*\.1\..*": {"bits": 8}, r".*down.*": {"group_size": 64}}},
        {r"model\.layers\.1\..*": {"bits": 8}, DOWN: {"group_size": 64}},
    ),
    "a pattern is for the beginning": Case(
        {"dynamic": {"mlp": {"bits": 8}, r"model.layers.1.mlp": {"bits": 8}}}, {r"model\.layers\.1\.mlp.*": {"bits": 8}}
    ),
    "only some modules": Case(
        {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["self_attn.k_proj", "self_attn.v_proj"]]},
        {r".*(mlp|o_proj).*": None},
    ),
    "everything is left out": Case({"dynamic": {"-:.*": {}}}, {".*": None}),
    "a quantised head": Case({"lm_head": True}, head={}),
    "a quantised head, of another kind": Case(
        {"lm_head": True, "dynamic": {"lm_head": {"bits": 8, "group_size": 64, "desc_act": True}}},
        head={"bits": 8, "group_size": 64, "desc_act": True},
    ),
    "a quantised head beside a tied embedding": Case({"lm_head": True}, head={}, model="random:tiny-qwen3"),
    "a head that dynamic leaves out": Case({"lm_head": True, "dynamic": {"-:lm_head": {}}}),
    "biases": Case({"dynamic": {r"-:.*k_proj": {}}}, {r".*k_proj": None}, model="random:tiny-qwen2"),
    "older words": Case({"w_bit": 4, "q_group_size": 32, "version": "GPTQ", "desc_act": 0}),
    "harmless words": Case(
        {
            **{"damp_percent": 0.01, "static_groups": True, "true_sequential": True, "meta": {"quantizer": ["x:1"]}},
            **{"model_seqlen": 2048, "block_name_to_quantize": "model.layers", "tokenizer": None, "dataset": "c4"},
            **{
                "exllama_config": {"version": 2},
                "use_cuda_fp16": True,
                "rotation": None,
                "adapter": {},
                "dynamic": None,
            },
            **{"is_marlin_format": False, "unknown": None, "pad_token_id": 0, "lm_head": None, "data_type": "int"},
        }
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_it_is_the_dequantised_model(build: Build, tmp_path: Path, case: Case) -> None:
    folder, twin = write(tmp_path / "made", case, twin=tmp_path / "twin"), tmp_path / "twin"
    expected = load_model(str(twin))
    assert torch.equal(all_logits(load_model(str(folder)), PROMPT), all_logits(expected, PROMPT))
    model = build("m7", model=str(folder), head_bits=16).runner.model
    torch.testing.assert_close(all_logits(model, PROMPT), all_logits(expected, PROMPT))
    assert greedy(model, PROMPT, 8) == greedy(expected, PROMPT, 8)


def test_m7_multiplies_what_is_quantised(build: Build, tmp_path: Path) -> None:
    folder = write(tmp_path, CASES["part of a fused layer is left out"])
    model = build("m7", model=str(folder), linear_backend="naive").runner.model
    for layer in model.layers:
        assert isinstance(layer.qkv_proj, SideBySide)
        assert [type(one) for one in layer.qkv_proj.projections] == [QuantizedLinear, QuantizedLinear, Linear]
        assert isinstance(layer.down_proj, QuantizedLinear)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dynamic": {"-:.*q_proj": {}}}, "layers.0.self_attn.q_proj has a qweight, but dynamic says"),
        ({"dynamic": {".*q_proj": {"bits": 8}}}, "q_proj.qweight has shape"),
        ({"dynamic": {".*q_proj": {"bits": 3}}}, r"dynamic '.\*q_proj': bits=3 is not supported"),
        ({"dynamic": {".*q_proj": {"bits": "4"}}}, r"dynamic '.\*q_proj': bits='4' is not"),
        ({"dynamic": {".*q_proj": {"group_size": 0}}}, r"dynamic '.\*q_proj': group_size=0"),
        ({"dynamic": {".*q_proj": {"sym": "no"}}}, r"dynamic '.\*q_proj': sym='no'"),
        ({"dynamic": {".*q_proj": {"rank": 4}}}, r"dynamic '.\*q_proj': 'rank'=4 is not supported"),
        ({"dynamic": {".*q_proj": {"pack_dtype": "int8"}}}, "pack_dtype='int8'"),
        ({"dynamic": {".*q_proj": 8}}, r"dynamic '.\*q_proj' holds 8"),
        ({"dynamic": {"-:.*q_proj": ["x"]}}, "holds"),
        ({"dynamic": [".*q_proj"]}, "dynamic="),
        ({"dynamic": "-:.*"}, "dynamic="),
        ({"dynamic": {"*q": {"bits": 8}}}, r"dynamic '\*q' is no regular expression"),
        ({"dynamic": {"-:(": {}}}, "is no regular expression"),
        ({"dynamic": {"(" * 900: {}}}, "is no regular expression"),
        ({"dynamic": {"(a{99999999999999})": {}}}, "too often"),
        ({"dynamic": {"((x{99}){99}){99}": {}}}, "too often"),
        ({"dynamic": {"(?R)?.*(?R)?": {}}}, "calls itself"),
        ({"dynamic": {"-:" + "a" * 2000: {}}}, "too long"),
        ({"dynamic": {f"-:{i}x": {} for i in range(30_000)}}, "too many patterns"),
        ({"dynamic": {r"((a|b|\w|\.){1,30}){1,30}[^\w.]": {}}}, "takes too long"),
        ({"dynamic": {r"(\w|\w\w|\.|\w\.)*[^\w.]": {}}}, "takes too long"),
        ({"dynamic": {rf"-:(\w|\.|[a-z]{{{i}}})*[^\w.]": {} for i in range(1, 30)}}, "takes too long"),
        ({"quant_method": "awq", "version": "gemm", "zero_point": True}, "quant_method 'awq'"),
        ({"quant_method": 5}, "quant_method 5"),
        ({"version": "gemm"}, "'gemm'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"checkpoint_format": "bitblas"}, "'bitblas'"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "zero points are not stored as"),
        ({"is_marlin_format": True}, "'is_marlin_format'=True is not supported"),
        ({"rotation": "hadamard"}, "'rotation'='hadamard' is not supported"),
        ({"adapter": {"rank": 8}}, "'adapter'="),
        ({"activation": {"bits": 8}}, "'activation'="),
        ({"data_type": "fp"}, "'data_type'='fp'"),
        ({"extra_config": {"q_proj": {"bits": 8}}}, "'extra_config'="),
        ({"w_bit": 8}, "qweight has shape"),
        ({"lm_head": "yes"}, "lm_head='yes'"),
        ({"bits": None}, "bits=None"),
        ({"bits": True}, "bits=True"),
        ({"bits": 10**4000}, "bits=1000"),
        ({"bits": [4] * 10**5}, "bits="),
        ({"bits": float("nan")}, "bits=nan"),
        ({"group_size": float("inf")}, "group_size=inf"),
        ({"group_size": -2}, "group_size=-2"),
        ({"group_size": 10**30}, "qzeros has shape"),
        ({"sym": "x" * 10**6}, "sym="),
        ({"pack_dtype": ["int32"]}, "pack_dtype"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_description_that_cannot_be_followed_is_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    describe(folder, **changes)
    start = time.thread_time()
    with pytest.raises(UserError, match=words) as caught:
        load_model(str(folder))
    assert time.thread_time() - start < 2
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("empty", [None, {}])
@pytest.mark.parametrize("older", [None, {}])
def test_an_empty_description_is_a_plain_model(tmp_path: Path, empty: Any, older: Any) -> None:
    twin = tmp_path / "twin"
    write(tmp_path / "made", Case(), twin=twin)
    expected = all_logits(load_model(str(twin)), PROMPT)
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps({**config, "quantization_config": empty}))
    if older is not None:
        (twin / "quantize_config.json").write_text(json.dumps(older))
    assert torch.equal(all_logits(load_model(str(twin)), PROMPT), expected)


def test_an_empty_description_gives_way_to_the_older_file(folder: Path, saved: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    assert same(folder, saved)


def test_a_plain_model_that_is_said_to_be_quantised_is_refused(tmp_path: Path) -> None:
    write(tmp_path, Case(own={".*": None}))
    assert "no layer in model.safetensors is" in refusal(tmp_path)


def test_a_weight_beside_its_parts_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 64)
    save_file(tensors, folder / "model.safetensors")
    assert "layers.1.mlp.up_proj has a weight and a qweight" in refusal(folder)


def test_a_number_of_a_group_does_not_wrap_around(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.g_idx"
    tensors[name] = tensors[name].long() + 2**32
    save_file(tensors, folder / "model.safetensors")
    assert "g_idx names groups outside" in refusal(folder)


def test_the_embedding_stays_where_the_head_is_quantised(tmp_path: Path) -> None:
    folder = write(tmp_path, CASES["a quantised head beside a tied embedding"])
    model = load_model(str(folder))
    assert isinstance(model.head, Linear)
    assert not torch.equal(model.head.weight, model.embedding)
    assert torch.equal(model.embedding, open_source(str(folder)).read("model.embed_tokens.weight", (512, 64)))


def test_changed_folders_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Thousands: `python -m tests.m7.fuzz 5000`."""
    outcomes = fuzz(tmp_path, 80)
    assert min(outcomes.values()) > 2
