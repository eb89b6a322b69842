"""The same NF4 checkpoint in bitsandbytes and here; runs where bitsandbytes is installed (`make gptq-interop`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes", reason="bitsandbytes is in GPTQModel's environment: make gptq-interop")

import bitsandbytes as bnb
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from common.config import DEFAULT_MODEL
from common.models.load import load_model
from common.models.sources.nf4_folder import NF4Folder
from stages.m7_gptq.checkpoint.baselines import NF4, to_nf4
from stages.m7_gptq.checkpoint.quantize import quantize
from tests.conftest import TINY
from tests.helpers import all_logits
from tests.m7.conftest import Frozen

TOKENS = list(range(1, 65))
TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest: sums in another order, in float32."""


def loaded(folder: Path | str, **options: Any) -> Any:
    """In transformers, all that is not quantised in float32: loading leaves it in the checkpoint's 16 bits."""
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **options)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    for layer in layers(model).values():
        layer.compute_dtype = torch.float32
        layer.support_avx512bf16_for_cpu = False  # its kernel multiplies in bfloat16
    return model


def layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}


def dequantised(layer: Any) -> torch.Tensor:
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def check_logits(model: Any, folder: Path) -> None:
    ours = all_logits(load_model(str(folder)), TOKENS)
    with torch.inference_mode():
        theirs = model(torch.tensor([TOKENS])).logits[0]
    error = float((theirs - ours).abs().max() / ours.abs().max())
    print(f"logits of up to {float(ours.abs().max()):.2f} differ by {error:.1e} of it at most")
    assert error < TOLERANCE
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))


@pytest.mark.parametrize("model", [*TINY, DEFAULT_MODEL])
def test_our_folder_in_bitsandbytes(frozen: Frozen, model: str, tmp_path: Path) -> None:
    name = model if model == DEFAULT_MODEL else frozen(model)
    folder = quantize(name, NF4(), tmp_path / "made", progress=False).folder
    ours, theirs = NF4Folder(folder), loaded(folder)
    assert len(layers(theirs)) == 7 * ours.config.num_layers
    for name, layer in layers(theirs).items():
        assert torch.equal(dequantised(layer), ours.quantized(name).dequantize()), name
    check_logits(theirs, folder)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("model", TINY)
def test_a_folder_of_bitsandbytes_here(frozen: Frozen, model: str, double: bool, tmp_path: Path) -> None:
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    theirs = loaded(frozen(model), quantization_config=options, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "made")
    ours = NF4Folder(tmp_path / "made")
    for name, layer in layers(theirs).items():
        assert torch.equal(dequantised(layer), ours.quantized(name).dequantize()), name
    check_logits(theirs, tmp_path / "made")


def test_the_same_tensors_and_description(frozen: Frozen, tmp_path: Path) -> None:
    """Byte for byte what transformers writes of the same weights."""
    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        frozen(TINY[0]), device_map="cpu", quantization_config=options, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path / "theirs")
    made = quantize(frozen(TINY[0]), NF4(), tmp_path / "ours", progress=False).folder
    wanted = load_file(tmp_path / "theirs" / "model.safetensors")
    found = {name: tensor for path in made.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found.keys() == wanted.keys()
    for name in [name for name in wanted if "_proj" in name]:
        assert torch.equal(found[name], wanted[name]), name
    described = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (made, tmp_path / "theirs")
    ]
    assert described[0].pop("meta") and described[0] == described[1]


@pytest.mark.parametrize("shape", [(64, 64), (3, 192)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_the_same_codes_as_bitsandbytes(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(shape) * scale
    weight[0, :64] = 0
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    ours = to_nf4(weight)
    assert torch.equal(ours.packed.view(-1, 1), packed)
    assert torch.equal(ours.scales.flatten(), state.absmax)
    assert torch.equal(ours.dequantize(), bnb.functional.dequantize_4bit(packed, state))
