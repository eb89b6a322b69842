"""GPTQ and NF4 folders under other tools' names and with other tools' settings, and what cannot be read of them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stages.m7_gptq.checkpoint.baselines import NF4
from stages.m7_gptq.checkpoint.quantize import quantize
from tests.helpers import freeze
from tests.m7.gptq_writer import Case, describe, write
from tests.m7.test_gptq_folders import CASES, rename, shard
from tests.variants import Make, variant

IDS = ("--token-ids", "1, 7, 30")
USUAL = "gptq_model-4bit-32g"


def _add(name: str, make: Make, refused: str | None = None) -> None:
    variant(f"gptq: {name}", refused, IDS)(make)


def _described(**changes: Any) -> Make:
    def make(folder: Path) -> Path:
        write(folder, Case())
        describe(folder, **changes)
        return folder

    return make


def _named(place: Any, name: str, **changes: Any) -> Make:
    def make(folder: Path) -> Path:
        write(folder, Case())
        place(folder, name)
        describe(folder, **changes)
        return folder

    return make


for _name, _case in CASES.items():
    _add(_name, lambda folder, case=_case: write(folder, case))  # type: ignore[misc]

_add("AutoGPTQ's name", _named(rename, USUAL))
_add("AutoGPTQ's name, shards", _named(shard, USUAL))
_add("a name that is said", _named(rename, "mine", model_file_base_name="mine"))
_add("a name that is said, shards", _named(shard, "mine", model_file_base_name="mine"))
_add("a name that is not there", _named(rename, "model", model_file_base_name="gone"))
_add("an unusual name", _named(rename, "Llama.GPTQ"))
_add("a name outside", _named(rename, "mine", model_file_base_name="../mine"), "model_file_base_name='../mine'")
_add("an absolute name", _named(rename, "mine", model_file_base_name="/etc/x"), "model_file_base_name='/etc/x'")


@variant("gptq: several files", "several weight files", IDS)
def several(folder: Path) -> Path:
    for name in ("one", "two"):
        write(folder, Case(), f"{name}.safetensors")
    return folder


@variant("gptq: quantize_config.json alone", options=IDS)
def older(folder: Path) -> Path:
    write(folder, Case())
    rename(folder, "mine")
    config = json.loads((folder / "config.json").read_text())
    found = {**config.pop("quantization_config"), "model_file_base_name": "mine"}
    (folder / "quantize_config.json").write_text(json.dumps(found))
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    return folder


@variant("gptq: pickled", "pickled", IDS)
def pickled(folder: Path) -> Path:
    write(folder, Case())
    (folder / "model.safetensors").rename(folder / f"{USUAL}.bin")
    return folder


for _empty in (None, {}):

    @variant(f"gptq: quantization_config {_empty} of a plain model", options=IDS)
    def plain(folder: Path, empty: Any = _empty) -> Path:
        freeze("random:tiny-llama", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": empty}))
        return folder


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "marlin": ({"checkpoint_format": "marlin"}, "'marlin' is not supported"),
    "marlin, older": ({"is_marlin_format": True}, "is_marlin_format"),
    "bitblas": ({"checkpoint_format": "bitblas"}, "'bitblas' is not supported"),
    "awq": ({"quant_method": "awq", "version": "gemm"}, "'awq' is not supported"),
    "gemm": ({"version": "GEMM"}, "'gemm' is not supported"),
    "rotation": ({"rotation": "hadamard"}, "rotation"),
    "adapter": ({"adapter": {"name": "lora", "rank": 8}}, "adapter"),
    "an unknown setting": ({"activation_bits": 8}, "activation_bits"),
    "3 bits": ({"bits": 3}, "bits=3 is not supported"),
    "bits of 4,000 digits": ({"bits": 10**4000}, "bits="),
    "group_size of 31 digits": ({"group_size": 10**30}, "qzeros has shape"),
    "group_size NaN": ({"group_size": float("nan")}, "group_size=nan"),
    "dynamic, 3 bits": ({"dynamic": {".*down.*": {"bits": 3}}}, r"down.*bits=3 is not supported"),
    "dynamic, another layer": ({"dynamic": {"-:.*down.*": {}}}, "down_proj has a qweight, but dynamic"),
    "dynamic, wrong bits": ({"dynamic": {".*down.*": {"bits": 8}}}, "down_proj.qweight has shape"),
    "dynamic, no expression": ({"dynamic": {"*.down": {"bits": 8}}}, "no regular expression"),
    "dynamic, too slow": ({"dynamic": {r"(\w|\w\w|\.|\w\.)*[^\w.]": {}}}, "takes too long"),
    "dynamic, too large": ({"dynamic": {"((x{999}){999}){999}": {}}}, "too often"),
    "dynamic, recursive": ({"dynamic": {"(?R)?.*(?R)?": {}}}, "calls itself"),
    "dynamic, a list": ({"dynamic": [".*"]}, "dynamic="),
    "dynamic, 100,000 patterns": (
        {"dynamic": {f".*{i}x.*[^a-z._0-9]": {"bits": 8} for i in range(100_000)}},
        "takes too long|too many",
    ),
}
for _name, (_changes, _refused) in REFUSED.items():
    _add(_name, _described(**_changes), _refused)


def nf4(**changes: Any) -> Make:
    def make(folder: Path) -> Path:
        quantize(freeze("random:tiny-qwen2", folder / "plain"), NF4(), folder / "made", progress=False)
        describe(folder / "made", **changes)
        return folder / "made"

    return make


_add("nf4, skip modules null", nf4(llm_int8_skip_modules=None))
_add("nf4, skip modules of all kinds", nf4(llm_int8_skip_modules=["model.layers.0", "re:((", "lm_head"]))
_add("nf4, load_in_4bit of 4,000 digits", nf4(load_in_4bit=10**4000), "load_in_4bit")
_add("nf4, fp4", nf4(bnb_4bit_quant_type="fp4"), "'fp4' is not supported")


@variant("gptq: nf4, a description nested 100,000 deep", "truncated or damaged|bytes", IDS)
def deep(folder: Path) -> Path:
    made = nf4()(folder)
    path = next(made.glob("model-00001*"))
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("bitsandbytes__nf4"))
    tensors[name] = torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)
    save_file(tensors, path)
    return made
