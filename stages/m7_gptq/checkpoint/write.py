"""Writes a quantised model's folder: all of it, or nothing. A run that was stopped goes on where it was.

Each decoder layer is a shard, written when it is done. The folder has another name until the end.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.errors import UserError, require
from common.models.quantized_weight import Format, QuantizedWeight, concatenate, pack_zeros
from common.models.sources.gptq_description import Stored
from common.models.sources.gptq_folder import from_parts
from common.models.sources.hf_folder import INDEX
from common.models.sources.nf4 import NF4Weight, concatenate_nf4
from common.models.sources.quantized_folder import AnyWeight, fused_names, is_quantized
from common.models.weights import ModelSource, tensor_shapes
from common.text.json_file import write_json
from stages.m7_gptq.calibrate import QuantizedLayer
from stages.m7_gptq.settings import Settings

RECIPE = "folovllm"  # in a checkpoint's `meta`: all that its weights depend on
WORK = "work.json"  # what the unfinished folder was started with: a run with anything else starts over


class Writer:
    """The unfinished folder of one quantisation.

    recipe: all that the result depends on, kept in the description. again: what a stopped run left is not used.
    """

    def __init__(
        self, source: ModelSource, settings: Settings, folder: Path, recipe: Mapping[str, Any], again: bool = False
    ) -> None:
        self.source, self.settings, self.recipe, self.folder = source, settings, recipe, folder
        self.work = folder.with_name(f".{folder.name}-unfinished")
        self.form: Format = "gptq" if settings.symmetric else "gptq_v2"
        self._count = source.config.num_layers + 1
        started = json.dumps(recipe, indent=2)
        if again or not (self.work / WORK).is_file() or (self.work / WORK).read_text("utf-8", "replace") != started:
            shutil.rmtree(self.work, ignore_errors=True)
            self.work.mkdir(parents=True)
            (self.work / WORK).write_text(started, encoding="utf-8")

    def finished(self, index: int) -> QuantizedLayer | None:
        """A layer that an earlier run wrote; None where it did not, or not to the end, or it was damaged since."""
        try:
            with safe_open(self._shard(index), framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                losses, digest = (file.metadata()[word] for word in ("losses", "digest"))
        except (SafetensorError, OSError, KeyError, TypeError):
            return None
        if digest != _digest(tensors, losses):
            return None
        weights = {kind: self._join(names, tensors) for kind, names in fused_names(index).items()}
        return QuantizedLayer(weights, json.loads(losses))

    def add(self, index: int, layer: QuantizedLayer) -> None:
        """Write one layer: its quantised weights, split into the layers of the checkpoint, and its norms."""
        shapes = tensor_shapes(self.source.config)
        tensors: dict[str, torch.Tensor] = {}
        for projection, names in fused_names(index).items():
            rows = [shapes[f"{name}.weight"][0] for name in names]
            for name, part in zip(names, _split(layer.weights[projection], rows), strict=True):
                parts = part.parts() if isinstance(part, NF4Weight) else self._gptq_parts(part)
                if part.bias is not None:
                    parts["bias"] = _stored(part.bias)
                tensors |= {f"{name}.{kind}": tensor.cpu().contiguous() for kind, tensor in parts.items()}
        at = f"model.layers.{index}."
        tensors |= self._plain(name for name in shapes if name.startswith(at) and not is_quantized(name))
        losses = json.dumps(layer.losses)
        self._save(index, tensors, {"losses": losses, "digest": _digest(tensors, losses)})

    def finish(self) -> None:
        """The rest of the model, its description and its tokenizer; then all of it moves to its place."""
        config = self.source.config
        self._save(config.num_layers, self._plain(n for n in tensor_shapes(config) if ".layers." not in n), {})
        weight_map, size = dict[str, str](), 0
        for index in range(self._count):
            with safe_open(self._shard(index), framework="pt", device="cpu") as file:
                weight_map |= dict.fromkeys(file.keys(), self._shard(index).name)
            size += self._shard(index).stat().st_size
        write_json(self.work / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
        options, generation = config.to_hf()
        nf4 = self.settings.method == "nf4"
        quantization = describe_nf4(self.recipe) if nf4 else describe(self.settings, self.form, self.recipe)
        write_json(self.work / "config.json", {**options, "dtype": "bfloat16", "quantization_config": quantization})
        if not nf4:
            write_json(self.work / "quantize_config.json", quantization)
        write_json(self.work / "generation_config.json", generation)
        tokenizer = self.source.tokenizer()
        if tokenizer is not None:
            tokenizer.save(self.work)
        (self.work / WORK).unlink()
        old = self.folder.with_name(f".{self.folder.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        if self.folder.exists():
            os.replace(self.folder, old)
        os.replace(self.work, self.folder)
        shutil.rmtree(old, ignore_errors=True)

    def _gptq_parts(self, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        """The tensors of one linear layer without its bias, as a checkpoint has them."""
        return {
            "qweight": weight.qweight,
            "qzeros": pack_zeros(weight.zeros, weight.bits, self.form),
            "scales": weight.scales,
            "g_idx": weight.group_index().to(torch.int32),
        }

    def _join(self, names: list[str], tensors: Mapping[str, torch.Tensor]) -> AnyWeight:
        """The inverse of what `add` does, for one projection."""
        s, shapes = self.settings, tensor_shapes(self.source.config)
        nf4, gptq = list[NF4Weight](), list[QuantizedWeight]()
        for name in names:
            outputs, inputs = shapes[f"{name}.weight"]
            parts = {key.removeprefix(f"{name}."): part for key, part in tensors.items() if key.startswith(f"{name}.")}
            if s.method == "nf4":
                nf4.append(NF4Weight.from_parts(parts, outputs, parts.get("bias")))
            else:
                stored = Stored(s.bits, s.group_of(inputs), s.symmetric, s.desc_act, self.form)
                gptq.append(from_parts(name, parts, stored))
        joined = concatenate_nf4(nf4) if nf4 else concatenate(gptq)
        assert joined is not None, "their inputs were quantised together"
        return joined

    def _plain(self, names: Any) -> dict[str, torch.Tensor]:
        shapes = tensor_shapes(self.source.config)
        return {name: _stored(self.source.read(name, shapes[name])) for name in names}

    def _shard(self, index: int) -> Path:
        return self.work / f"model-{index + 1:05d}-of-{self._count:05d}.safetensors"

    def _save(self, index: int, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        path = self._shard(index)
        save_file(tensors, path.with_suffix(".part"), metadata={"format": "pt", **metadata})
        os.replace(path.with_suffix(".part"), path)


def describe(settings: Settings, form: Format, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The contents of `quantization_config`, in the words of AutoGPTQ and GPTQModel; `meta` is the maker's own."""
    return {
        "quant_method": "gptq",
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.symmetric,
        "desc_act": settings.desc_act,
        "lm_head": False,
        "checkpoint_format": form,
        "pack_dtype": "int32",
        "true_sequential": True,
        "meta": {"quantizer": ["folovllm:0.1.0"], "damp_percent": settings.damping, RECIPE: dict(recipe)},
    }


