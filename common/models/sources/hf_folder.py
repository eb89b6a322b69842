"""A local Hugging Face folder: config.json, safetensors, tokenizer files. Never pickle, never code from the folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from common.errors import UserError, refusing, require
from common.models.config import ModelConfig
from common.models.weights import EMBEDDING, HEAD, Part, Shape, check_tensors
from common.text.json_file import LARGEST, is_there, read_json
from common.text.tokenizer import Tokenizer
from common.watch.progress import say_once

WEIGHTS = ".safetensors"
INDEX = f"model{WEIGHTS}.index.json"


class HFFolder:
    """Opens the folder and checks every tensor's name and shape before the first one is read."""

    weights = "model"
    """What the weight files are called in front of `.safetensors`."""

    def __init__(self, folder: Path, name: str | None = None, options: dict[str, Any] | None = None) -> None:
        """options: the contents of config.json; None: as it is."""
        self.folder = folder
        generation = read_json(folder / "generation_config.json", missing={})
        self.config = ModelConfig.from_hf(name or str(folder), options or read_options(folder), generation)
        self._files: dict[str, Any] = {}  # tensor name to the open file that holds it

    def read(self, name: str, shape: Shape, part: Part = ()) -> torch.Tensor:
        """`UserError` unless the tensor holds floating-point numbers of 16 bits or more."""
        self.check()
        with refusing(f"{self.config.name}: tensor {name}"):
            file = self._files[name]
            tensor: torch.Tensor = file.get_slice(name)[part] if part else file.get_tensor(name)
        known = tensor.is_floating_point() and tensor.itemsize > 1
        supported = "supported are float32, bfloat16 and float16"
        require(known, f"{self.config.name}: tensor {name} holds {tensor.dtype}; {supported}")
        return tensor

    def tokenizer(self) -> Tokenizer | None:
        with refusing(f"{self.config.name}: its tokenizer"):
            return Tokenizer.from_folder(self.folder, self.config.eos_token_ids)

    def check(self) -> None:
        """Open the weight files, once, and hold what is in them against the configuration."""
        if self._files:
            return
        try:
            with refusing(f"{self.config.name}: its weights"):
                self._files, shapes = open_weights(self.folder, self.weights)
                self._untie(shapes)
                self._check(shapes)
        except BaseException:
            self._files = {}
            raise

    def _untie(self, shapes: dict[str, Shape]) -> None:
        """A head that config.json calls tied to the embedding, and that differs from it, is used: as transformers 5."""
        if self.config.tie_word_embeddings and shapes.get(HEAD, ()) and shapes[HEAD] == shapes.get(EMBEDDING):
            head, embedding = (self._files[name].get_slice(name) for name in (HEAD, EMBEDDING))
            starts = range(0, shapes[HEAD][0], 1024)
            parts = ((head[i : i + 1024].float(), embedding[i : i + 1024].float()) for i in starts)
            if not all(torch.equal(*part) for part in parts):
                self.config = replace(self.config, tie_word_embeddings=False)
                say_once(f"{self.config.name}: {HEAD} is used: it is not the embedding, as tie_word_embeddings says")

    def _check(self, shapes: dict[str, Shape]) -> None:
        """`UserError` unless every tensor is there in the shape that the configuration says."""
        check_tensors(self.config, shapes)


def read_options(folder: Path) -> dict[str, Any]:
    """The contents of config.json."""
    path = folder / "config.json"
    require(is_there(path), f"{folder} has no config.json: give a Hugging Face model folder, or a *.gguf file")
    return read_json(path)


def open_weights(folder: Path, weights: str) -> tuple[dict[str, Any], dict[str, Shape]]:
    """Of every tensor in the folder's weight files: the open file that holds it, and its shape."""
    shapes: dict[str, Shape] = {}
    files: dict[str, Any] = {}
    for path in _weight_files(folder, weights):
        with refusing(str(path)):
            with path.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
            require(header <= LARGEST, f"{path} cannot be read: its header has {header:,} bytes. Download it again")
            file = safe_open(path, framework="pt", device="cpu")
            files |= dict.fromkeys(file.keys(), file)
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return files, shapes


def _weight_files(folder: Path, weights: str) -> list[Path]:
    whole, index = folder / f"{weights}{WEIGHTS}", folder / f"{weights}{WEIGHTS}.index.json"
    if is_there(whole):  # first, as in transformers
        return [whole]
    if is_there(index):
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index} has no weight_map: download it again")
        there = {path.name for path in folder.iterdir()}  # a name outside of the folder is none of them
        names = sorted({str(name) for name in weight_map.values()})  # pyright: ignore[reportUnknownArgumentType,reportUnknownVariableType]
        missing = [name for name in names if name not in there] or [""]
        lacks = f"lacks {len(missing)} of {len(names)} shards, the first is {missing[0]:.80}"
        require(not missing[0], f"{folder} {lacks}")
        return [folder / name for name in names if is_there(folder / name)]
    pickled = any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir())
    hint = "which can run code when loaded: take its safetensors version"
    require(not pickled, f"{folder} has only pickled weights (*.bin), {hint}")
    raise UserError(f"{folder} has no weights: expected model.safetensors, or shards with {INDEX}")
