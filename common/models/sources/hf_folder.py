"""A local Hugging Face folder: config.json, safetensors (one file or shards), tokenizer files. Never pickle, never
code from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from common.errors import UserError
from common.models.config import ModelConfig
from common.models.weights import Shape, check_tensors
from common.text.tokenizer import Tokenizer

INDEX = "model.safetensors.index.json"


class HFFolder:
    """Opens the folder and checks every tensor's name and shape before the first one is read."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: give a Hugging Face model folder, or a *.gguf file")
        self.config = read_config(folder, name or str(folder), read_json(folder / "config.json"))
        self._files: dict[str, Any] = {}  # tensor name to the open file that holds it

    def read(self, name: str, shape: Shape) -> torch.Tensor:
        self.check()
        return read_tensor(self._files[name], self.config.name, name)

    def tokenizer(self) -> Tokenizer | None:
        return Tokenizer.from_folder(self.folder, self.config.eos_token_ids)

    def check(self) -> None:
        """Open the weight files, once, and hold their tensors' names and shapes against the configuration."""
        if self._files:
            return
        files, shapes = open_weights(self.folder)
        check_tensors(self.config, shapes)
        self._files = files


def read_config(folder: Path, label: str, options: dict[str, Any]) -> ModelConfig:
    """From the contents of config.json, and of generation_config.json if the folder has one."""
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(label, options, read_json(generation) if generation.is_file() else None)


def read_tensor(file: Any, label: str, name: str) -> torch.Tensor:
    """One tensor of an open file; `UserError` unless it holds floating-point numbers of 16 bits or more."""
    tensor: torch.Tensor = file.get_tensor(name)
    if not tensor.is_floating_point() or tensor.itemsize < 2:
        raise UserError(f"{label}: tensor {name} holds {tensor.dtype}; supported are float32, bfloat16 and float16")
    return tensor


def open_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Of every tensor in the folder's weight files: the open file that holds it, and its shape."""
    shapes: dict[str, Shape] = {}
    files: dict[str, Any] = {}
    for path in _weight_files(folder):
        try:
            file = safe_open(path, framework="pt", device="cpu")
            names = list(file.keys())
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}. Copy or download it again") from error
        files |= dict.fromkeys(names, file)
    return files, shapes


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{folder / INDEX} has no weight_map: download it again")
        names = sorted({str(name) for name in weight_map.values()})  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise UserError(f"{folder / INDEX} names a file outside of the folder: {outside[0]}")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} lacks {len(missing)} of {len(names)} shards, the first is {missing[0]}")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder} has only pickled weights (*.bin), which can run code when loaded: take its safetensors version"
        )
    raise UserError(f"{folder} has no weights: expected model.safetensors, or shards with {INDEX}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UserError` if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