def describe_nf4(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The same for NF4, in the words of transformers' BitsAndBytesConfig, with its defaults; it ignores `meta`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": ["lm_head"],
        "meta": {"quantizer": ["folovllm:0.1.0"], RECIPE: dict(recipe)},
    }


def check_target(folder: Path) -> None:
    """`UserError` if the folder cannot be written, or holds something that is no quantised model."""
    try:
        taken = folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / INDEX).is_file()))
        require(not taken, f"{folder} exists and is no quantised model: give another --out")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-unfinished"):
            pass
        for path in (folder.with_name(f".{folder.name}-{kind}") for kind in ("unfinished", "old")):
            free = not path.is_symlink() and (path.is_dir() or not path.exists())
            require(free, f"{path} is in the way: move it elsewhere, or give another --out")
    except OSError as error:
        raise UserError(f"{str(folder)[:200]} cannot be written: {error.strerror}. Give another --out") from error


def _split(weight: AnyWeight, rows: list[int]) -> list[AnyWeight]:
    """A fused layer as the layers that it was made of."""
    ends = accumulate(rows)
    return [weight.outputs(slice(end - count, end)) for count, end in zip(rows, ends, strict=True)]


def _digest(tensors: Mapping[str, torch.Tensor], losses: str) -> str:
    """Of a layer as it is written: what was damaged since has another one."""
    found = hashlib.sha256(losses.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _stored(tensor: torch.Tensor) -> torch.Tensor:
    """What is not quantised is kept in 16 bits: bfloat16, whose range is that of float32."""
    return (tensor if tensor.itemsize == 2 else tensor.to(torch.bfloat16)).cpu().contiguous()
