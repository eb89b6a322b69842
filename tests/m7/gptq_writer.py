"""GPTQ folders as AutoGPTQ and GPTQModel write them, layer by layer as one likes, and the same model dequantised."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.models.load import open_source
from common.models.quantized_weight import QuantizedWeight, pack, pack_zeros
from common.models.sources.quantized_folder import is_quantized
from common.models.weights import tensor_shapes
from stages.m7_gptq.checkpoint.baselines import RTN, round_to_nearest

BASE: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "desc_act": False}


@dataclass
class Case:
    """options: `quantization_config`. own: by a pattern for the whole name of a layer, its settings in place of `BASE`,
    None for a layer that stays as it was; the first that matches counts. head: settings of lm_head."""

    options: dict[str, Any] = field(default_factory=dict[str, Any])
    own: dict[str, dict[str, Any] | None] = field(default_factory=dict[str, Any])
    head: dict[str, Any] | None = None
    model: str = "random:tiny-llama"


def quantized(weight: torch.Tensor, options: dict[str, Any]) -> QuantizedWeight:
    """Rounded to nearest; with `desc_act`, inputs are dealt to groups at random."""
    settings = RTN(bits=options["bits"], group_size=options["group_size"], symmetric=options["sym"], search=False)
    if not options["desc_act"]:
        return round_to_nearest(weight, settings)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0))
    dealt = round_to_nearest(weight[:, order], settings)
    codes, groups = torch.empty_like(dealt.codes()), torch.empty(len(order), dtype=torch.int32)
    codes[order], groups[order] = dealt.codes(), dealt.group_index().int()
    dealt.qweight, dealt.g_idx = pack(codes, dealt.bits), groups
    return dealt


def write(folder: Path, case: Case, file: str = "model.safetensors", twin: Path | None = None) -> Path:
    """One file, config.json, and quantize_config.json. twin: folder of the same model, dequantised."""
    source = open_source(case.model)
    form = case.options.get("checkpoint_format", "gptq")
    config, _ = source.config.to_hf()
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    shapes = tensor_shapes(source.config) | {"lm_head.weight": (source.config.vocab_size, source.config.hidden_size)}
    for name, shape in shapes.items():
        tensor, base = source.read(name, shape).half().float(), name.removesuffix(".weight")
        options: dict[str, Any] | None = None
        if is_quantized(name):
            options = next((own for pattern, own in case.own.items() if re.fullmatch(pattern, base)), BASE)
        elif base == "lm_head":
            options = case.head
            if options is None and source.config.tie_word_embeddings:
                continue
        if options is None:
            plain[name] = tensors[name] = tensor
            continue
        weight = quantized(tensor, BASE | options)
        plain[name] = weight.dequantize()
        tensors[f"{base}.qweight"], tensors[f"{base}.scales"] = weight.qweight, weight.scales
        tensors[f"{base}.qzeros"] = pack_zeros(weight.zeros, weight.bits, form)
        tensors[f"{base}.g_idx"] = weight.group_index().int()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / file)
    description = {"quant_method": "gptq", **BASE, **case.options}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": description}))
    if twin is not None:
        twin.mkdir(parents=True, exist_ok=True)
        save_file(plain, twin / "model.safetensors")
        untied = {} if case.head is None else {"tie_word_embeddings": False}
        (twin / "config.json").write_text(json.dumps({**config, **untied}))
    return folder


def describe(folder: Path, **changes: Any) -> None:
    """Change `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {**config["quantization_config"], **changes}
    (folder / "config.json").write_text(json.dumps(config))
